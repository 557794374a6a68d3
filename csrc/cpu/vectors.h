// Vectors of GCC's extension, for kernels that are compiled once for every instruction set (every_isa.h).
#pragma once

// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define DSE_INLINE inline __attribute__((always_inline))

namespace dse::cpu {

template <typename T, int kBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
};

template <typename T, int kBytes>
using Vec = typename VecOf<T, kBytes>::type;

}  // namespace dse::cpu
