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

#include "common/rng.h"
#include "cpu/dense.h"
#include "cpu/processor.h"
#include "cpu/tridiagonal_traces.h"
#include "cpu/turn.h"
#include "cpu/vectors.h"

namespace dse::cpu {
namespace {

// A multiple of kGramPanel: updates start at whole tiles.
constexpr int64_t kBlock = kGramPanel;

}  // namespace
}  // namespace dse::cpu

#define DSE_KERNELS "cpu/tridiagonal.kernels.h"
#include "cpu/every_isa.h"

namespace dse::cpu {
namespace {

constexpr int64_t kCells = kBlock * kBlock;
constexpr int64_t kTile = 96;
// Columns that a mixed reduction does in float64 at least.
constexpr int64_t kFirstWide = 8;

int64_t down(int64_t i) { return i / 8 * 8; }

template <typename T>
void symmetric_product(const T* a, int64_t ld, int64_t first, int64_t last, int64_t n, const T* v, T* y) {
  DSE_CALL_BY_ISA(symmetric_product, a, ld, first, last, n, v, y);
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
void fill_operands(T* pair, int64_t ld, int64_t rows, const T* v_rows, int64_t first, int64_t last) {
  DSE_CALL_BY_ISA(fill_operands, pair, ld, rows, v_rows, first, last);
}
template <typename T>
void add_rows(int64_t rows, const T* other, int64_t ld, int64_t first, int64_t last, T* sum) {
  DSE_CALL_BY_ISA(add_rows, rows, other, ld, first, last, sum);
}
void invert_pivots(int64_t n, int64_t wide, const double* diagonal, const double* off, const double* shift,
                   double* inverse) {
  DSE_CALL_BY_ISA(invert_pivots, n, wide, diagonal, off, shift, inverse);
}
template <typename T>
void shifted_ratios(int64_t wide, int64_t k0, int64_t rows, int64_t n, const double* off, const double* inverse,
                    const double* weight, double* corner, double* ratio, double* entry, double* reach,
                    T* ratios) {
  DSE_CALL_BY_ISA(shifted_ratios, wide, k0, rows, n, off, inverse, weight, corner, ratio, entry, reach, ratios);
}
template <typename T>
void shifted_rows(int64_t shifts, int64_t wide, int64_t k0, int64_t rows, const double* weight,
                  const double* ratio, const double* entry, const double* reach, double* block, T* turned,
                  int64_t ld) {
  DSE_CALL_BY_ISA(shifted_rows, shifts, wide, k0, rows, weight, ratio, entry, reach, block, turned, ld);
}
template <typename T>
void block_reflector(int64_t rows, const T* gram, const double* factor, T* turned) {
  DSE_CALL_BY_ISA(block_reflector, rows, gram, factor, turned);
}

// The rows of a crew's parts, of about equal areas of the upper triangle from row `first` on; multiples of
// kGramPanel. A part's rows are in its cache: it has nearly the same ones as long as `first` grows slowly.
struct Bands {
  int64_t edge[Crew::kParts + 1];

  // Of a matrix that is not worth parts, all rows are the first one's.
  Bands(int64_t first, int64_t n, bool has_parts = true) {
    std::fill(edge, edge + Crew::kParts, n);
    for (int64_t p = 0; p < (has_parts ? Crew::kParts : 1); ++p) {
      const double left = std::sqrt(1.0 - static_cast<double>(p) / static_cast<double>(Crew::kParts));
      const int64_t row = first + static_cast<int64_t>(static_cast<double>(n - first) * (1.0 - left));
      edge[p] = row / kGramPanel * kGramPanel;
    }
    edge[Crew::kParts] = n;
  }
};

// A -= V W^T + W V^T for rows first .. last and columns to n, above the diagonal and within its tiles; `pair`
// holds the rows of V then those of W, `negated` those of -W then -V.
template <typename T>
void symmetric_update(const T* pair, const T* negated, int64_t rows, T* a, int64_t ld, int64_t first,
                      int64_t last, int64_t n) {
  for (int64_t i = first; i < last; i += kTile)
    for (int64_t j = i; j < n; j += kTile)
      tn_product_upper(pair, ld, negated, ld, rows, a, ld, i, std::min(last, i + kTile), j,
                       std::min(n, j + kTile));
}
template <typename T>
void symmetric_update(Crew& crew, const Bands& bands, const T* pair, const T* negated, int64_t rows, T* a,
                      int64_t ld, int64_t first, int64_t n) {
  if (crew.is_alone()) {
    symmetric_update(pair, negated, rows, a, ld, first, n, n);
    return;
  }
  crew.run([&](int64_t p) { symmetric_update(pair, negated, rows, a, ld, bands.edge[p], bands.edge[p + 1], n); });
}

// y = A v for rows and columns `first` .. n; v is zero before, and y is undefined there. `partial` has room for
// Crew::kParts rows. A matrix of few columns is not worth the threads' company: which those are depends on n
// only, and not on who is there.
template <typename T>
void symmetric_product(Crew& crew, const Bands& bands, const T* a, int64_t ld, int64_t first, int64_t n,
                       const T* v, T* partial, T* y) {
  constexpr int64_t kColumns = kWorthThreads == 0 ? 32 : 320;
  const int64_t begin = down(first);
  if (n < kWorthParts || n - first < kColumns) {
    symmetric_product(a, ld, begin, n, n, v, y);
    return;
  }
  const auto from = [&](int64_t p) { return p == 0 ? begin : std::max(begin, bands.edge[p]); };
  crew.run([&](int64_t p) {
    symmetric_product(a, ld, from(p), std::max(begin, bands.edge[p + 1]), n, v, p == 0 ? y : partial + p * ld);
  });
  for (int64_t p = 1; p < Crew::kParts; ++p) {
    const T* own = partial + p * ld;
    for (int64_t j = from(p); j < n; ++j) y[j] += own[j];
  }
}

}  // namespace

template <typename T>
void Tridiagonal::reduce_columns(T* a, int64_t first, int64_t last, Memory<T>& memory, Crew& crew) {
  const int64_t n = n_, ld = ld_;
  double* diagonal = vectors_.data();
  double* off = diagonal + n;
  double* factor = off + n;
  T* reflectors = memory.reflectors.data();
  T* pair = memory.panel.reserve((4 * kBlock + Crew::kParts) * ld);
  T* partial = pair + 4 * kBlock * ld;  // behind V, W, and their negatives in the other order
  T coefficients[2 * kBlock];

  for (int64_t k0 = first, k1 = 0; k0 < last; k0 = k1) {
    k1 = std::min({n, last, (k0 / kBlock + 1) * kBlock});
    const int64_t rows = k1 - k0;
    T* w_rows = pair + rows * ld;
    const Bands bands(k0, n);
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
      symmetric_product(crew, bands, a, ld, k + 1, n, v, partial, w);
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
    std::copy_n(pair, rows * ld, reflectors + k0 * ld);
    if (k1 >= n) break;
    // From a whole tile on; what that adds to columns before k1 is not looked at again.
    const int64_t from = k1 / kBlock * kBlock;
    fill_operands(pair, ld, rows, static_cast<const T*>(nullptr), from, ld);
    symmetric_update(crew, Bands(from, n), pair, pair + 2 * rows * ld, 2 * rows, a, ld, from, n);
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
  wide_.reflectors.reserve(n * ld);
  Crew::gather(n * n * n, [&](Crew& crew) { reduce_columns(a, 0, n, wide_, crew); });
}

void Tridiagonal::reduce_mixed(double* a, int64_t n, int64_t ld, int64_t most_wide, double flat) {
  if (n <= 2 * kBlock) {
    reduce(a, n, ld);
    return;
  }
  start(a, n, ld);
  most_wide = std::clamp(most_wide / kBlock, int64_t{1}, n / kBlock - 1) * kBlock;
  narrow_from_ = 0;
  wide_.reflectors.reserve(most_wide * ld);
  double mean = 0.0;
  for (int64_t i = 0; i < n; ++i) mean += a[i * ld + i] / static_cast<double>(n);
  Crew::gather(n * n * n, [&](Crew& crew) {
    // What the last columns still see of the spectrum: a small part of all of it, or little more than the mean
    // eigenvalue, is little enough. Single large eigenvalues are found out by a few columns.
    constexpr double kLittle = 0.1, kSlow = 0.85;
    double before = 1.0;
    for (int64_t to = kFirstWide; narrow_from_ < most_wide; to = to < kBlock ? kBlock : to + kBlock) {
      const int64_t looked_at = narrow_from_ == 0 ? kFirstWide / 2 : kFirstWide;
      reduce_columns(a, narrow_from_, to, wide_, crew);
      narrow_from_ = to;
      const double last = largest_bound(diagonal(), couplings(), to - looked_at, to);
      const double seen = last / largest_bound(diagonal(), couplings(), 0, to);
      if (seen < kLittle || last < flat * mean || (to > kFirstWide && !(seen < kSlow * before))) break;
      before = seen;
    }

    float* narrow = narrow_matrix_.reserve(n * ld);
    crew.run([&](int64_t part) {
      for (int64_t i = narrow_from_ + part; i < n; i += Crew::kParts)
        for (int64_t j = down(i); j < ld; ++j) narrow[i * ld + j] = static_cast<float>(a[i * ld + j]);
    });
    narrow_.reflectors.reserve(n * ld);
    reduce_columns(narrow, narrow_from_, n, narrow_, crew);
  });
  const double bound = largest_bound(diagonal(), couplings(), narrow_from_, n);
  error_ = bound * static_cast<double>(std::numeric_limits<float>::epsilon()) / scale_;
}

void Tridiagonal::reduce_again(double* a) {
  const int64_t done = narrow_from_ * ld_;
  Buffer<double> before(done);
  std::copy_n(wide_.reflectors.data(), done, before.data());
  std::copy_n(before.data(), done, wide_.reflectors.reserve(n_ * ld_));
  const int64_t from = narrow_from_;
  narrow_from_ = n_;
  error_ = 0.0;
  Crew::gather(n_ * n_ * n_, [&](Crew& crew) { reduce_columns(a, from, n_, wide_, crew); });
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
void Tridiagonal::apply_by(Crew& crew, const ShiftedInverses& function, double unit, Memory<T>& memory, T* out) {
  const int64_t n = n_, ld = ld_, shifts = function.size(), end = gram_ld(n);
  const int64_t wide = (shifts + 7) / 8 * 8;  // idle lanes invert T + 1, for nothing
  const double* diagonal = vectors_.data();
  const double* off = diagonal + n;
  const double* factor = off + n;
  const T* reflectors = memory.reflectors.data();
  T* pair = memory.panel.data();

  double* inverse = shifts_.reserve(wide * (n + 2 * kBlock + 4) + kCells);  // of the pivots
  double* shift = inverse + wide * n;
  double* weight = shift + wide;
  double* corner = weight + wide;         // last diagonal entry of each inverse
  double* reach = corner + wide;          // see shifted_ratios()
  double* ratio = reach + wide;           // kBlock x wide
  double* entry = ratio + kBlock * wide;  // kBlock x wide
  double* block = entry + kBlock * wide;  // kBlock x kBlock: f(T) within the block

  T* row =
      memory.work.reserve(shifts * ld + kBlock * wide + Crew::kParts * kCells + (Crew::kParts + 1) * kBlock * ld);
  T* ratios = row + shifts * ld;                     // kBlock x wide: weight * ratio to the first turned row
  T* small_parts = ratios + kBlock * wide;           // of V^T V and V^T F V, by the crew's parts
  T* product = small_parts + Crew::kParts * kCells;  // rows: F V, and what the other parts add to it
  T* turned = product + Crew::kParts * kBlock * ld;  // end x kBlock: V^T of the block in hand
  std::fill(row, row + shifts * ld, T(0));
  std::fill(shift, shift + wide, 1.0);
  std::fill(weight, weight + wide, 0.0);
  std::fill(corner, corner + wide, 0.0);
  for (int64_t s = 0; s < shifts; ++s) {
    // (A + s)^-1 = scale (scale A + scale s)^-1.
    shift[s] = function.shift[static_cast<size_t>(s)] * scale_;
    weight[s] = function.weight[static_cast<size_t>(s)] / unit * scale_;
  }
  invert_pivots(n, wide, diagonal, off, shift, inverse);
  const auto add_small_parts = [&] {
    for (int64_t p = 1; p < Crew::kParts; ++p)
      for (int64_t i = 0; i < kCells; ++i) small_parts[i] += small_parts[p * kCells + i];
  };

  // The block whose V W^T + W V^T, in `pair`, has not been subtracted yet, from its first column on.
  int64_t pending = n, pending_rows = 0;
  const auto subtract_pending = [&](int64_t i0, int64_t i1) {
    const int64_t from = std::max(i0, pending);
    if (from < i1) symmetric_update(pair, pair + 2 * pending_rows * ld, 2 * pending_rows, out, ld, from, i1, n);
  };

  for (int64_t k0 = (n - 1) / kBlock * kBlock; k0 >= 0; k0 -= kBlock) {
    const int64_t rows = std::min(n - k0, kBlock), k1 = k0 + rows, columns = (rows + 7) / 8 * 8;
    T* w_rows = pair + rows * ld;
    // --- Rows k0 .. k1 of f(T), to the right of k1 in terms of the turned rows.
    for (int64_t i = k0; i < k1; ++i) std::fill(out + i * ld + k0, out + (i + 1) * ld, T(0));
    shifted_ratios(wide, k0, rows, n, off, inverse, weight, corner, ratio, entry, reach, ratios);
    if (k1 < n) nn_accumulate(ratios, wide, row + k1, ld, shifts, out + k0 * ld + k1, ld, rows, ld - k1);
    shifted_rows(shifts, wide, k0, rows, weight, ratio, entry, reach, block, row, ld);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = i; j < rows; ++j) out[(k0 + i) * ld + k0 + j] = static_cast<T>(block[i * kBlock + j]);
    const bool turns = std::any_of(factor + k0, factor + k1, [](double own) { return own != 0.0; });
    if (!turns) continue;
    const T* v_rows = reflectors + k0 * ld;

    crew.run([&](int64_t part) {
      T* gram = small_parts + part * kCells;
      T* own[kBlock];
      for (int64_t i = 0; i < rows; ++i) own[i] = gram + i * kBlock;
      std::fill_n(gram, kCells, T(0));
      for (int64_t j = k0 + part * kTile; j < end; j += Crew::kParts * kTile) {
        const int64_t width = std::min(kTile, end - j);
        turn(v_rows + j, ld, rows, width, turned + j * kBlock, kBlock);
        tn_accumulate(turned + j * kBlock, kBlock, turned + j * kBlock, kBlock, width, T(1), own, rows, columns);
      }
    });
    add_small_parts();
    T turned_s[kCells];
    block_reflector(rows, small_parts, factor + k0, turned_s);

    // --- F V, as rows, of the upper triangle: a tile of F is multiplied as it is and as what it mirrors, just
    // after the update that it was left.
    const Bands bands(k0, n, n >= kWorthParts);
    crew.run([&](int64_t part) {
      const int64_t first = bands.edge[part], last = bands.edge[part + 1];
      T* sums = product + part * kBlock * ld;
      T mirrored[kTile * kTile];
      T* own[kBlock];
      for (int64_t i = 0; i < rows; ++i) std::fill(sums + i * ld + first, sums + i * ld + end, T(0));
      for (int64_t i0 = first; i0 < last; i0 += kTile) {
        const int64_t i1 = std::min(last, i0 + kTile), height = i1 - i0;
        subtract_pending(i0, i1);
        mirror(out, ld, i0, i1, i1);
        constexpr int64_t kColumns = 48;  // what stays in the smallest cache
        for (int64_t j = i0; j < n; j += kColumns) {
          for (int64_t i = 0; i < rows; ++i) own[i] = sums + i * ld + j;
          tn_accumulate(turned + i0 * kBlock, kBlock, out + i0 * ld + j, ld, height, T(1), own, rows,
                        std::min(kColumns, end - j));
        }
        for (int64_t j = i1; j < n; j += kTile) {
          const int64_t width = std::min(kTile, end - j);
          turn(out + i0 * ld + j, ld, height, width, mirrored, kTile);
          for (int64_t i = 0; i < rows; ++i) own[i] = sums + i * ld + i0;
          tn_accumulate(turned + j * kBlock, kBlock, mirrored, kTile, width, T(1), own, rows,
                        (height + 7) / 8 * 8);
        }
      }
      // --- The turned rows: g - (g V) S^T V^T.
      constexpr int64_t kSome = 4;
      for (int64_t s = part * kSome; s < shifts; s += Crew::kParts * kSome) {
        const int64_t some = std::min(kSome, shifts - s);
        T along[kSome * kBlock] = {}, coefficients[kSome * kBlock] = {};
        T* own = row + s * ld + k0;
        nn_accumulate(own, ld, turned + k0 * kBlock, kBlock, end - k0, along, kBlock, some, columns);
        for (T& each : along) each = -each;
        nn_accumulate(along, kBlock, turned_s, kBlock, rows, coefficients, kBlock, some, columns);
        nn_accumulate(coefficients, kBlock, v_rows + k0, ld, rows, own, ld, some, ld - k0);
      }
    });
    // fn(first, last) for a part's columns from k0 on.
    const auto for_columns = [&](int64_t part, const auto& fn) {
      for (int64_t j = k0 + part * kTile; j < end; j += Crew::kParts * kTile) fn(j, std::min(end, j + kTile));
    };
    crew.run([&](int64_t part) {
      T* small = small_parts + part * kCells;
      std::fill_n(small, kCells, T(0));
      for_columns(part, [&](int64_t j0, int64_t j1) {
        for (int64_t p = 1; p < Crew::kParts; ++p)
          add_rows(rows, product + p * kBlock * ld, ld, std::max(j0, bands.edge[p]), j1, product);
        nn_accumulate(product + j0, ld, turned + j0 * kBlock, kBlock, j1 - j0, small, kBlock, rows, columns);
      });
    });
    // --- W = F V S^T - V (S V^T F V S^T) / 2. Rows of W are sums over rows of F V and of V, by the transposes of
    // the coefficients.
    T middle[kCells], turned_middle[kCells], weights[kCells];
    add_small_parts();
    const auto turn_small = [&](const T* from, T* to) {
      for (int64_t q = 0; q < kBlock; ++q)
        for (int64_t i = 0; i < kBlock; ++i)
          to[q * kBlock + i] = i < rows && q < rows ? from[i * kBlock + q] : T(0);
    };
    const auto multiply_by_s = [&](const T* by, T factor_of_all, T* to) {
      T* own[kBlock];
      std::fill_n(to, kCells, T(0));
      for (int64_t i = 0; i < rows; ++i) own[i] = to + i * kBlock;
      tn_accumulate(turned_s, kBlock, by, kBlock, rows, factor_of_all, own, rows, kBlock);
    };
    multiply_by_s(small_parts, T(1), middle);
    turn_small(middle, turned_middle);
    multiply_by_s(turned_middle, T(0.5), weights);
    crew.run([&](int64_t part) {
      for_columns(part, [&](int64_t j0, int64_t j1) {
        T* own[kBlock];
        for (int64_t i = 0; i < rows; ++i) {
          own[i] = w_rows + i * ld + j0;
          std::fill_n(own[i], j1 - j0, T(0));
        }
        tn_accumulate(turned_s, kBlock, product + j0, ld, rows, T(1), own, rows, j1 - j0);
        tn_accumulate(weights, kBlock, v_rows + j0, ld, rows, T(-1), own, rows, j1 - j0);
        fill_operands(pair, ld, rows, v_rows, j0, j1);
      });
    });
    pending = k0;
    pending_rows = rows;
  }
  const Bands bands(0, n);
  crew.run([&](int64_t part) {
    for (int64_t i0 = bands.edge[part]; i0 < bands.edge[part + 1]; i0 += kTile) {
      const int64_t i1 = std::min(bands.edge[part + 1], i0 + kTile);
      subtract_pending(i0, i1);
      mirror(out, ld, i0, i1, n);
    }
  });
}

template <typename T>
void Tridiagonal::apply_in(const ShiftedInverses& function, double unit, Memory<T>& memory, T* out) {
  Crew::gather(n_ * n_ * n_, [&](Crew& crew) { apply_by(crew, function, unit, memory, out); });
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
