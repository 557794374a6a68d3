// Small steps of dense linear algebra that several files need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/turn.h"

namespace dse::cpu {

// Power of four, for exact square roots, that brings `largest` near 1 where it is not: squares neither overflow
// nor vanish.
inline double unit_scale(double largest) {
  if (!(largest > 0.0) || (largest > 1e-5 && largest < 1e5)) return 1.0;
  const double scale = std::exp2(-2.0 * std::floor(0.5 * std::log2(largest)));
  return std::isfinite(scale) ? scale : 1.0;
}

// Sums of squares that are zero beside a matrix brought near 1: a reflector of less would overflow.
template <typename T>
constexpr T kLeastSquare = sizeof(T) == 8 ? T(1e-280) : T(1e-30);

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
  for_each_own_task(tiles * (tiles + 1) / 2, work, [&](int64_t task, int64_t) {
    int64_t row = 0;
    while (task >= tiles - row) task -= tiles - row++;
    const int64_t i = first + row * step, j = first + (row + task) * step;
    tile(i, std::min(n, i + step), j, std::min(n, j + step));
  });
}

// Rows or columns that are all zero (dead features, masked tokens) each hide one zero eigenvalue.
template <typename P>
int64_t count_null(const P* gram, int64_t m, int64_t ld, bool centered_rows) {
  int64_t count = centered_rows ? 1 : 0;
  for (int64_t i = 0; i < m; ++i) count += gram[i * ld + i] == P(0) ? 1 : 0;
  return std::min(count, m);
}

// turned (cols x ldt) = matrix^T, zero tails; ldt is a multiple of eight.
template <typename P>
void transpose(const P* matrix, int64_t rows, int64_t cols, int64_t ld, P* turned, int64_t ldt) {
  turn(matrix, ld, rows, cols, turned, ldt);
  const int64_t filled = (rows + 7) / 8 * 8;
  for (int64_t f = 0; f < cols && filled < ldt; ++f)
    std::fill(turned + f * ldt + filled, turned + (f + 1) * ldt, P(0));
}

// dst (rows x cols) = unit * src.
template <typename P, typename T>
void store_matrix(const P* src, int64_t rows, int64_t cols, int64_t ld, T* dst, double unit = 1.0) {
  for (int64_t i = 0; i < rows; ++i) store_scaled(src + i * ld, unit, cols, dst + i * cols);
}

// dst = unit * the upper triangle of a symmetric matrix, row by row: m (m + 1) / 2 elements.
template <typename P, typename T>
void store_triangle(const P* src, int64_t m, int64_t ld, T* dst, double unit = 1.0) {
  for (int64_t i = 0; i < m; dst += m - i++) store_scaled(src + i * ld + i, unit, m - i, dst);
}

// The symmetric matrix (m x m) that store_triangle() has stored.
template <typename T>
void load_triangle(const T* src, int64_t m, T* matrix) {
  for (int64_t i = 0; i < m; src += m - i++) std::copy_n(src, m - i, matrix + i * m + i);
  mirror(matrix, m, 0, m, m);
}

// Whether products with a positive semidefinite matrix, and with features that it belongs to, stay in the range
// of float32.
inline bool fits_float32(const double* matrix, int64_t side) {
  double largest = 0.0;
  for (int64_t i = 0; i < side; ++i) largest = std::max(largest, std::abs(matrix[i * side + i]));
  return largest < 0x1p100 && largest > 0x1p-100;
}

// (I - 1 1^T / m) F (I - 1 1^T / m) of a symmetric matrix.
template <typename P>
void centre_both_ways(P* f, int64_t m, int64_t ld) {
  std::vector<double> mean(static_cast<size_t>(m));
  double total = 0.0;
  // Of the columns, which are those of the rows, and no chain of additions.
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < m; ++j) mean[static_cast<size_t>(j)] += static_cast<double>(f[i * ld + j]);
  for (double& own : mean) {
    total += own;
    own /= static_cast<double>(m);
  }
  total /= static_cast<double>(m * m);
  for (int64_t i = 0; i < m; ++i) {
    const double own = mean[static_cast<size_t>(i)] - total;
    for (int64_t j = 0; j < m; ++j) f[i * ld + j] -= static_cast<P>(own + mean[static_cast<size_t>(j)]);
  }
}

}  // namespace dse::cpu
