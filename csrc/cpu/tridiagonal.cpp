// Blocked Householder reduction (Dongarra, Sorensen & Hammarling 1989) and its way back.
//
// The reduction takes kBlock columns at a time: half of its operations are products of the trailing matrix with
// one vector, which read it once each and are bound by the cache; the other half is one symmetric update a block.
//
// The way back, Q f(T) Q^T, has no product with a vector. Block by block from the last, it turns what is complete
// below by the block's reflectors, Q_b = I - V S V^T: F - V W^T - W V^T with W = F V S^T - V (S V^T F V S^T) / 2.
// f(T) is a sum of inverses of shifted tridiagonal matrices, T + s = L D L^T, whose row i is -off[i] / D[i] times
// row i + 1, to the right of the diagonal. So rows of a block above what is complete are small multiples of one
// turned row for each shift: they are a product too, and Q never meets a whole matrix.
//
// Rounding. The reduction of a trailing matrix in float32 has errors of a few 2^-24 of that matrix's norm. The
// columns that were reduced before are a Lanczos process in disguise: after a block or two of them the dominant
// eigenvalues have left the trailing matrix.

#include "cpu/tridiagonal.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/rng.h"
#include "cpu/dense.h"
#include "cpu/processor.h"
#include "cpu/vectors.h"

#define DSE_KERNELS "cpu/tridiagonal.kernels.h"
#include "cpu/every_isa.h"

namespace dse::cpu {
namespace {

// A multiple of kGramPanel: updates start at whole tiles.
constexpr int64_t kBlock = kGramPanel;
constexpr int64_t kTile = 96;

int64_t down(int64_t i) { return i / 8 * 8; }

template <typename T>
void symmetric_product(const T* a, int64_t ld, int64_t first, int64_t n, const T* v, T* y) {
  DSE_CALL_BY_ISA(symmetric_product, a, ld, first, n, v, y);
}
template <typename T>
void subtract_pairs(int64_t count, const T* left, const T* b, const T* right, const T* c, int64_t ld,
                    int64_t begin, int64_t end, T* y) {
  DSE_CALL_BY_ISA(subtract_pairs, count, left, b, right, c, ld, begin, end, y);
}
template <typename T>
void dots(int64_t count, const T* b, int64_t ld, const T* v, int64_t begin, int64_t end, T* out) {
  DSE_CALL_BY_ISA(dots, count, b, ld, v, begin, end, out);
}
template <typename T>
void mirror(T* a, int64_t ld, int64_t first, int64_t row_end, int64_t n) {
  DSE_CALL_BY_ISA(mirror, a, ld, first, row_end, n);
}

// A -= V W^T + W V^T for rows and columns first .. n, above the diagonal and within its tiles; `pair` holds the
// rows of V then those of W, `negated` those of -W then -V.
template <typename T>
void symmetric_update(const T* pair, const T* negated, int64_t rows, T* a, int64_t ld, int64_t first, int64_t n) {
  const int64_t work = (n - first) * (n - first) * rows / 2;
  for_each_upper_tile(first, n, kTile, work, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    tn_product_upper(pair, ld, negated, ld, rows, a, ld, i0, i1, j0, j1);
  });
}

// Columns `first` and on of what symmetric_update() takes, from V (or what stands in its place) and W, its second
// kBlock rows, of which `rows` count.
template <typename T>
void fill_operands(T* pair, int64_t ld, int64_t rows, const T* v_rows, int64_t first) {
  for (int64_t i = 0; i < kBlock; ++i) {
    T* v = pair + i * ld;
    T* w = v + kBlock * ld;
    T* minus_w = w + kBlock * ld;
    T* minus_v = minus_w + kBlock * ld;
    if (i >= rows) {
      for (T* row : {v, w, minus_w, minus_v}) std::fill(row + first, row + ld, T(0));
      continue;
    }
    if (v_rows != nullptr) std::copy(v_rows + i * ld + first, v_rows + (i + 1) * ld, v + first);
    for (int64_t j = first; j < ld; ++j) minus_w[j] = -w[j];
    for (int64_t j = first; j < ld; ++j) minus_v[j] = -v[j];
  }
}

// An upper bound of the eigenvalues of a part of T, from its discs (Gershgorin).
double bound_of(const double* diagonal, const double* off, int64_t begin, int64_t n) {
  double most = 0.0;
  for (int64_t i = begin; i < n; ++i) {
    const double before = i > begin ? std::abs(off[i - 1]) : 0.0, after = i + 1 < n ? std::abs(off[i]) : 0.0;
    most = std::max(most, std::abs(diagonal[i]) + before + after);
  }
  return most;
}

}  // namespace

