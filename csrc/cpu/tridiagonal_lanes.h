// Eigenvalues and functions of up to eight small symmetric matrices at once, one in each SIMD lane.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/shifts.h"

namespace dse::cpu {

inline constexpr int64_t kLanes = 8;
// Above this side, eight interleaved matrices outgrow the caches, and one at a time is faster (tridiagonal.h).
#ifdef DSE_LANES_MAX_SIDE
inline constexpr int64_t kLanesMaxSide = DSE_LANES_MAX_SIDE;  // builds that look for errors: both ways, small
#else
inline constexpr int64_t kLanesMaxSide = 160;
#endif

// Eigenvalues of tridiagonal matrices: n[lane] diagonal entries and, between them, n[lane] - 1 couplings, into
// values[lane][0 .. n[lane]), ascending. Returns false if an iteration did not converge (then there is no
// result).
bool tridiagonal_eigenvalues(int64_t count, const double* const* diagonal, const double* const* couplings,
                             const int64_t* n, double* const* values, Buffer<double>& work);

// T is the type of the arithmetic, but for the eigenvalues of the tridiagonal form.
template <typename T>
class TridiagonalLanes {
 public:
  // Reduces matrices A = Q T Q^T: side n[lane], row-major, leading dimension ld[lane], lower triangle read.
  // Eigenvalues as above.
  bool reduce(int64_t count, const T* const* matrices, const int64_t* n, const int64_t* ld,
              double* const* values);

  // f(A) = Q f(T) Q^T of every lane with functions[lane] != nullptr, into out[lane], n x n with leading dimension
  // ld, symmetric. Once after each reduce().
  void apply(const ShiftedInverses* const* functions, T* const* out, const int64_t* ld);

 private:
  int64_t count_ = 0, side_ = 0;
  int64_t n_[kLanes] = {};
  double scale_[kLanes] = {};
  Buffer<T> matrix_;         // side x side x lanes: the reflectors above the diagonal, workspace below
  Buffer<T> vectors_;        // a few arrays of side x lanes
  Buffer<T> shifted_;        // shifts x (2 side + 2) x lanes
  Buffer<double> iterated_;  // T in float64, twice: one is overwritten by its eigenvalues
  Buffer<double> pivots_;    // the shifts in float64
};

extern template class TridiagonalLanes<float>;
extern template class TridiagonalLanes<double>;

}  // namespace dse::cpu
