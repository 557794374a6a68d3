// Registers the CPU kernels with torch.

#include <string>

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
  static const std::string kernels = [] {
    std::string text = "baseline";
    if (dse::cpu::kIsa == dse::cpu::Isa::kAvx512) text = "AVX-512";
    else if (dse::cpu::kIsa == dse::cpu::Isa::kAvx2) text = "AVX2";
    if (dse::cpu::uses_short_products()) text += ", 16-bit products";
    if (dse::cpu::uses_tiles()) text += " in tiles";
    return text;
  }();
  return kernels.c_str();
}
