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

#include "cpu/tridiagonal.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/rng.h"
#include "cpu/dense.h"

// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace dse::cpu {
namespace {

typedef double V __attribute__((vector_size(64), aligned(8), may_alias));
constexpr int64_t kWidth = 8;
// A multiple of kGramPanel: updates start at whole tiles.
constexpr int64_t kBlock = kGramPanel;
constexpr int64_t kTile = 96;

#define DSE_INLINE inline __attribute__((always_inline))

DSE_INLINE double horizontal_sum(const V& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

int64_t down(int64_t i) { return i / kWidth * kWidth; }

// y = A v for rows and columns `first` .. n of a symmetric matrix, of which the entries above the diagonal and
// the whole diagonal blocks of eight are read. v is zero before `first`; y is undefined there. Every entry is
// read once.
DSE_MULTIVERSION void symmetric_product(const double* a, int64_t ld, int64_t first, int64_t n, const double* v,
                                        double* y) {
  const int64_t begin = down(first), end = (n + kWidth - 1) / kWidth * kWidth;
  for (int64_t i = begin; i < end; ++i) y[i] = 0.0;
  for (int64_t i = begin; i < n; i += kWidth) {
    const int64_t rows = std::min(kWidth, n - i);
    const double* row = a + i * ld;
    if (rows < kWidth) {  // the last rows: their diagonal block is all there is
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = i; j < n; ++j) y[i + r] += row[r * ld + j] * v[j];
      break;
    }
    V sum[kWidth];
    const V own = *reinterpret_cast<const V*>(v + i);
    for (int64_t r = 0; r < kWidth; ++r) sum[r] = *reinterpret_cast<const V*>(row + r * ld + i) * own;
    // Two halves of four rows: eight sums and what one step reads stay in registers.
    for (int64_t h = 0; h < kWidth; h += 4) {
      const double* r0 = row + h * ld;
      const double* r1 = r0 + ld;
      const double* r2 = r1 + ld;
      const double* r3 = r2 + ld;
      const double v0 = v[i + h], v1 = v[i + h + 1], v2 = v[i + h + 2], v3 = v[i + h + 3];
      V s0 = sum[h], s1 = sum[h + 1], s2 = sum[h + 2], s3 = sum[h + 3];
      for (int64_t j = i + kWidth; j < end; j += kWidth) {
        const V vj = *reinterpret_cast<const V*>(v + j);
        const V a0 = *reinterpret_cast<const V*>(r0 + j), a1 = *reinterpret_cast<const V*>(r1 + j);
        const V a2 = *reinterpret_cast<const V*>(r2 + j), a3 = *reinterpret_cast<const V*>(r3 + j);
        s0 += a0 * vj;
        s1 += a1 * vj;
        s2 += a2 * vj;
        s3 += a3 * vj;
        *reinterpret_cast<V*>(y + j) += (a0 * v0 + a1 * v1) + (a2 * v2 + a3 * v3);
      }
      y[i + h] += horizontal_sum(s0);
      y[i + h + 1] += horizontal_sum(s1);
      y[i + h + 2] += horizontal_sum(s2);
      y[i + h + 3] += horizontal_sum(s3);
    }
  }
}

// y -= sum_q left[q] b_q + right[q] c_q over columns begin .. end, b_q = b + q * ld.
DSE_MULTIVERSION void subtract_pairs(int64_t count, const double* left, const double* b, const double* right,
                                     const double* c, int64_t ld, int64_t begin, int64_t end, double* y) {
  int64_t q = 0;
  for (; q + 4 <= count; q += 4) {
    const double* b0 = b + q * ld;
    const double* c0 = c + q * ld;
    for (int64_t j = begin; j < end; j += kWidth) {
      V sum = {};
      for (int64_t u = 0; u < 4; ++u) {
        sum += left[q + u] * *reinterpret_cast<const V*>(b0 + u * ld + j);
        sum += right[q + u] * *reinterpret_cast<const V*>(c0 + u * ld + j);
      }
      *reinterpret_cast<V*>(y + j) -= sum;
    }
  }
  for (; q < count; ++q) {
    for (int64_t j = begin; j < end; j += kWidth) {
      *reinterpret_cast<V*>(y + j) -= left[q] * *reinterpret_cast<const V*>(b + q * ld + j) +
                                      right[q] * *reinterpret_cast<const V*>(c + q * ld + j);
    }
  }
}

// out[q] = <b_q, v> over columns begin .. end.
DSE_MULTIVERSION void dots(int64_t count, const double* b, int64_t ld, const double* v, int64_t begin,
                           int64_t end, double* out) {
  int64_t q = 0;
  for (; q + 4 <= count; q += 4) {
    const double* b0 = b + q * ld;
    V s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int64_t j = begin; j < end; j += kWidth) {
      const V vj = *reinterpret_cast<const V*>(v + j);
      s0 += *reinterpret_cast<const V*>(b0 + j) * vj;
      s1 += *reinterpret_cast<const V*>(b0 + ld + j) * vj;
      s2 += *reinterpret_cast<const V*>(b0 + 2 * ld + j) * vj;
      s3 += *reinterpret_cast<const V*>(b0 + 3 * ld + j) * vj;
    }
    out[q] = horizontal_sum(s0);
    out[q + 1] = horizontal_sum(s1);
    out[q + 2] = horizontal_sum(s2);
    out[q + 3] = horizontal_sum(s3);
  }
  for (; q < count; ++q) {
    V s = {};
    for (int64_t j = begin; j < end; j += kWidth)
      s += *reinterpret_cast<const V*>(b + q * ld + j) * *reinterpret_cast<const V*>(v + j);
    out[q] = horizontal_sum(s);
  }
}

