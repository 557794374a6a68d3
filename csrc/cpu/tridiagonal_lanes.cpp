// Householder tridiagonalization and implicit QL iterations (Golub & Van Loan, ch. 8), with every scalar a vector
// of eight: lane l belongs to matrix l. A matrix of side 65 has too little work in a row or column to fill a
// vector unit, and its QL iterations are a chain of square roots and divisions; eight matrices side by side fill
// the unit at every step, the chain included. Smaller matrices are padded with zero rows, which stay decoupled.
//
// No eigenvectors: a function of A is Q f(T) Q^T, and the inverse of a tridiagonal matrix costs one
// multiplication an entry, so that the sum of a dozen of them (shifts.h) is cheaper than the rotations of the
// eigenvectors, and both triangles of Q (..) Q^T than the product of three matrices.

#include "cpu/tridiagonal_lanes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/dense.h"
#include "cpu/simd.h"

// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace dse::cpu {
namespace {

typedef double V __attribute__((vector_size(64)));
typedef long long Mask __attribute__((vector_size(64)));
static_assert(sizeof(V) == kLanes * sizeof(double));

#define DSE_INLINE inline __attribute__((always_inline))

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kMaxSweeps = 80;

DSE_INLINE V broadcast(double x) { return V{} + x; }
DSE_INLINE V magnitude(V x) { return x < 0.0 ? -x : x; }
DSE_INLINE V square_root(V x) {
  V r;
  for (int lane = 0; lane < kLanes; ++lane) r[lane] = __builtin_sqrt(x[lane]);
  return r;
}
DSE_INLINE bool any(Mask m) {
  long long bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= m[lane];
  return bits != 0;
}

// Rows and columns k + 1 .. n of the symmetric matrix below the diagonal of a: H A H, H = I - factor v v^T.
DSE_INLINE void reflect(V* a, int64_t n, int64_t k, const V* v, V factor, V* p) {
  for (int64_t i = k + 1; i < n; ++i) p[i] = broadcast(0.0);
  for (int64_t i = k + 1; i < n; ++i) {
    const V* row = a + i * n;
    const V vi = v[i];
    V sum0 = {}, sum1 = {};
    int64_t j = k + 1;
    for (; j + 1 < i; j += 2) {
      const V a0 = row[j], a1 = row[j + 1];
      sum0 += a0 * v[j];
      sum1 += a1 * v[j + 1];
      p[j] += a0 * vi;
      p[j + 1] += a1 * vi;
    }
    for (; j < i; ++j) {
      sum0 += row[j] * v[j];
      p[j] += row[j] * vi;
    }
    p[i] += sum0 + sum1 + row[i] * vi;
  }
  V dot = {};
  for (int64_t i = k + 1; i < n; ++i) {
    p[i] *= factor;
    dot += p[i] * v[i];
  }
  const V half = 0.5 * factor * dot;
  for (int64_t i = k + 1; i < n; ++i) p[i] -= half * v[i];
  for (int64_t i = k + 1; i < n; ++i) {
    V* row = a + i * n;
    const V vi = v[i], wi = p[i];
    for (int64_t j = k + 1; j <= i; ++j) row[j] -= vi * p[j] + wi * v[j];
  }
}

// A = Q T Q^T. On return diagonal and off (off[i] couples i and i + 1) hold T; the reflectors are in the upper
// triangle, v_k in row k, columns k + 1 and on, and their factors in beta.
DSE_INLINE void tridiagonalize(V* a, int64_t n, V* diagonal, V* off, V* beta, V* p) {
  for (int64_t k = 0; k + 2 < n; ++k) {
    V* v = a + k * n;  // row k, right of the diagonal
    V tail = {};
    for (int64_t i = k + 1; i < n; ++i) {
      v[i] = a[i * n + k];
      if (i > k + 1) tail += v[i] * v[i];
    }
    const V head = v[k + 1];
    const V norm = square_root(head * head + tail);
    const Mask reflects = tail > 0.0;
    // The sign that adds, so that nothing cancels.
    const V alpha = head > 0.0 ? -norm : norm;
    const V first = reflects ? head - alpha : broadcast(0.0);
    const V square = first * first + tail;
    const V factor = reflects ? 2.0 / (reflects ? square : broadcast(1.0)) : broadcast(0.0);
    v[k + 1] = first;
    off[k] = reflects ? alpha : head;
    beta[k] = factor;

    reflect(a, n, k, v, factor, p);
  }
  for (int64_t i = 0; i < n; ++i) diagonal[i] = a[i * n + i];
  if (n > 1) off[n - 2] = a[(n - 1) * n + n - 2];
  off[n - 1] = broadcast(0.0);
}

// Eigenvalues of the tridiagonal matrices into d.
DSE_INLINE bool ql_iterate(int64_t n, V* d, V* e) {
  for (int64_t l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      // First decoupled index m >= l of every lane.
      Mask m = {}, coupled = ~m;
      m += l;
      int64_t furthest = l;
      for (; furthest + 1 < n; ++furthest) {
        coupled &= magnitude(e[furthest]) > kEps * (magnitude(d[furthest]) + magnitude(d[furthest + 1]));
        if (!any(coupled)) break;
        m -= coupled;  // true is -1
      }
      if (furthest == l) break;
      if (sweep == kMaxSweeps) return false;
      const Mask active = m > l;
      Mask alive = active;
      V end;
      for (int lane = 0; lane < kLanes; ++lane) end[lane] = d[m[lane]][lane];
      const V el = active ? e[l] : broadcast(1.0);
      V g = (d[l + 1] - d[l]) / (2.0 * el);
      V r = square_root(g * g + 1.0);
      g = end - d[l] + el / (g + (g < 0.0 ? -r : r));
      V s = broadcast(1.0), c = broadcast(1.0), p = {};
      for (int64_t i = furthest - 1; i >= l; --i) {
        Mask now = (m > i) & alive;
        const V f = s * e[i], b = c * e[i];
        r = square_root(f * f + g * g);
        const Mask vanished = now & (r == 0.0);
        if (any(vanished)) {  // underflow: this lane starts its sweep over
          d[i + 1] = vanished ? d[i + 1] - p : d[i + 1];
          for (int lane = 0; lane < kLanes; ++lane) {
            if (!vanished[lane]) continue;
            e[i + 1][lane] = 0.0;
            e[m[lane]][lane] = 0.0;
          }
          alive &= ~vanished;
          now &= ~vanished;
        }
        e[i + 1] = now ? r : e[i + 1];
        const V inverse = 1.0 / (now ? r : broadcast(1.0));
        s = now ? f * inverse : s;
        c = now ? g * inverse : c;
        const V base = d[i + 1] - p;
        const V t = (d[i] - base) * s + 2.0 * c * b;
        p = now ? s * t : p;
        d[i + 1] = now ? base + p : d[i + 1];
        g = now ? c * t - b : g;
      }
      d[l] = alive ? d[l] - p : d[l];
      e[l] = alive ? g : e[l];
      for (int lane = 0; lane < kLanes; ++lane)
        if (alive[lane]) e[m[lane]][lane] = 0.0;
    }
  }
  return true;
}

