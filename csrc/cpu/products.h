// Products of dense blocks, the inner kernels of everything that costs more than a pass over the features. Each
// is compiled for AVX-512, for AVX2 with FMA and for the baseline, with tiles that fill each one's registers;
// which one runs is decided once, by the processor. All three add in the same order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dse::cpu {

// out[i * ldo + c] = <a_i, b_c> for i < m, c < k; rows of ld elements, ld a multiple of kRowPad, tails zero.
void row_dots(const float* a, int64_t m, const float* b, int64_t k, int64_t ld, float* out, int64_t ldo);
void row_dots(const double* a, int64_t m, const double* b, int64_t k, int64_t ld, double* out, int64_t ldo);

// out[i] = ||a - b_r||^2 for the rows r = rows[0], ..., rows[count - 1] of b, or the first `count` where `rows`
// is null; ld as above. The value of a pair does not depend on the others.
void squared_distances(const float* a, const float* b, int64_t ld, const int64_t* rows, int64_t count,
                       float* out);
void squared_distances(const double* a, const double* b, int64_t ld, const int64_t* rows, int64_t count,
                       double* out);

// Leading dimension of the operands and the result of tn_product_upper: whole tiles of kGramPanel columns.
inline constexpr int64_t kGramPanel = 24;
inline int64_t gram_ld(int64_t n) { return (n + kGramPanel - 1) / kGramPanel * kGramPanel; }

// C[i, j] += sum_r a[r, i] * b[r, j] for i in [i0, i1), j in [j0, j1), at least where j >= i and within the
// diagonal blocks of eight (tiles wholly below are left out). i0 and j0 are multiples of kGramPanel; ldb and ldc
// at least gram_ld(columns).
void tn_product_upper(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, float* c,
                      int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1);
void tn_product_upper(const double* a, int64_t lda, const double* b, int64_t ldb, int64_t rows, double* c,
                      int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1);

// The same for C += X^T X with X (rows x columns) in panels of kGramPanel columns: element (r, j) is
// panels[(j / kGramPanel) * rows * kGramPanel + r * kGramPanel + j % kGramPanel]. Every operand of a tile is
// contiguous, whatever the row length.
void panel_gram_upper(const double* panels, int64_t rows, double* c, int64_t ldc, int64_t i0, int64_t i1,
                      int64_t j0, int64_t j1);

// The same with float32 products, of which `rows` are summed in float32 before they are added to C. Panels of
// kNarrowPanel columns; ldc at least narrow_ld(columns).
inline constexpr int64_t kNarrowPanel = 48;
inline int64_t narrow_ld(int64_t n) { return (n + kNarrowPanel - 1) / kNarrowPanel * kNarrowPanel; }
void panel_gram_upper(const float* panels, int64_t rows, double* c, int64_t ldc, int64_t i0, int64_t i1,
                      int64_t j0, int64_t j1);

// out[i][j] += alpha * sum_r a[r * lda + i] * b[r * ldb + j] for i < m, j < n; n a multiple of eight.
void tn_accumulate(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float alpha,
                   float* const* out, int64_t m, int64_t n);
void tn_accumulate(const double* a, int64_t lda, const double* b, int64_t ldb, int64_t depth, double alpha,
                   double* const* out, int64_t m, int64_t n);

// out[i * ldo + j] += sum_r a[i * lda + r] * b[r * ldb + j] for i < m, j < n; n a multiple of eight. For few rows
// or few columns: nothing is copied to be contiguous.
void nn_accumulate(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* out,
                   int64_t ldo, int64_t m, int64_t n);
void nn_accumulate(const double* a, int64_t lda, const double* b, int64_t ldb, int64_t depth, double* out,
                   int64_t ldo, int64_t m, int64_t n);

// The right operand of accumulate_product: rows x cols in panels of kPanel columns, so that what one tile reads
// is contiguous. Columns are padded with zeros to a multiple of kRowPad.
template <typename T>
class PanelMatrix {
 public:
  static constexpr int64_t kPanel = 48;

  void reserve(int64_t rows, int64_t cols) {
    rows_ = rows;
    cols_ = cols;
    data_.reserve(rows * padded(cols));
  }
  bool empty() const { return data_.data() == nullptr; }
  int64_t rows() const { return rows_; }
  int64_t width() const { return padded(cols_); }
  int64_t panel_width(int64_t first) const { return std::min(kPanel, width() - first); }
  const T* panel(int64_t first) const { return data_.data() + first * rows_; }

  template <typename S>
  void set_row(int64_t r, const S* src) {
    for (int64_t first = 0; first < width(); first += kPanel) {
      const int64_t columns = panel_width(first), used = std::min(columns, cols_ - first);
      T* dst = data_.data() + first * rows_ + r * columns;
      for (int64_t j = 0; j < used; ++j) dst[j] = static_cast<T>(src[first + j]);
      for (int64_t j = used; j < columns; ++j) dst[j] = T(0);
    }
  }

 private:
  Buffer<T> data_;
  int64_t rows_ = 0, cols_ = 0;
};

// out[i][j] += alpha * (A^T B)[i, j]: A is B.rows() x m with leading dimension lda, out[i] has B.width()
// elements.
template <typename T>
void accumulate_product(const T* a, int64_t lda, int64_t m, const PanelMatrix<T>& b, T alpha, T* const* out) {
  constexpr int64_t kMost = 96;
  // What all rows of a block meet of a panel stays in the smallest cache, beside a few columns of A.
  constexpr int64_t kDepth = 96 * sizeof(float) / sizeof(T);
  T* shifted[kMost];
  for (int64_t i0 = 0; i0 < m; i0 += kMost) {
    const int64_t count = std::min(kMost, m - i0);
    for (int64_t first = 0; first < b.width(); first += PanelMatrix<T>::kPanel) {
      for (int64_t i = 0; i < count; ++i) shifted[i] = out[i0 + i] + first;
      const int64_t columns = b.panel_width(first);
      for (int64_t r = 0; r < b.rows(); r += kDepth) {
        tn_accumulate(a + r * lda + i0, lda, b.panel(first) + r * columns, columns,
                      std::min(kDepth, b.rows() - r), alpha, shifted, count, columns);
      }
    }
  }
}

}  // namespace dse::cpu
