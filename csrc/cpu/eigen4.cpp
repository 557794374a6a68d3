// Householder tridiagonalization and implicit QL iterations (Golub & Van Loan, ch. 8), with every scalar a vector
// of four: lane l belongs to matrix l. A matrix of side 65 has too little work in a row or column to fill a
// vector unit, and its QL iterations are a chain of square roots and divisions; four matrices side by side fill
// the unit at every step, the chain included. Smaller matrices are padded with zero rows, which stay decoupled.

#include "cpu/eigen4.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/simd.h"

// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace dse::cpu {
namespace {

typedef double V __attribute__((vector_size(32)));
typedef long long Mask __attribute__((vector_size(32)));

#define DSE_INLINE inline __attribute__((always_inline))

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kMaxSweeps = 80;

DSE_INLINE V broadcast(double x) { return V{x, x, x, x}; }
DSE_INLINE V square_root(V x) {
  V r;
  for (int lane = 0; lane < 4; ++lane) r[lane] = __builtin_sqrt(x[lane]);
  return r;
}
DSE_INLINE bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }

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
  for (int64_t i = 0; i < n; ++i) diagonal[i] = a[i * n + i];
  if (n > 1) off[n - 2] = a[(n - 1) * n + n - 2];
  off[n - 1] = broadcast(0.0);
}

// z = Q^T from the reflectors.
DSE_INLINE void form_rows(const V* a, int64_t n, const V* beta, V* z) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) z[i * n + j] = broadcast(i == j ? 1.0 : 0.0);
  for (int64_t k = n - 3; k >= 0; --k) {
    const V* v = a + k * n;
    const V factor = beta[k];
    for (int64_t i = k + 1; i < n; ++i) {
      V* row = z + i * n;
      V sum0 = {}, sum1 = {};
      int64_t j = k + 1;
      for (; j + 1 < n; j += 2) {
        sum0 += row[j] * v[j];
        sum1 += row[j + 1] * v[j + 1];
      }
      for (; j < n; ++j) sum0 += row[j] * v[j];
      const V scale = factor * (sum0 + sum1);
      for (j = k + 1; j < n; ++j) row[j] -= scale * v[j];
    }
  }
}

// Applies the rotations i = last, last - 1, ..., first to rows i and i + 1 of z. A column's running element stays
// in a register from one rotation to the next.
DSE_INLINE void rotate_rows(V* z, int64_t n, int64_t first, int64_t last, const V* cosine, const V* sine) {
  constexpr int64_t kColumns = 4;
  int64_t k = 0;
  for (; k + kColumns <= n; k += kColumns) {
    V carry[kColumns];
    for (int64_t u = 0; u < kColumns; ++u) carry[u] = z[(last + 1) * n + k + u];
    for (int64_t i = last; i >= first; --i) {
      const V c = cosine[i], s = sine[i];
      for (int64_t u = 0; u < kColumns; ++u) {
        const V low = z[i * n + k + u];
        z[(i + 1) * n + k + u] = s * low + c * carry[u];
        carry[u] = c * low - s * carry[u];
      }
    }
    for (int64_t u = 0; u < kColumns; ++u) z[first * n + k + u] = carry[u];
  }
  for (; k < n; ++k) {
    V carry = z[(last + 1) * n + k];
    for (int64_t i = last; i >= first; --i) {
      const V low = z[i * n + k];
      z[(i + 1) * n + k] = sine[i] * low + cosine[i] * carry;
      carry = cosine[i] * low - sine[i] * carry;
    }
    z[first * n + k] = carry;
  }
}