DSE_MULTIVERSION bool reduce_lanes(int64_t n, V* a, V* diagonal, V* off, V* beta, V* work) {
  tridiagonalize(a, n, diagonal, off, beta, work);
  V* d = work;
  V* e = work + n;
  for (int64_t i = 0; i < n; ++i) {
    d[i] = diagonal[i];
    e[i] = off[i];
  }
  return ql_iterate(n, d, e);
}

DSE_MULTIVERSION bool iterate_lanes(int64_t n, V* d, V* e) { return ql_iterate(n, d, e); }

// What one shift needs: the pivots' inverses and the current row of (T + shift)^-1, from its diagonal on.
struct ShiftLanes {
  V* shift;   // of every shift
  V* weight;  // the same
  V* pivot;   // shifts x n: inverses of the pivots of T + shift
  V* row;     // shifts x n
  V* corner;  // last diagonal entry of every inverse
  int64_t count;
};

// Below the diagonal of a (with it): Q f(T) Q^T, from the last row up. At row k the block below is complete and
// `row` holds row k + 1 of every inverse, both turned by all reflectors from k + 1 on; reflector k turns them,
// then row k is row k + 1 times a ratio of pivots, beside a diagonal entry of its own.
DSE_MULTIVERSION void apply_lanes(int64_t n, V* a, const V* diagonal, const V* off, const V* beta,
                                  const ShiftLanes& shifts, V* p) {
  for (int64_t s = 0; s < shifts.count; ++s) {
    V* inverse = shifts.pivot + s * n;
    inverse[0] = 1.0 / (diagonal[0] + shifts.shift[s]);
    for (int64_t i = 1; i < n; ++i)
      inverse[i] = 1.0 / (diagonal[i] + shifts.shift[s] - off[i - 1] * off[i - 1] * inverse[i - 1]);
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    const V* v = a + k * n;
    const bool reflects = k + 2 < n;
    if (reflects) reflect(a, n, k, v, beta[k], p);
    for (int64_t i = k; i < n; ++i) p[i] = broadcast(0.0);
    for (int64_t s = 0; s < shifts.count; ++s) {
      V* row = shifts.row + s * n;
      const V inverse = shifts.pivot[s * n + k], weight = shifts.weight[s];
      V corner = inverse;
      if (k + 1 < n) {
        const V ratio = -off[k] * inverse;
        corner += ratio * ratio * shifts.corner[s];
        if (reflects) {
          V dot0 = {}, dot1 = {};
          int64_t j = k + 1;
          for (; j + 1 < n; j += 2) {
            dot0 += row[j] * v[j];
            dot1 += row[j + 1] * v[j + 1];
          }
          if (j < n) dot0 += row[j] * v[j];
          const V along = beta[k] * (dot0 + dot1);
          for (j = k + 1; j < n; ++j) {
            row[j] = ratio * (row[j] - along * v[j]);
            p[j] += weight * row[j];
          }
        } else {
          for (int64_t j = k + 1; j < n; ++j) {
            row[j] *= ratio;
            p[j] += weight * row[j];
          }
        }
      }
      shifts.corner[s] = corner;
      row[k] = corner;
      p[k] += weight * corner;
    }
    for (int64_t j = k; j < n; ++j) a[j * n + k] = p[j];
  }
}

