// Gram matrices and triangular factors of matrices that are not held in memory, block of rows by block of rows;
// all threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/gather.h"
#include "cpu/products.h"

namespace dse::cpu {

// Columns of one task of a Gram matrix, a multiple of kGramPanel and kNarrowPanel.
inline constexpr int64_t kGramTile = 96;

// Leading dimension of a Gram matrix, for panels of either width.
inline int64_t stream_ld(int64_t m) { return narrow_ld(m); }

// Rows summed by one task of a reduction over n rows: fixed by n alone, so that the order of additions does not
// depend on the number of threads, and bounded in number, so that partial sums stay small.
inline int64_t reduction_rows(int64_t n) { return std::max<int64_t>(64, (n + 255) / 256); }

// Means of the columns of a non-empty set; exact where all rows are equal.
void column_means(const RowSet& set, double* mean);

// Gram matrix of the columns of a set of n > d rows, upper triangle; P is the type of the products. Returns the
// rows' root mean square norm before centring.
template <typename P>
double column_gram(const RowSet& set, double* gram);

// The same in 16-bit products (short_products.h), not of centred rows. What lies below the diagonal's tiles is
// not set. `rounding` receives the root mean square of what the entries of the rows were rounded by.
double short_column_gram(const RowSet& set, double* gram, double* rounding);

// Rows of which column_gram sums products before it adds them to the Gram matrix's float64 sums: fewer where
// there are few rows and small eigenvalues are near zero.
inline constexpr int64_t kLeastSummedRows = 40;
inline int64_t summed_rows(int64_t n, int64_t d) { return n < 4 * d ? kLeastSummedRows : 2 * kLeastSummedRows; }

// Error of the Gram matrix of float32 products, in units of its trace.
inline double narrow_products(int64_t n, int64_t d) {
  return 2e-9 * std::sqrt(static_cast<double>(summed_rows(n, d)) / (2.0 * kLeastSummedRows) *
                          std::min(1.0, 1600.0 / static_cast<double>(n)));
}

// Gram matrix of the rows of a set of n <= d rows, upper triangle.
double row_gram(const RowSet& set, double* gram);

// Gram matrix (count x count, leading dimension ld) of the rows' coordinates in `basis` (count x d).
void projected_gram(const RowSet& set, const double* basis, int64_t count, double* gram, int64_t ld);

// Triangular factor of a matrix with n > d rows: QR of [R; next block] (a sequential tall-skinny QR, Demmel et
// al. 2012), so that never more than a few blocks are in memory.
void streamed_triangle(const RowSet& set, double* r);

}  // namespace dse::cpu