// Eigenvalues of the tridiagonal matrices into d; rows of z (if any) become eigenvectors.
DSE_INLINE bool ql_iterate(int64_t n, V* d, V* e, V* z, V* cosine, V* sine) {
  for (int64_t l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      // First decoupled index m >= l of every lane.
      int64_t m[4], furthest = l;
      for (int lane = 0; lane < 4; ++lane) {
        int64_t at = l;
        while (at + 1 < n && std::abs(e[at][lane]) > kEps * (std::abs(d[at][lane]) + std::abs(d[at + 1][lane])))
          ++at;
        m[lane] = at;
        furthest = std::max(furthest, at);
      }
      if (furthest == l) break;
      if (sweep == kMaxSweeps) return false;
      Mask active, alive;
      V end;
      for (int lane = 0; lane < 4; ++lane) {
        active[lane] = m[lane] > l ? -1 : 0;
        end[lane] = d[m[lane]][lane];
      }
      alive = active;
      const V el = active ? e[l] : broadcast(1.0);
      V g = (d[l + 1] - d[l]) / (2.0 * el);
      V r = square_root(g * g + 1.0);
      g = end - d[l] + el / (g + (g < 0.0 ? -r : r));
      V s = broadcast(1.0), c = broadcast(1.0), p = {};
      for (int64_t i = furthest - 1; i >= l; --i) {
        Mask now;
        for (int lane = 0; lane < 4; ++lane) now[lane] = i < m[lane] ? -1 : 0;
        now &= alive;
        const V f = s * e[i], b = c * e[i];
        r = square_root(f * f + g * g);
        const Mask vanished = now & (r == 0.0);
        if (any(vanished)) {  // underflow: this lane starts its sweep over
          d[i + 1] = vanished ? d[i + 1] - p : d[i + 1];
          for (int lane = 0; lane < 4; ++lane) {
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
        cosine[i] = now ? c : broadcast(1.0);
        sine[i] = now ? s : broadcast(0.0);
        const V base = d[i + 1] - p;
        const V t = (d[i] - base) * s + 2.0 * c * b;
        p = now ? s * t : p;
        d[i + 1] = now ? base + p : d[i + 1];
        g = now ? c * t - b : g;
      }
      d[l] = alive ? d[l] - p : d[l];
      e[l] = alive ? g : e[l];
      for (int lane = 0; lane < 4; ++lane)
        if (alive[lane]) e[m[lane]][lane] = 0.0;
      if (z != nullptr) rotate_rows(z, n, l, furthest - 1, cosine, sine);
    }
  }
  return true;
}

DSE_MULTIVERSION bool decompose(int64_t n, V* a, V* z, V* work) {
  V* diagonal = work;
  V* off = diagonal + n;
  V* beta = off + n;
  V* p = beta + n;
  V* cosine = p + n;
  V* sine = cosine + n;
  tridiagonalize(a, n, diagonal, off, beta, p);
  if (z != nullptr) form_rows(a, n, beta, z);
  return ql_iterate(n, diagonal, off, z, cosine, sine);
}

}  // namespace

bool symmetric_eigen4(int64_t count, const double* const* matrices, const int64_t* n, const int64_t* ld,
                      double* const* values, double* const* vectors, Eigen4Workspace& ws) {
  const int64_t side = *std::max_element(n, n + count);
  const int64_t cells = side * side * kEigenLanes;
  double* a = ws.matrix.reserve_zeroed(cells);
  double* z = vectors != nullptr ? ws.rows.reserve(cells) : nullptr;
  double* work = ws.vectors.reserve(6 * side * kEigenLanes);
  double scale[kEigenLanes];
  for (int64_t lane = 0; lane < count; ++lane) {
    // Powers of two bring the entries near 1: squares neither overflow nor vanish.
    double largest = 0.0;
    for (int64_t i = 0; i < n[lane]; ++i) largest = std::max(largest, std::abs(matrices[lane][i * ld[lane] + i]));
    scale[lane] = largest > 0.0 ? std::exp2(-std::floor(std::log2(largest))) : 1.0;
    if (!std::isfinite(scale[lane])) scale[lane] = 1.0;
    for (int64_t i = 0; i < n[lane]; ++i)
      for (int64_t j = 0; j <= i; ++j)
        a[(i * side + j) * kEigenLanes + lane] = matrices[lane][i * ld[lane] + j] * scale[lane];
  }
  if (!decompose(side, reinterpret_cast<V*>(a), reinterpret_cast<V*>(z), reinterpret_cast<V*>(work)))
    return false;

  std::vector<int64_t> order;
  for (int64_t lane = 0; lane < count; ++lane) {
    const auto value = [&](int64_t i) { return work[i * kEigenLanes + lane]; };
    // The padding is decoupled from the start and keeps its places, behind the matrix's own.
    order.resize(static_cast<size_t>(n[lane]));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return value(x) < value(y); });
    for (int64_t i = 0; i < n[lane]; ++i) {
      const int64_t from = order[static_cast<size_t>(i)];
      values[lane][i] = value(from) / scale[lane];
      if (vectors == nullptr) continue;
      for (int64_t j = 0; j < n[lane]; ++j)
        vectors[lane][i * n[lane] + j] = z[(from * side + j) * kEigenLanes + lane];
    }
  }
  return true;
}

}  // namespace dse::cpu