// Copies what lies above the diagonal, rows and columns first .. n, to below it.
DSE_MULTIVERSION void mirror(double* a, int64_t ld, int64_t first, int64_t row_end, int64_t n) {
  constexpr int64_t kStep = 8;
  for (int64_t i0 = first; i0 < row_end; i0 += kStep) {
    const int64_t i1 = std::min(row_end, i0 + kStep);
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = i + 1; j < std::min(n, i0 + kStep); ++j) a[j * ld + i] = a[i * ld + j];
    for (int64_t j = i0 + kStep; j < n; ++j)
      for (int64_t i = i0; i < i1; ++i) a[j * ld + i] = a[i * ld + j];
  }
}

// A -= V W^T + W V^T for rows and columns first .. n, above the diagonal and within its tiles; `pair` holds the
// rows of V then those of W, `negated` those of -W then -V.
void symmetric_update(const double* pair, const double* negated, int64_t rows, double* a, int64_t ld,
                      int64_t first, int64_t n) {
  const int64_t work = (n - first) * (n - first) * rows / 2;
  for_each_upper_tile(first, n, kTile, work, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    tn_product_upper(pair, ld, negated, ld, rows, a, ld, i0, i1, j0, j1);
  });
}

}  // namespace

void Tridiagonal::reduce(double* a, int64_t n, int64_t ld) {
  n_ = n;
  ld_ = ld;
  double* diagonal = vectors_.reserve(3 * n);
  double* off = diagonal + n;
  double* factor = off + n;
  double* reflectors = reflectors_.reserve_zeroed(n * ld);
  double* pair = panel_.reserve_zeroed(4 * kBlock * ld);  // V, W, then their negatives in the other order
  double* w_rows = pair + kBlock * ld;
  double* negated = w_rows + kBlock * ld;
  double coefficients[2 * kBlock];

  double largest = 0.0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(a[i * ld + i]));
  scale_ = unit_scale(largest);
  if (scale_ != 1.0)
    for (int64_t i = 0; i < n * ld; ++i) a[i] *= scale_;

  for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
    const int64_t k1 = std::min(n, k0 + kBlock);
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t p = k - k0;
      double* row = a + k * ld;
      for (int64_t q = 0; q < p; ++q) {
        coefficients[q] = pair[q * ld + k];
        coefficients[kBlock + q] = w_rows[q * ld + k];
      }
      subtract_pairs(p, coefficients + kBlock, pair, coefficients, w_rows, ld, down(k), ld, row);
      diagonal[k] = row[k];
      double* v = pair + p * ld;
      double* w = w_rows + p * ld;
      std::fill(v, v + ld, 0.0);
      std::fill(w, w + ld, 0.0);
      factor[k] = 0.0;
      off[k] = k + 1 < n ? row[k + 1] : 0.0;
      if (k + 2 >= n) continue;
      const double head = row[k + 1], tail = sum_of_squares(row + k + 2, n - k - 2);
      if (!(tail > 0.0)) continue;
      const double norm = std::sqrt(head * head + tail);
      // The sign that adds, so that nothing cancels.
      off[k] = head > 0.0 ? -norm : norm;
      std::copy(row + k + 1, row + n, v + k + 1);
      v[k + 1] = head - off[k];
      factor[k] = 2.0 / (v[k + 1] * v[k + 1] + tail);
      symmetric_product(a, ld, k + 1, n, v, w);
      const int64_t begin = down(k + 1);
      for (int64_t j = begin; j <= k; ++j) w[j] = 0.0;
      std::fill(w + n, w + ld, 0.0);
      dots(p, w_rows, ld, v, begin, ld, coefficients);
      dots(p, pair, ld, v, begin, ld, coefficients + kBlock);
      subtract_pairs(p, coefficients, pair, coefficients + kBlock, w_rows, ld, begin, ld, w);
      // Reflectors of this block reach into columns up to k, where this one does not.
      for (int64_t j = begin; j <= k; ++j) w[j] = 0.0;
      const double along = dot(w + k + 1, v + k + 1, n - k - 1);
      const double half = 0.5 * factor[k] * factor[k] * along;
      for (int64_t j = k + 1; j < n; ++j) w[j] = factor[k] * w[j] - half * v[j];
    }
    const int64_t rows = k1 - k0;
    std::copy_n(pair, rows * ld, reflectors + k0 * ld);
    if (k1 >= n) break;
    for (int64_t i = 0; i < kBlock * ld; ++i) negated[i] = -w_rows[i];
    for (int64_t i = 0; i < kBlock * ld; ++i) negated[kBlock * ld + i] = -pair[i];
    symmetric_update(pair, negated, 2 * kBlock, a, ld, k1, n);
  }
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
  double* inverse = work_.reserve(n);
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
    const double* v = reflectors_.data() + k * ld_ + k + 1;
    for (int64_t r = 0; r < count; ++r) {
      double* z = rows + r * n + k + 1;
      axpy(-factor[k] * dot(v, z, n - k - 1), v, z, n - k - 1);
    }
  }
}

