// Products of matrices in 16-bit integers, where the processor multiplies those twice as fast as float32
// (AVX-512's VNNI), or faster still (AMX).
//
// A vector is divided by a step of its own and rounded. The step is the smallest with which no inner product of
// runs of kShortRun neighbours of two vectors leaves 32 bits, whatever their signs (Cauchy and Schwarz): integer
// sums are then exact, and all that is lost is a rounding of the operands, of about 5e-5 of a vector's root mean
// square. That is a backward error, as small beside small singular values as beside large ones.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dse::cpu {

// Whether 16-bit products are faster here than float32 ones. The environment variable DSE_EXT_INT16 says `never`
// or `always` instead; the latter is slow where the processor has no instruction for them. `vectors` and
// `tiles`: always, and in these.
bool uses_short_products();
// In AMX's tiles: where the processor has them and the system gives them, or by wish.
bool uses_tiles();

// Two neighbours in the direction that is summed over, each an int16; as encode() has it (short_steps.kernels.h),
// and for nobody but the products.
using ShortPair = int32_t;

// Columns of a panel: what a tile reads of its right operand is contiguous.
inline constexpr int64_t kShortPanel = 48;
inline constexpr int64_t kShortRun = 32;
// Pairs that are read behind the last panel, whatever they are: who keeps panels has room for them.
inline constexpr int64_t kShortSlack = 16 * kShortPanel;
// Root mean square rounding of the entries of both operands together, relative to themselves.
inline constexpr double kShortRounding = 7e-5;
// What a gradient may lose to each of two such roundings, of the second moment's rows and of the product's
// operands.
inline constexpr double kShortLoss = 4.5e-4;

// panel = `width` columns of `rows` rows of `values`, filled up with zeros to kShortPanel.
void copy_panel(const float* values, int64_t ld, int64_t rows, int64_t width, float* panel);

// A panel of kShortPanel columns of `rows` numbers (row-major): out[r * kShortPanel + j] has rows 2 r and 2 r + 1
// of column j, which is its integers times step[j]. Of an odd number of rows the last one's partner is zero.
void quantize_columns(const float* panel, int64_t rows, ShortPair* out, float* step);

// About the rows of what quantize_columns() is called with where rows are taken in parts, whose steps are their
// own: of one panel they fit the smallest cache.
inline constexpr int64_t kShortRows = 192;

// C[i, j] += step[i] step[j] sum_r <a[r, i], b[r, j]> over the first `pairs` of such panels, which lie `height`
// pairs apart, with kShortSlack behind the last one: panel_gram_upper() of products.h. Panels and steps are there
// for whole panels; i0 and j0 are multiples of 16.
void short_gram_upper(const ShortPair* panels, int64_t height, int64_t pairs, const float* step, double* c,
                      int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1);

// What is left of rows (n x d): of each as one vector, or of columns in parts of kShortRows rows.
void round_as_short(float* rows, int64_t n, int64_t d, bool by_rows);

// A matrix (depth x columns) whose columns are vectors, in panels.
class ShortMatrix {
 public:
  void reserve(int64_t depth, int64_t columns, int64_t panel);
  int64_t columns() const { return columns_; }
  int64_t panel() const { return panel_; }  // columns of one
  int64_t pairs() const { return (depth_ + 1) / 2; }

  // Sets columns first, ..., first + count - 1 of one panel; the elements of each are a row of `values` (leading
  // dimension ld).
  void set_columns(int64_t first, int64_t count, const float* values, int64_t ld);
  // Sets the panel (of kShortPanel columns) from column `first` on, of which row r of `values` has the r-th
  // elements.
  void set_panel(int64_t first, const float* values, int64_t ld);
  // Zeroes columns, by which the last panel is wider than the matrix.
  void clear_columns(int64_t first, int64_t count);

  // From a column on, a pair every panel() elements.
  const ShortPair* data(int64_t first) const { return data_.data() + offset(first); }
  const float* step() const { return step_.data(); }

 private:
  int64_t offset(int64_t first) const { return first / panel_ * panel_ * pairs() + first % panel_; }
  ShortPair* at(int64_t first) { return data_.data() + offset(first); }

  Buffer<ShortPair> data_;
  Buffer<float> step_, rows_;
  int64_t depth_ = 0, columns_ = 0, panel_ = 1;
};

// out[i][j] += alpha * (A^T B)[i, j] for i < m, j < padded(B.columns()); A in one panel, B in panels of
// kShortPanel.
void accumulate_product(const ShortMatrix& a, int64_t m, const ShortMatrix& b, float alpha, float* const* out);

}  // namespace dse::cpu