template <typename T>
void Tridiagonal::reduce_columns(T* a, int64_t first, int64_t last, Memory<T>& memory) {
  const int64_t n = n_, ld = ld_;
  double* diagonal = vectors_.data();
  double* off = diagonal + n;
  double* factor = off + n;
  T* reflectors = memory.reflectors.data();
  T* pair = memory.panel.reserve_zeroed(4 * kBlock * ld);  // V, W, then their negatives in the other order
  T* w_rows = pair + kBlock * ld;
  T coefficients[2 * kBlock];

  for (int64_t k0 = first; k0 < last; k0 += kBlock) {
    const int64_t k1 = std::min(n, k0 + kBlock);
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t p = k - k0;
      T* row = a + k * ld;
      for (int64_t q = 0; q < p; ++q) {
        coefficients[q] = pair[q * ld + k];
        coefficients[kBlock + q] = w_rows[q * ld + k];
      }
      subtract_pairs(p, coefficients + kBlock, pair, coefficients, w_rows, ld, down(k), ld, row);
      diagonal[k] = static_cast<double>(row[k]);
      T* v = pair + p * ld;
      T* w = w_rows + p * ld;
      std::fill(v, v + ld, T(0));
      std::fill(w, w + ld, T(0));
      factor[k] = 0.0;
      off[k] = k + 1 < n ? static_cast<double>(row[k + 1]) : 0.0;
      if (k + 2 >= n) continue;
      const int64_t begin = down(k + 1);
      std::copy(row + k + 2, row + n, v + k + 2);
      T squares;
      dots(1, v, ld, v, begin, ld, &squares);
      const double head = off[k], tail = static_cast<double>(squares);
      if (!(squares > kLeastSquare<T>)) {
        std::fill(v, v + ld, T(0));
        continue;
      }
      const double norm = std::sqrt(head * head + tail);
      // The sign that adds, so that nothing cancels.
      off[k] = head > 0.0 ? -norm : norm;
      // Its largest entry is 1: a factor and squares in the range of float32, however small the row.
      const double lead = head - off[k];
      const T inverse = static_cast<T>(1.0 / lead);
      for (int64_t j = k + 2; j < n; ++j) v[j] *= inverse;
      v[k + 1] = T(1);
      factor[k] = 2.0 * (lead * lead) / (lead * lead + tail);
      symmetric_product(a, ld, k + 1, n, v, w);
      for (int64_t j = begin; j <= k; ++j) w[j] = T(0);
      std::fill(w + n, w + ld, T(0));
      dots(p, w_rows, ld, v, begin, ld, coefficients);
      dots(p, pair, ld, v, begin, ld, coefficients + kBlock);
      subtract_pairs(p, coefficients, pair, coefficients + kBlock, w_rows, ld, begin, ld, w);
      // Reflectors of this block reach into columns up to k, where this one does not.
      for (int64_t j = begin; j <= k; ++j) w[j] = T(0);
      T along;
      dots(1, w, ld, v, begin, ld, &along);
      const T scaled = static_cast<T>(factor[k]);
      const T half = static_cast<T>(0.5 * factor[k] * factor[k] * static_cast<double>(along));
      for (int64_t j = k + 1; j < n; ++j) w[j] = scaled * w[j] - half * v[j];
    }
    const int64_t rows = k1 - k0;
    std::copy_n(pair, rows * ld, reflectors + k0 * ld);
    if (k1 >= n) break;
    fill_operands(pair, ld, rows, static_cast<const T*>(nullptr), k1);
    symmetric_update(pair, pair + 2 * kBlock * ld, 2 * kBlock, a, ld, k1, n);
  }
}

void Tridiagonal::start(double* a, int64_t n, int64_t ld) {
  n_ = n;
  ld_ = ld;
  error_ = 0.0;
  narrow_from_ = n;
  vectors_.reserve(3 * n);
  double largest = 0.0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(a[i * ld + i]));
  scale_ = unit_scale(largest);
  if (scale_ != 1.0)
    for (int64_t i = 0; i < n * ld; ++i) a[i] *= scale_;
}

void Tridiagonal::reduce(double* a, int64_t n, int64_t ld) {
  start(a, n, ld);
  wide_.reflectors.reserve_zeroed(n * ld);
  reduce_columns(a, 0, n, wide_);
}

