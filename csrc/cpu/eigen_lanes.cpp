// Householder tridiagonalization and implicit QL iterations (Golub & Van Loan, ch. 8), with every scalar a vector
// of eight: lane l belongs to matrix l. A matrix of side 65 has too little work in a row or column to fill a
// vector unit, and its QL iterations are a chain of square roots and divisions; eight matrices side by side fill
// the unit at every step, the chain included. Smaller matrices are padded with zero rows, which stay decoupled.

#include "cpu/eigen_lanes.h"

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

typedef double V __attribute__((vector_size(64)));
typedef long long Mask __attribute__((vector_size(64)));
static_assert(sizeof(V) == kEigenLanes * sizeof(double));

#define DSE_INLINE inline __attribute__((always_inline))

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kMaxSweeps = 80;

DSE_INLINE V broadcast(double x) { return V{} + x; }
DSE_INLINE V magnitude(V x) { return x < 0.0 ? -x : x; }
DSE_INLINE V square_root(V x) {
  V r;
  for (int lane = 0; lane < kEigenLanes; ++lane) r[lane] = __builtin_sqrt(x[lane]);
  return r;
}
DSE_INLINE bool any(Mask m) {
  long long bits = 0;
  for (int lane = 0; lane < kEigenLanes; ++lane) bits |= m[lane];
  return bits != 0;
}

// z holds row i, column j at z[panel_at(n, i, j)]: panels of kPanel columns, whose rows are next to each other,
// so that one panel stays in the first cache while many rotations pass over it.
constexpr int64_t kPanel = 4;
DSE_INLINE int64_t panel_at(int64_t n, int64_t i, int64_t j) {
  return (j / kPanel * n + i) * kPanel + j % kPanel;
}
int64_t panel_cells(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel * n; }

// Rotations are applied to z several sweeps at a time.
constexpr int64_t kDelayedSweeps = 8;
struct Sweep {
  int64_t first, last;
};

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
  const int64_t columns = (n + kPanel - 1) / kPanel * kPanel;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < columns; ++j) z[panel_at(n, i, j)] = broadcast(i == j ? 1.0 : 0.0);
  for (int64_t k = n - 3; k >= 0; --k) {
    const V* v = a + k * n;
    const V factor = beta[k];
    for (int64_t i = k + 1; i < n; ++i) {
      V sum0 = {}, sum1 = {};
      int64_t j = k + 1;
      for (; j % kPanel != 0 && j < n; ++j) sum0 += z[panel_at(n, i, j)] * v[j];
      const int64_t whole = j;
      for (; j + kPanel <= n; j += kPanel) {
        const V* row = z + panel_at(n, i, j);
        sum0 += row[0] * v[j];
        sum1 += row[1] * v[j + 1];
        sum0 += row[2] * v[j + 2];
        sum1 += row[3] * v[j + 3];
      }
      for (; j < n; ++j) sum0 += z[panel_at(n, i, j)] * v[j];
      const V scale = factor * (sum0 + sum1);
      for (j = k + 1; j < whole; ++j) z[panel_at(n, i, j)] -= scale * v[j];
      for (; j + kPanel <= n; j += kPanel) {
        V* row = z + panel_at(n, i, j);
        for (int64_t u = 0; u < kPanel; ++u) row[u] -= scale * v[j + u];
      }
      for (; j < n; ++j) z[panel_at(n, i, j)] -= scale * v[j];
    }
  }
}

// Applies the rotations i = last, last - 1, ..., first of every sweep to rows i and i + 1 of z. A column's
// running element stays in a register from one rotation to the next.
DSE_INLINE void rotate_rows(V* z, int64_t n, const Sweep* sweeps, int64_t count, const V* cosine, const V* sine) {
  for (int64_t k = 0; k < n; k += kPanel) {
    V* panel = z + k * n;
    for (int64_t s = 0; s < count; ++s) {
      const V* c = cosine + s * n;
      const V* w = sine + s * n;
      const int64_t first = sweeps[s].first, last = sweeps[s].last;
      V carry[kPanel];
      for (int64_t u = 0; u < kPanel; ++u) carry[u] = panel[(last + 1) * kPanel + u];
      for (int64_t i = last; i >= first; --i) {
        const V ci = c[i], si = w[i];
        for (int64_t u = 0; u < kPanel; ++u) {
          const V low = panel[i * kPanel + u];
          panel[(i + 1) * kPanel + u] = si * low + ci * carry[u];
          carry[u] = ci * low - si * carry[u];
        }
      }
      for (int64_t u = 0; u < kPanel; ++u) panel[first * kPanel + u] = carry[u];
    }
  }
}

// Eigenvalues of the tridiagonal matrices into d; rows of z (if any) become eigenvectors.
DSE_INLINE bool ql_iterate(int64_t n, V* d, V* e, V* z, V* cosines, V* sines) {
  Sweep sweeps[kDelayedSweeps];
  int64_t delayed = 0;
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
      for (int lane = 0; lane < kEigenLanes; ++lane) end[lane] = d[m[lane]][lane];
      V* cosine = cosines + delayed * n;
      V* sine = sines + delayed * n;
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
          for (int lane = 0; lane < kEigenLanes; ++lane) {
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
      for (int lane = 0; lane < kEigenLanes; ++lane)
        if (alive[lane]) e[m[lane]][lane] = 0.0;
      if (z == nullptr) continue;
      sweeps[delayed++] = {l, furthest - 1};
      if (delayed < kDelayedSweeps) continue;
      rotate_rows(z, n, sweeps, delayed, cosines, sines);
      delayed = 0;
    }
  }
  if (z != nullptr) rotate_rows(z, n, sweeps, delayed, cosines, sines);
  return true;
}

DSE_MULTIVERSION bool decompose(int64_t n, V* a, V* z, V* work) {
  V* diagonal = work;
  V* off = diagonal + n;
  V* beta = off + n;
  V* p = beta + n;
  V* cosine = p + n;
  V* sine = cosine + kDelayedSweeps * n;
  tridiagonalize(a, n, diagonal, off, beta, p);
  if (z != nullptr) form_rows(a, n, beta, z);
  return ql_iterate(n, diagonal, off, z, cosine, sine);
}

}  // namespace

bool symmetric_eigen_lanes(int64_t count, const double* const* matrices, const int64_t* n, const int64_t* ld,
                           double* const* values, double* const* vectors, EigenLanesWorkspace& ws) {
  const int64_t side = *std::max_element(n, n + count);
  double* a = ws.matrix.reserve_zeroed(side * side * kEigenLanes);
  double* z = vectors != nullptr ? ws.rows.reserve(panel_cells(side) * kEigenLanes) : nullptr;
  double* work = ws.vectors.reserve((4 + 2 * kDelayedSweeps) * side * kEigenLanes);
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
        vectors[lane][i * n[lane] + j] = z[panel_at(side, from, j) * kEigenLanes + lane];
    }
  }
  return true;
}

}  // namespace dse::cpu
