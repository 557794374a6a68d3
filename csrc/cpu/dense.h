// Small steps of dense linear algebra that several files need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dse::cpu {

// Power of four, for exact square roots, that brings `largest` near 1: squares neither overflow nor vanish.
inline double unit_scale(double largest) {
  if (!(largest > 0.0)) return 1.0;
  const double scale = std::exp2(-2.0 * std::floor(0.5 * std::log2(largest)));
  return std::isfinite(scale) ? scale : 1.0;
}

// Makes row r of `rows` (n elements each) orthogonal to those before it, and its norm 1. Twice is enough (Kahan &
// Parlett).
inline void orthonormalize_row(double* rows, int64_t r, int64_t n) {
  double* own = rows + r * n;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t q = 0; q < r; ++q) axpy(-dot(rows + q * n, own, n), rows + q * n, own, n);
    const double norm = std::sqrt(sum_of_squares(own, n));
    if (!(norm > 0.0)) continue;
    for (int64_t i = 0; i < n; ++i) own[i] /= norm;
  }
}

// products[r] = F v_r for a symmetric matrix F (m x m, leading dimension ld) and the rows v_r of V (count x m).
inline void multiply_rows(const double* f, int64_t m, int64_t ld, int64_t count, const double* v,
                          double* products) {
  for_each_task(m, count * m * m, [&](int64_t i, int64_t) {
    for (int64_t r = 0; r < count; ++r) products[r * m + i] = dot(f + i * ld, v + r * m, m);
  });
}

// F -= V^T W + W^T V, both with `count` rows.
inline void subtract_both_ways(double* f, int64_t m, int64_t ld, int64_t count, const double* v,
                               const double* w) {
  for_each_task(m, 2 * count * m * m, [&](int64_t i, int64_t) {
    for (int64_t r = 0; r < count; ++r) {
      axpy(-v[r * m + i], w + r * m, f + i * ld, m);
      axpy(-w[r * m + i], v + r * m, f + i * ld, m);
    }
  });
}

// Calls tile(i0, i1, j0, j1) for every tile of side `step` of the upper triangle of rows and columns first .. n,
// in parallel.
template <typename Tile>
void for_each_upper_tile(int64_t first, int64_t n, int64_t step, int64_t work, const Tile& tile) {
  const int64_t tiles = (n - first + step - 1) / step;
  for_each_task(tiles * (tiles + 1) / 2, work, [&](int64_t task, int64_t) {
    int64_t row = 0;
    while (task >= tiles - row) task -= tiles - row++;
    const int64_t i = first + row * step, j = first + (row + task) * step;
    tile(i, std::min(n, i + step), j, std::min(n, j + step));
  });
}

}  // namespace dse::cpu