void Tridiagonal::reduce_mixed(double* a, int64_t n, int64_t ld, int64_t most_wide) {
  if (n <= 2 * kBlock) {
    reduce(a, n, ld);
    return;
  }
  start(a, n, ld);
  most_wide = std::clamp(most_wide / kBlock, int64_t{1}, n / kBlock - 1) * kBlock;
  wide_.reflectors.reserve_zeroed(most_wide * ld);
  // What the last columns of a block still see of the spectrum, as a part of all of it.
  constexpr int64_t kLast = 8;
  constexpr double kLittle = 0.1, kSlow = 0.85;
  double before = 1.0;
  for (narrow_from_ = 0; narrow_from_ < most_wide;) {
    reduce_columns(a, narrow_from_, narrow_from_ + kBlock, wide_);
    narrow_from_ += kBlock;
    const double seen = bound_of(diagonal(), couplings(), narrow_from_ - kLast, narrow_from_) /
                        bound_of(diagonal(), couplings(), 0, narrow_from_);
    if (seen < kLittle || !(seen < kSlow * before)) break;
    before = seen;
  }

  float* narrow = narrow_matrix_.reserve(n * ld);
  for (int64_t i = narrow_from_; i < n; ++i)
    for (int64_t j = down(i); j < ld; ++j) narrow[i * ld + j] = static_cast<float>(a[i * ld + j]);
  narrow_.reflectors.reserve_zeroed(n * ld);
  reduce_columns(narrow, narrow_from_, n, narrow_);
  const double bound = bound_of(diagonal(), couplings(), narrow_from_, n);
  error_ = bound * static_cast<double>(std::numeric_limits<float>::epsilon()) / scale_;
}

void Tridiagonal::reduce_again(double* a) {
  const int64_t done = narrow_from_ * ld_;
  Buffer<double> before(done);
  std::copy_n(wide_.reflectors.data(), done, before.data());
  std::copy_n(before.data(), done, wide_.reflectors.reserve_zeroed(n_ * ld_));
  const int64_t from = narrow_from_;
  narrow_from_ = n_;
  error_ = 0.0;
  reduce_columns(a, from, n_, wide_);
}

void Tridiagonal::smallest_subspace(int64_t count, double below, double* rows) {
  // Inverse iteration of a block: every step multiplies what does not belong by the ratio of the eigenvalues.
  constexpr int kSteps = 8;
  const int64_t n = n_;
  const double* diagonal = vectors_.data();
  const double* off = diagonal + n;
  const double* factor = off + n;
  double largest = 0.0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, diagonal[i]);
  // Above the rounding of the reduction, so that T + shift is positive definite.
  const double shift = std::abs(below) * scale_ + 1e-14 * largest;
  double* inverse = wide_.work.reserve(n);
  inverse[0] = 1.0 / (diagonal[0] + shift);
  for (int64_t i = 1; i < n; ++i)
    inverse[i] = 1.0 / (diagonal[i] + shift - off[i - 1] * off[i - 1] * inverse[i - 1]);

  const RngStream rng{0, RngPurpose::kSubspace, static_cast<uint64_t>(n)};
  for (int64_t i = 0; i < count * n; ++i) rows[i] = rng.uniform(static_cast<uint32_t>(i)) - 0.5;
  for (int step = 0; step < kSteps; ++step) {
    for (int64_t r = 0; r < count; ++r) {
      double* z = rows + r * n;
      for (int64_t i = 1; i < n; ++i) z[i] -= off[i - 1] * inverse[i - 1] * z[i - 1];
      z[n - 1] *= inverse[n - 1];
      for (int64_t i = n - 2; i >= 0; --i) z[i] = inverse[i] * (z[i] - off[i] * z[i + 1]);
      orthonormalize_row(rows, r, n);
    }
  }
  for (int64_t k = n - 3; k >= 0; --k) {
    const double* v = wide_.reflectors.data() + k * ld_ + k + 1;
    for (int64_t r = 0; r < count; ++r) {
      double* z = rows + r * n + k + 1;
      axpy(-factor[k] * dot(v, z, n - k - 1), v, z, n - k - 1);
    }
  }
}