// The same for one matrix, without square roots: squares of the couplings e[i] and one chain of divisions (Pal,
// Walker & Kahan; Parlett, "The Symmetric Eigenvalue Problem", 8.15). `e` holds the squares.
bool iterate_one(int64_t n, double* d, double* e) {
  for (int64_t l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      int64_t m = l;
      for (; m + 1 < n; ++m) {
        const double negligible = kEps * (std::abs(d[m]) + std::abs(d[m + 1]));
        if (e[m] <= negligible * negligible) break;
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
        c = p / total;
        s = square / total;
        gamma = c * (d[i] - shift) - s * last;
        d[i + 1] = last + (d[i] - gamma);
        p = c > 0.0 ? gamma * gamma / c : before * square;
      }
      e[l] = s * p;
      d[l] = shift + gamma;
    }
  }
  return true;
}

V* vectors_of(double* data) { return reinterpret_cast<V*>(data); }

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
    for (int64_t i = 0; i + 1 < n[lane]; ++i) e[i * kLanes + lane] = couplings[lane][i];
  }
  if (!iterate_lanes(side, vectors_of(d), vectors_of(e))) return false;
  for (int64_t lane = 0; lane < count; ++lane) sort_values(d, lane, n[lane], 1.0, values[lane]);
  return true;
}

bool TridiagonalLanes::reduce(int64_t count, const double* const* matrices, const int64_t* n, const int64_t* ld,
                              double* const* values) {
  count_ = count;
  side_ = *std::max_element(n, n + count);
  double* a = matrix_.reserve_zeroed(side_ * side_ * kLanes);
  double* vectors = vectors_.reserve(5 * side_ * kLanes);
  const int64_t step = side_ * kLanes;
  for (int64_t lane = 0; lane < count; ++lane) {
    n_[lane] = n[lane];
    double largest = 0.0;
    for (int64_t i = 0; i < n[lane]; ++i) largest = std::max(largest, std::abs(matrices[lane][i * ld[lane] + i]));
    scale_[lane] = unit_scale(largest);
    for (int64_t i = 0; i < n[lane]; ++i)
      for (int64_t j = 0; j <= i; ++j)
        a[(i * side_ + j) * kLanes + lane] = matrices[lane][i * ld[lane] + j] * scale_[lane];
  }
  double* work = vectors + 3 * step;
  if (!reduce_lanes(side_, vectors_of(a), vectors_of(vectors), vectors_of(vectors + step),
                    vectors_of(vectors + 2 * step), vectors_of(work))) {
    return false;
  }
  for (int64_t lane = 0; lane < count; ++lane) sort_values(work, lane, n[lane], scale_[lane], values[lane]);
  return true;
}

void TridiagonalLanes::apply(const ShiftedInverses* const* functions, double* const* out, const int64_t* ld) {
  int64_t most = 0;
  for (int64_t lane = 0; lane < count_; ++lane)
    if (functions[lane] != nullptr) most = std::max(most, functions[lane]->size());
  if (most == 0) return;
  double* shift = shifted_.reserve(most * (2 * side_ + 3) * kLanes);
  double* weight = shift + most * kLanes;
  for (int64_t s = 0; s < most; ++s) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const bool used = lane < count_ && functions[lane] != nullptr && s < functions[lane]->size();
      // (A + s)^-1 = scale (scale A + scale s)^-1. Idle lanes invert T + 1, for nothing.
      const auto at = static_cast<size_t>(s);
      shift[s * kLanes + lane] = used ? functions[lane]->shift[at] * scale_[lane] : 1.0;
      weight[s * kLanes + lane] = used ? functions[lane]->weight[at] * scale_[lane] : 0.0;
    }
  }
  double* corner = weight + most * kLanes;
  double* pivot = corner + most * kLanes;
  const ShiftLanes shifts{vectors_of(shift),  vectors_of(weight),
                          vectors_of(pivot),  vectors_of(pivot + most * side_ * kLanes),
                          vectors_of(corner), most};
  double* vectors = vectors_.data();
  const int64_t step = side_ * kLanes;
  double* a = matrix_.data();
  apply_lanes(side_, vectors_of(a), vectors_of(vectors), vectors_of(vectors + step),
              vectors_of(vectors + 2 * step), shifts, vectors_of(vectors + 3 * step));
  for (int64_t lane = 0; lane < count_; ++lane) {
    if (functions[lane] == nullptr) continue;
    for (int64_t i = 0; i < n_[lane]; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const double value = a[(i * side_ + j) * kLanes + lane];
        out[lane][i * ld[lane] + j] = value;
        out[lane][j * ld[lane] + i] = value;
      }
    }
  }
}

}  // namespace dse::cpu
