// Which of the compiled instruction sets (every_isa.h) this processor has.
#pragma once

namespace dse::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa find_isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
#ifdef DSE_EMULATE_AVX512
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx512;
#endif
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

inline const Isa kIsa = find_isa();

}  // namespace dse::cpu

// Calls `function` with `arguments` in the namespace of the processor's instruction set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DSE_CALL_BY_ISA(function, ...)                                          \
  (::dse::cpu::kIsa == ::dse::cpu::Isa::kAvx512 ? avx512::function(__VA_ARGS__) \
   : ::dse::cpu::kIsa == ::dse::cpu::Isa::kAvx2 ? avx2::function(__VA_ARGS__)   \
                                                : baseline::function(__VA_ARGS__))
#else
#define DSE_CALL_BY_ISA(function, ...) baseline::function(__VA_ARGS__)
#endif
