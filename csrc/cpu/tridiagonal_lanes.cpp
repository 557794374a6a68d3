// Householder tridiagonalization and implicit QL iterations (Golub & Van Loan, ch. 8), with every scalar a vector
// of eight: lane l belongs to matrix l. A matrix of side 65 has too little work in a row or column to fill a
// vector unit, and its QL iterations are a chain of divisions; eight matrices side by side fill the unit at every
// step, the chain included. Smaller matrices are padded with zero rows, which stay decoupled.
//
// No eigenvectors: a function of A is Q f(T) Q^T, and the inverse of a tridiagonal matrix costs one
// multiplication an entry, so that the sum of a dozen of them (shifts.h) is cheaper than the rotations of the
// eigenvectors, and both triangles of Q (..) Q^T than the product of three matrices.

#include "cpu/tridiagonal_lanes.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dense.h"
#include "cpu/processor.h"
#include "cpu/simd.h"
#include "cpu/vectors.h"

namespace dse::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kMaxSweeps = 80;
// Squares of cosines and, in matrices whose entries are about 1, of couplings: what is less is zero in effect,
// and its inverse might overflow.
constexpr double kLeast = 1e-290;

// What one shift needs: the pivots' inverses and the current row of (T + shift)^-1, from its diagonal on.
template <typename T>
struct ShiftLanes {
  using V = Vec<T, 8 * sizeof(T)>;
  V* weight;  // of every shift
  V* pivot;   // shifts x n: inverses of the pivots of T + shift
  V* row;     // shifts x n
  V* corner;  // last diagonal entry of every inverse
  int64_t count;
};

}  // namespace
}  // namespace dse::cpu

#define DSE_KERNELS "cpu/tridiagonal_lanes.kernels.h"
#include "cpu/every_isa.h"

namespace dse::cpu {
namespace {

template <typename T>
using Eight = Vec<T, 8 * sizeof(T)>;

template <typename T>
Eight<T>* vectors_of(T* data) {
  return reinterpret_cast<Eight<T>*>(data);
}

bool iterate_lanes(int64_t n, double* d, double* e) { return DSE_CALL_BY_ISA(iterate, n, d, e); }

// Eigenvalues of one tridiagonal matrix, without square roots: squares of the couplings e[i] and one chain of
// divisions (Pal, Walker & Kahan; Parlett, "The Symmetric Eigenvalue Problem", 8.15). `e` holds the squares.
bool iterate_one(int64_t n, double* d, double* e) {
  for (int64_t l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      int64_t m = l;
      for (; m + 1 < n; ++m) {
        const double negligible = kEps * (std::abs(d[m]) + std::abs(d[m + 1]));
        if (e[m] <= std::max(negligible * negligible, kLeast)) break;
      }
      if (m == l) break;
      if (sweep == kMaxSweeps) return false;
      const double coupling = std::sqrt(e[l]), half_gap = (d[l + 1] - d[l]) / (2.0 * coupling);
      const double shift =
          d[l] - coupling / (half_gap + std::copysign(std::sqrt(half_gap * half_gap + 1.0), half_gap));
      double c = 1.0, s = 0.0, gamma = d[m] - shift, p = gamma * gamma;
      for (int64_t i = m - 1; i >= l; --i) {
        const double square = e[i], total = p + square, before = c, last = gamma;
        if (i + 1 < m) e[i + 1] = s * total;
        const double secant = total / p;  // 1 / c, which does not wait for c
        c = p / total;
        s = square / total;
        gamma = c * (d[i] - shift) - s * last;
        d[i + 1] = last + (d[i] - gamma);
        p = c > kLeast ? gamma * gamma * secant : before * square;
      }
      e[l] = s * p;
      d[l] = shift + gamma;
    }
  }
  return true;
}

// The padding is decoupled from the start and keeps its places, behind the matrix's own.
void sort_values(const double* lanes, int64_t lane, int64_t n, double scale, double* values) {
  for (int64_t i = 0; i < n; ++i) values[i] = lanes[i * kLanes + lane] / scale;
  std::sort(values, values + n);
}

}  // namespace

bool tridiagonal_eigenvalues(int64_t count, const double* const* diagonal, const double* const* couplings,
                             const int64_t* n, double* const* values, Buffer<double>& work) {
  const int64_t side = *std::max_element(n, n + count);
  double* d = work.reserve_zeroed(2 * side * kLanes);
  double* e = d + side * kLanes;
  if (count == 1) {
    std::copy_n(diagonal[0], side, d);
    for (int64_t i = 0; i + 1 < side; ++i) e[i] = couplings[0][i] * couplings[0][i];
    if (!iterate_one(side, d, e)) return false;
    std::sort(d, d + side);
    std::copy_n(d, side, values[0]);
    return true;
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t i = 0; i < n[lane]; ++i) d[i * kLanes + lane] = diagonal[lane][i];
    for (int64_t i = 0; i + 1 < n[lane]; ++i) e[i * kLanes + lane] = couplings[lane][i] * couplings[lane][i];
  }
  if (!iterate_lanes(side, d, e)) return false;
  for (int64_t lane = 0; lane < count; ++lane) sort_values(d, lane, n[lane], 1.0, values[lane]);
  return true;
}

