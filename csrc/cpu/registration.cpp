// Registers the CPU kernels with torch.

#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"
#include "cpu/processor.h"
#include "cpu/short_products.h"

STABLE_TORCH_LIBRARY_IMPL(dse_ext, CPU, m) {
  dse::cpu::uses_short_products();  // reads the environment now
  DSE_REGISTER_OPERATORS(m, cpu);
}

// What the CPU kernels use of this processor, for `dse-ext info`.
extern "C" __attribute__((visibility("default"))) const char* dse_ext_cpu_kernels() {
  const bool is_short = dse::cpu::uses_short_products();
  switch (dse::cpu::kIsa) {
    case dse::cpu::Isa::kAvx512: return is_short ? "AVX-512, 16-bit products" : "AVX-512";
    case dse::cpu::Isa::kAvx2: return is_short ? "AVX2, 16-bit products" : "AVX2";
    case dse::cpu::Isa::kBaseline: return is_short ? "baseline, 16-bit products" : "baseline";
  }
  return "";
}