template <typename T>
void Tridiagonal::apply_in(const ShiftedInverses& function, double unit, Memory<T>& memory, T* out) {
  const int64_t n = n_, ld = ld_, shifts = function.size();
  const double* diagonal = vectors_.data();
  const double* off = diagonal + n;
  const double* factor = off + n;
  const T* reflectors = memory.reflectors.data();
  T* pair = memory.panel.data();
  T* w_rows = pair + kBlock * ld;

  double* pivot =
      shifts_.reserve(shifts * n + shifts * (kBlock + 4) + kBlock * kBlock);  // inverses of the pivots
  double* inside = pivot + shifts * n;        // shifts x kBlock: the row within the block
  double* corner = inside + shifts * kBlock;  // last diagonal entry of each inverse
  double* reach = corner + shifts;            // product of the ratios of a block
  double* shift = reach + shifts;
  double* weight = shift + shifts;
  double* block = weight + shifts;  // kBlock x kBlock: f(T) within the block

  T* row = memory.work.reserve(shifts * ld + shifts * kBlock + 3 * kBlock * kBlock +
                               kBlock * (ld + std::max(ld, shifts)));
  T* ratios = row + shifts * ld;           // shifts x kBlock: weight * ratio to the first turned row
  T* s_matrix = ratios + shifts * kBlock;  // S of the block reflector
  T* small = s_matrix + kBlock * kBlock;   // V^T F V and what follows from it
  T* middle = small + kBlock * kBlock;
  T* product = middle + kBlock * kBlock;  // rows: F V
  T* turned = product + kBlock * ld;      // ld x kBlock: V^T, or kBlock x shifts: coefficients of the turned rows
  std::fill(row, row + shifts * ld, T(0));
  for (int64_t s = 0; s < shifts; ++s) {
    // (A + s)^-1 = scale (scale A + scale s)^-1.
    shift[s] = function.shift[static_cast<size_t>(s)] * scale_;
    weight[s] = function.weight[static_cast<size_t>(s)] / unit * scale_;
    double* inverse = pivot + s * n;
    inverse[0] = 1.0 / (diagonal[0] + shift[s]);
    for (int64_t i = 1; i < n; ++i)
      inverse[i] = 1.0 / (diagonal[i] + shift[s] - off[i - 1] * off[i - 1] * inverse[i - 1]);
  }

  T* targets[kBlock];
  std::vector<T*> shift_rows(static_cast<size_t>(shifts));
  for (int64_t k0 = (n - 1) / kBlock * kBlock; k0 >= 0; k0 -= kBlock) {
    const int64_t k1 = std::min(n, k0 + kBlock), rows = k1 - k0;
    // --- Rows k0 .. k1 of f(T), to the right of k1 in terms of the turned rows.
    for (int64_t i = k0; i < k1; ++i) std::fill(out + i * ld + k0, out + (i + 1) * ld, T(0));
    std::fill(block, block + kBlock * kBlock, 0.0);
    for (int64_t s = 0; s < shifts; ++s) {
      double along = 1.0;
      double* own = inside + s * kBlock;
      for (int64_t i = k1 - 1; i >= k0; --i) {
        const double inverse = pivot[s * n + i];
        const double ratio = i + 1 < n ? -off[i] * inverse : 0.0;
        along *= ratio;
        corner[s] = inverse + (i + 1 < n ? ratio * ratio * corner[s] : 0.0);
        own[i - k0] = corner[s];
        for (int64_t j = i + 1; j < k1; ++j) own[j - k0] *= ratio;
        for (int64_t j = i; j < k1; ++j) block[(i - k0) * kBlock + j - k0] += weight[s] * own[j - k0];
        ratios[s * kBlock + i - k0] = static_cast<T>(weight[s] * along);
      }
      reach[s] = along;
      for (int64_t i = rows; i < kBlock; ++i) ratios[s * kBlock + i] = T(0);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = i; j < rows; ++j) out[(k0 + i) * ld + k0 + j] = static_cast<T>(block[i * kBlock + j]);
    if (k1 < n) {
      for (int64_t i = 0; i < rows; ++i) targets[i] = out + (k0 + i) * ld + k1;
      tn_accumulate(ratios, kBlock, row + k1, ld, shifts, T(1), targets, rows, ld - k1);
    }
    for (int64_t s = 0; s < shifts; ++s) {
      const T factor_of_row = static_cast<T>(reach[s]);
      for (int64_t j = k1; j < n; ++j) row[s * ld + j] *= factor_of_row;
      for (int64_t i = 0; i < rows; ++i) row[s * ld + k0 + i] = static_cast<T>(inside[s * kBlock + i]);
    }
    // --- S, column by column: S[i][i] = factor_i, S[0..i, i] = -factor_i S V^T v_i.
    const T* v_rows = reflectors + k0 * ld;
    bool any = false;
    for (int64_t i = 0; i < rows; ++i) {
      any = any || factor[k0 + i] != 0.0;
      dots(i, v_rows, ld, v_rows + i * ld, k0, ld, small);
      for (int64_t q = 0; q < rows; ++q) s_matrix[q * kBlock + i] = T(0);
      for (int64_t q = 0; q < i; ++q) {
        double total = 0.0;
        for (int64_t r = q; r < i; ++r) total += static_cast<double>(s_matrix[q * kBlock + r] * small[r]);
        s_matrix[q * kBlock + i] = static_cast<T>(-factor[k0 + i] * total);
      }
      s_matrix[i * kBlock + i] = static_cast<T>(factor[k0 + i]);
    }
    mirror(out, ld, k0, k1, n);
    if (!any) continue;
    // --- F V, as rows.
    const int64_t m = ld - k0;
    for (int64_t j = 0; j < m; ++j)
      for (int64_t i = 0; i < kBlock; ++i) turned[j * kBlock + i] = i < rows ? v_rows[i * ld + k0 + j] : T(0);
    std::fill(product, product + kBlock * ld, T(0));
    constexpr int64_t kColumns = 48;  // of all rows, they stay in the smallest cache for a while
    for_each_task((m + kColumns - 1) / kColumns, m * m * rows, [&](int64_t task, int64_t) {
      T* own[kBlock];
      const int64_t j = k0 + task * kColumns;
      for (int64_t i = 0; i < rows; ++i) own[i] = product + i * ld + j;
      tn_accumulate(turned, kBlock, out + k0 * ld + j, ld, n - k0, T(1), own, rows, std::min(kColumns, ld - j));
    });
    // --- W = F V S^T - V (S V^T F V S^T) / 2.
    for (int64_t i = 0; i < rows; ++i) dots(rows, v_rows, ld, product + i * ld, k0, ld, small + i * kBlock);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        T total = T(0);
        for (int64_t q = i; q < rows; ++q) total += s_matrix[i * kBlock + q] * small[q * kBlock + j];
        middle[i * kBlock + j] = total;
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        T total = T(0);
        for (int64_t q = j; q < rows; ++q) total += middle[i * kBlock + q] * s_matrix[j * kBlock + q];
        small[i * kBlock + j] = T(0.5) * total;
      }
    }
    // Rows of W as sums over rows of F V and of V, by the transposes of the coefficients.
    T* weights = small;
    for (int64_t q = 0; q < kBlock; ++q)
      for (int64_t i = 0; i < kBlock; ++i)
        middle[q * kBlock + i] = i < rows && q < rows ? s_matrix[i * kBlock + q] : T(0);
    for (int64_t i = 0; i < rows; ++i) std::fill(w_rows + i * ld + k0, w_rows + (i + 1) * ld, T(0));
    for (int64_t i = 0; i < rows; ++i) targets[i] = w_rows + i * ld + k0;
    tn_accumulate(middle, kBlock, product + k0, ld, rows, T(1), targets, rows, m);
    tn_accumulate(weights, kBlock, v_rows + k0, ld, rows, T(-1), targets, rows, m);
    fill_operands(pair, ld, rows, v_rows, k0);
    symmetric_update(pair, pair + 2 * kBlock * ld, 2 * kBlock, out, ld, k0, n);
    // --- The turned rows: g - (g V) S^T V^T.
    for (int64_t s = 0; s < shifts; ++s) {
      T along[kBlock];
      dots(rows, v_rows, ld, row + s * ld, k0, ld, along);
      for (int64_t i = 0; i < rows; ++i) {
        T total = T(0);
        for (int64_t q = i; q < rows; ++q) total += along[q] * s_matrix[i * kBlock + q];
        turned[i * shifts + s] = total;
      }
      shift_rows[static_cast<size_t>(s)] = row + s * ld + k0;
    }
    tn_accumulate(turned, shifts, v_rows + k0, ld, rows, T(-1), shift_rows.data(), shifts, m);
    if (k0 > 0) mirror(out, ld, k0, n, n);
  }
  mirror(out, ld, 0, n, n);
}

void Tridiagonal::apply(const ShiftedInverses& function, double* out) { apply_in(function, 1.0, wide_, out); }

float* Tridiagonal::apply_narrow(const ShiftedInverses& function, double* unit) {
  const int64_t wide = narrow_from_ * ld_;
  if (narrow_from_ == n_) narrow_.reflectors.reserve(n_ * ld_);
  for (int64_t i = 0; i < wide; ++i) narrow_.reflectors[i] = static_cast<float>(wide_.reflectors[i]);
  narrow_.panel.reserve(4 * kBlock * ld_);
  float* out = narrow_matrix_.reserve(n_ * ld_);
  double most = 0.0;
  for (const double weight : function.weight) most = std::max(most, std::abs(weight) * scale_);
  *unit = most > 0.0 ? most : 1.0;
  apply_in(function, *unit, narrow_, out);
  return out;
}

}  // namespace dse::cpu