template <typename T>
bool TridiagonalLanes<T>::reduce(int64_t count, const T* const* matrices, const int64_t* n, const int64_t* ld,
                                 double* const* values) {
  count_ = count;
  side_ = *std::max_element(n, n + count);
  T* a = matrix_.reserve_zeroed(side_ * side_ * kLanes);
  T* vectors = vectors_.reserve(4 * side_ * kLanes);
  const int64_t step = side_ * kLanes;
  for (int64_t lane = 0; lane < count; ++lane) {
    n_[lane] = n[lane];
    T largest = T(0);
    for (int64_t i = 0; i < n[lane]; ++i) largest = std::max(largest, std::abs(matrices[lane][i * ld[lane] + i]));
    scale_[lane] = unit_scale(static_cast<double>(largest));
    for (int64_t i = 0; i < n[lane]; ++i)
      for (int64_t j = 0; j <= i; ++j)
        a[(i * side_ + j) * kLanes + lane] =
            static_cast<T>(static_cast<double>(matrices[lane][i * ld[lane] + j]) * scale_[lane]);
  }
  DSE_CALL_BY_ISA(tridiagonalize<T>, side_, vectors_of(a), vectors_of(vectors), vectors_of(vectors + step),
                  vectors_of(vectors + 2 * step), vectors_of(vectors + 3 * step));
  double* d = iterated_.reserve(4 * step);
  double* e = d + step;
  for (int64_t i = 0; i < 2 * step; ++i) d[i] = static_cast<double>(vectors[i]);
  std::copy_n(d, 2 * step, d + 2 * step);  // T itself stays, for apply()
  for (int64_t i = 0; i < step; ++i) e[i] *= e[i];
  if (!iterate_lanes(side_, d, e)) return false;
  for (int64_t lane = 0; lane < count; ++lane) sort_values(d, lane, n[lane], scale_[lane], values[lane]);
  return true;
}

template <typename T>
void TridiagonalLanes<T>::apply(const ShiftedInverses* const* functions, T* const* out, const int64_t* ld) {
  int64_t most = 0;
  for (int64_t lane = 0; lane < count_; ++lane)
    if (functions[lane] != nullptr) most = std::max(most, functions[lane]->size());
  if (most == 0) return;
  const int64_t step = side_ * kLanes;
  T* weight = shifted_.reserve_zeroed(most * (2 * side_ + 2) * kLanes);
  T* corner = weight + most * kLanes;
  T* pivot = corner + most * kLanes;
  double* shift = pivots_.reserve(most * kLanes);
  for (int64_t s = 0; s < most; ++s) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const bool used = lane < count_ && functions[lane] != nullptr && s < functions[lane]->size();
      // (A + s)^-1 = scale (scale A + scale s)^-1. Idle lanes invert T + 1, for nothing.
      const auto at = static_cast<size_t>(s);
      shift[s * kLanes + lane] = used ? functions[lane]->shift[at] * scale_[lane] : 1.0;
      weight[s * kLanes + lane] = used ? static_cast<T>(functions[lane]->weight[at] * scale_[lane]) : T(0);
    }
  }
  double* diagonal = iterated_.data() + 2 * step;
  DSE_CALL_BY_ISA(invert_pivots<T>, side_, most, vectors_of(diagonal), vectors_of(diagonal + step),
                  vectors_of(shift), vectors_of(pivot));
  const ShiftLanes<T> shifts{vectors_of(weight), vectors_of(pivot), vectors_of(pivot + most * step),
                             vectors_of(corner), most};
  T* vectors = vectors_.data();
  T* a = matrix_.data();
  DSE_CALL_BY_ISA(way_back<T>, side_, vectors_of(a), vectors_of(vectors + step), vectors_of(vectors + 2 * step),
                  shifts, vectors_of(vectors + 3 * step));
  for (int64_t lane = 0; lane < count_; ++lane) {
    if (functions[lane] == nullptr) continue;
    for (int64_t i = 0; i < n_[lane]; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const T value = a[(i * side_ + j) * kLanes + lane];
        out[lane][i * ld[lane] + j] = value;
        out[lane][j * ld[lane] + i] = value;
      }
    }
  }
}

template class TridiagonalLanes<float>;
template class TridiagonalLanes<double>;

}  // namespace dse::cpu