void Tridiagonal::apply(const ShiftedInverses& function, double* out) {
  const int64_t n = n_, ld = ld_, shifts = function.size();
  const double* diagonal = vectors_.data();
  const double* off = diagonal + n;
  const double* factor = off + n;
  const double* reflectors = reflectors_.data();
  double* pair = panel_.data();
  double* w_rows = pair + kBlock * ld;
  double* negated = w_rows + kBlock * ld;

  double* row =
      work_.reserve(shifts * ld + shifts * n + shifts * (2 * kBlock + 4) + 5 * kBlock * kBlock + 2 * kBlock * ld);
  double* pivot = row + shifts * ld;          // inverses of the pivots of T + shift
  double* ratios = pivot + shifts * n;        // shifts x kBlock: weight * ratio to the first turned row
  double* inside = ratios + shifts * kBlock;  // shifts x kBlock: the row within the block
  double* corner = inside + shifts * kBlock;  // last diagonal entry of each inverse
  double* reach = corner + shifts;            // product of the ratios of a block
  double* shift = reach + shifts;
  double* weight = shift + shifts;
  double* s_matrix = weight + shifts;          // S of the block reflector
  double* small = s_matrix + kBlock * kBlock;  // V^T F V and what follows from it
  double* middle = small + kBlock * kBlock;
  double* product = middle + kBlock * kBlock;  // rows: F V
  double* turned = product + kBlock * ld;      // ld x kBlock: V^T, or coefficients of the turned rows
  std::fill(row, row + shifts * ld, 0.0);
  for (int64_t s = 0; s < shifts; ++s) {
    // (A + s)^-1 = scale (scale A + scale s)^-1.
    shift[s] = function.shift[static_cast<size_t>(s)] * scale_;
    weight[s] = function.weight[static_cast<size_t>(s)] * scale_;
    double* inverse = pivot + s * n;
    inverse[0] = 1.0 / (diagonal[0] + shift[s]);
    for (int64_t i = 1; i < n; ++i)
      inverse[i] = 1.0 / (diagonal[i] + shift[s] - off[i - 1] * off[i - 1] * inverse[i - 1]);
  }

  double* targets[kBlock];
  std::vector<double*> shift_rows(static_cast<size_t>(shifts));
  for (int64_t k0 = (n - 1) / kBlock * kBlock; k0 >= 0; k0 -= kBlock) {
    const int64_t k1 = std::min(n, k0 + kBlock), rows = k1 - k0;
    // --- Rows k0 .. k1 of f(T), to the right of k1 in terms of the turned rows.
    for (int64_t i = k0; i < k1; ++i) std::fill(out + i * ld + k0, out + (i + 1) * ld, 0.0);
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
        for (int64_t j = i; j < k1; ++j) out[i * ld + j] += weight[s] * own[j - k0];
        ratios[s * kBlock + i - k0] = weight[s] * along;
      }
      reach[s] = along;
      for (int64_t i = rows; i < kBlock; ++i) ratios[s * kBlock + i] = 0.0;
    }
    if (k1 < n) {
      for (int64_t i = 0; i < rows; ++i) targets[i] = out + (k0 + i) * ld + k1;
      tn_accumulate(ratios, kBlock, row + k1, ld, shifts, 1.0, targets, rows, ld - k1);
    }
    for (int64_t s = 0; s < shifts; ++s) {
      for (int64_t j = k1; j < n; ++j) row[s * ld + j] *= reach[s];
      std::copy_n(inside + s * kBlock, rows, row + s * ld + k0);
    }
    // --- S, column by column: S[i][i] = factor_i, S[0..i, i] = -factor_i S V^T v_i.
    const double* v_rows = reflectors + k0 * ld;
    bool any = false;
    for (int64_t i = 0; i < rows; ++i) {
      any = any || factor[k0 + i] != 0.0;
      dots(i, v_rows, ld, v_rows + i * ld, k0, ld, small);
      for (int64_t q = 0; q < rows; ++q) s_matrix[q * kBlock + i] = 0.0;
      for (int64_t q = 0; q < i; ++q) {
        double total = 0.0;
        for (int64_t r = q; r < i; ++r) total += s_matrix[q * kBlock + r] * small[r];
        s_matrix[q * kBlock + i] = -factor[k0 + i] * total;
      }
      s_matrix[i * kBlock + i] = factor[k0 + i];
    }
    mirror(out, ld, k0, k1, n);
    if (!any) continue;
    // --- F V, as rows.
    const int64_t m = ld - k0;
    for (int64_t j = 0; j < m; ++j)
      for (int64_t i = 0; i < kBlock; ++i) turned[j * kBlock + i] = i < rows ? v_rows[i * ld + k0 + j] : 0.0;
    std::fill(product, product + kBlock * ld, 0.0);
    constexpr int64_t kColumns = 96;
    for_each_task((m + kColumns - 1) / kColumns, m * m * rows, [&](int64_t task, int64_t) {
      double* own[kBlock];
      const int64_t j = k0 + task * kColumns;
      for (int64_t i = 0; i < rows; ++i) own[i] = product + i * ld + j;
      tn_accumulate(turned, kBlock, out + k0 * ld + j, ld, n - k0, 1.0, own, rows, std::min(kColumns, ld - j));
    });
    // --- W = F V S^T - V (S V^T F V S^T) / 2.
    for (int64_t i = 0; i < rows; ++i) dots(rows, v_rows, ld, product + i * ld, k0, ld, small + i * kBlock);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        double total = 0.0;
        for (int64_t q = i; q < rows; ++q) total += s_matrix[i * kBlock + q] * small[q * kBlock + j];
        middle[i * kBlock + j] = total;
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        double total = 0.0;
        for (int64_t q = j; q < rows; ++q) total += middle[i * kBlock + q] * s_matrix[j * kBlock + q];
        small[i * kBlock + j] = 0.5 * total;
      }
    }
    std::copy_n(v_rows, rows * ld, pair);
    std::fill(pair + rows * ld, pair + 2 * kBlock * ld, 0.0);
    for (int64_t i = 0; i < rows; ++i) {
      double* w = w_rows + i * ld;
      double across[kBlock];
      for (int64_t q = 0; q < rows; ++q) across[q] = small[q * kBlock + i];
      for (int64_t q = 0; q < rows; ++q) middle[q] = -s_matrix[i * kBlock + q];
      subtract_pairs(rows, across, v_rows, middle, product, ld, k0, ld, w);
    }
    for (int64_t i = 0; i < kBlock * ld; ++i) negated[i] = -w_rows[i];
    for (int64_t i = 0; i < kBlock * ld; ++i) negated[kBlock * ld + i] = -pair[i];
    symmetric_update(pair, negated, 2 * kBlock, out, ld, k0, n);
    // --- The turned rows: g - (g V) S^T V^T.
    for (int64_t s = 0; s < shifts; ++s) {
      double along[kBlock];
      dots(rows, v_rows, ld, row + s * ld, k0, ld, along);
      for (int64_t i = 0; i < rows; ++i) {
        double total = 0.0;
        for (int64_t q = i; q < rows; ++q) total += along[q] * s_matrix[i * kBlock + q];
        turned[i * shifts + s] = total;
      }
      shift_rows[static_cast<size_t>(s)] = row + s * ld + k0;
    }
    tn_accumulate(turned, shifts, v_rows + k0, ld, rows, -1.0, shift_rows.data(), shifts, m);
    if (k0 > 0) mirror(out, ld, k0, n, n);
  }
  mirror(out, ld, 0, n, n);
}

}  // namespace dse::cpu
