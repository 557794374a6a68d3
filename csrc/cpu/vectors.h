// Vectors of GCC's extension, for kernels that are compiled once for every instruction set (every_isa.h).
#pragma once

// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define DSE_INLINE inline __attribute__((always_inline))

namespace dse::cpu {

template <typename T, int kBytes>
struct VecOf;
template <>
struct VecOf<float, 16> {
  typedef float type __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct VecOf<double, 16> {
  typedef double type __attribute__((vector_size(16), aligned(8), may_alias));
};
template <>
struct VecOf<float, 32> {
  typedef float type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct VecOf<double, 32> {
  typedef double type __attribute__((vector_size(32), aligned(8), may_alias));
};
template <>
struct VecOf<float, 64> {
  typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
};
template <>
struct VecOf<double, 64> {
  typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
};

template <typename T, int kBytes>
using Vec = typename VecOf<T, kBytes>::type;

}  // namespace dse::cpu
