// The kernels of short_products.h for one instruction set: see every_isa.h. DSE_VNNI: with VPDPWSSD.

#include "cpu/upper_panels.kernels.h"

namespace dse::cpu::DSE_ISA {
namespace {

constexpr int kShortBytes = DSE_VECTOR_BYTES;
constexpr int64_t kShortLanes = kShortBytes / sizeof(ShortPair);
using Pairs = Vec<ShortPair, kShortBytes>;
using Reals = Vec<float, kShortBytes>;
// Of a tile's rows; its columns are three vectors. Twice 12 accumulators and an operand's three fill 32
// registers.
constexpr int kTileRows = 4;

// sum + <a, b> in each lane, of two int16.
DSE_INLINE Pairs multiply_add(const Pairs& sum, const Pairs& a, const Pairs& b) {
#if DSE_VNNI
  return reinterpret_cast<Pairs>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a),
                                                     reinterpret_cast<__m512i>(b)));
#else
  return sum + (((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16));
#endif
}

// R rows of C vectors: the sums of runs are integers, and are added to each other in float32. store(i, v, sum)
// takes what comes of it.
template <int R, int C, typename Store>
DSE_INLINE void short_tile(const ShortPair* a, int64_t lda, const ShortPair* b, int64_t ldb, int64_t pairs,
                           const Store& store) {
  Reals sum[R][C] = {};
  const auto add_run = [&](int64_t count) {
    Pairs acc[R][C] = {};
    for (int64_t r = 0; r < count; ++r, a += lda, b += ldb) {
      Pairs bv[C];
      for (int v = 0; v < C; ++v) bv[v] = *reinterpret_cast<const Pairs*>(b + v * kShortLanes);
      for (int i = 0; i < R; ++i) {
        const Pairs av = a[i] - Pairs{};
        for (int v = 0; v < C; ++v) acc[i][v] = multiply_add(acc[i][v], av, bv[v]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < C; ++v) sum[i][v] += __builtin_convertvector(acc[i][v], Reals);
  };
  constexpr int64_t kRunPairs = kShortRun / 2;
  for (; pairs >= kRunPairs; pairs -= kRunPairs) add_run(kRunPairs);
  if (pairs > 0) add_run(pairs);
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < C; ++v) store(i, v, sum[i][v]);
}

// --- Steps.

// Adding it to a float below 2^22 leaves the rounded float in the low bits.
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
DSE_INLINE int32_t to_integer(float x) {
  return __builtin_bit_cast(int32_t, x + kRoundToInteger) - __builtin_bit_cast(int32_t, kRoundToInteger);
}

// Norms up to 46000 have inner products below 2^31, their roundings included.
constexpr float kShortNorm = 46000.0f, kShortMost = 32766.0f, kLeastMost = 1e-30f;

// What to multiply a vector with, from its largest magnitude and the largest sum of squares of a run of it,
// relative to that; 0 for next to nothing.
DSE_INLINE float inverse_step(float most, float squares) {
  if (!(most > kLeastMost)) return 0.0f;
  // A whole number for the largest: where all are of one size, none is rounded, rather than all alike.
  return std::floor(std::min(kShortMost, kShortNorm / std::sqrt(squares))) / most;
}

void quantize_columns(const float* panel, int64_t rows, ShortPair* out, float* step) {
  constexpr int64_t kWidth = kShortPanel;
  float most[kWidth] = {}, squares[kWidth] = {}, inverse[kWidth];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < kWidth; ++j) most[j] = std::max(most[j], std::abs(panel[r * kWidth + j]));
  for (int64_t j = 0; j < kWidth; ++j) inverse[j] = most[j] > kLeastMost ? 1.0f / most[j] : 0.0f;
  for (int64_t begin = 0; begin < rows; begin += kShortRun) {
    float own[kWidth] = {};
    for (int64_t r = begin; r < std::min(rows, begin + kShortRun); ++r) {
      for (int64_t j = 0; j < kWidth; ++j) {
        const float x = panel[r * kWidth + j] * inverse[j];
        own[j] += x * x;
      }
    }
    for (int64_t j = 0; j < kWidth; ++j) squares[j] = std::max(squares[j], own[j]);
  }
  for (int64_t j = 0; j < kWidth; ++j) {
    inverse[j] = inverse_step(most[j], squares[j]);
    step[j] = inverse[j] > 0.0f ? 1.0f / inverse[j] : 0.0f;
  }
  for (int64_t r = 0; r < rows; r += 2) {
    const float* first = panel + r * kWidth;
    ShortPair* own = out + r / 2 * kWidth;
    if (r + 1 == rows) {
      for (int64_t j = 0; j < kWidth; ++j) own[j] = to_integer(first[j] * inverse[j]) & 0xffff;
      break;
    }
    for (int64_t j = 0; j < kWidth; ++j) {
      const auto low = static_cast<uint32_t>(to_integer(first[j] * inverse[j])) & 0xffffu;
      const auto high = static_cast<uint32_t>(to_integer(first[kWidth + j] * inverse[j])) << 16;
      own[j] = static_cast<ShortPair>(low | high);
    }
  }
}

DSE_INLINE float largest_of(const float* x, int64_t n) {
  constexpr int64_t kLanes = 16;  // side by side
  float part[kLanes] = {}, most = 0.0f;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) part[l] = std::max(part[l], std::abs(x[i + l]));
  for (; i < n; ++i) most = std::max(most, std::abs(x[i]));
  for (const float own : part) most = std::max(most, own);
  return most;
}

// The largest sum of (unit * x)^2 over a run.
DSE_INLINE float largest_squares(const float* x, int64_t n, float unit) {
  constexpr int64_t kLanes = 4;
  using V = Vec<float, kLanes * sizeof(float)>;
  constexpr int64_t kVectors = kShortRun / kLanes;
  const auto squares = [&](int64_t i) {  // of a whole run, four sums side by side
    V sum = {};
    for (int64_t v = 0; v < kVectors; ++v) {
      const V own = *reinterpret_cast<const V*>(x + i + v * kLanes) * unit;
      sum += own * own;
    }
    return sum;
  };
  V most = {};
  int64_t i = 0;
  for (; i + kLanes * kShortRun <= n; i += kLanes * kShortRun) {
    const V a = squares(i), b = squares(i + kShortRun), c = squares(i + 2 * kShortRun),
            d = squares(i + 3 * kShortRun);
    // One run a lane.
    const V ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const V cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const V all = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    most = all > most ? all : most;
  }
  float largest = std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
  for (; i < n; i += kShortRun) {
    float sum = 0.0f;
    for (int64_t j = i; j < std::min(n, i + kShortRun); ++j) sum += x[j] * unit * (x[j] * unit);
    largest = std::max(largest, sum);
  }
  return largest;
}

// One vector, contiguous, to n int16.
void quantize_vector(const float* values, int64_t n, int16_t* out, float* step) {
  const float most = largest_of(values, n), unit = most > kLeastMost ? 1.0f / most : 0.0f;
  const float inverse = inverse_step(most, largest_squares(values, n, unit));
  *step = inverse > 0.0f ? 1.0f / inverse : 0.0f;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int16_t>(to_integer(values[i] * inverse));
}

// --- Products.

template <int R>
DSE_INLINE void short_gram_tile(const ShortPair* a, const ShortPair* b, int64_t pairs, const float* row_step,
                                const float* step, double* c, int64_t ldc, int64_t first, int64_t last) {
  constexpr int C = 3;
  constexpr int64_t kStep = C * kShortLanes;
  for (int64_t j = 0; j < last; j += kStep) {
    if (j + kStep <= first) continue;
    short_tile<R, C>(a, kShortPanel, b + j, kShortPanel, pairs, [&](int i, int v, const Reals& sum) {
      double* dst = c + i * ldc + j + v * kShortLanes;
      const float* own = step + j + v * kShortLanes;
      const auto scale = static_cast<double>(row_step[i]);
      for (int64_t l = 0; l < kShortLanes; ++l)
        dst[l] += scale * static_cast<double>(own[l]) * static_cast<double>(sum[l]);
    });
  }
}

void short_gram_upper(const ShortPair* panels, int64_t height, int64_t pairs, const float* step, double* c,
                      int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  for_each_upper_tile_of_panels<kShortPanel, kTileRows>(
      i0, i1, j0, j1, [&](auto tile_rows, int64_t i, int64_t j, int64_t last) __attribute__((always_inline)) {
        const ShortPair* a = panels + i / kShortPanel * kShortPanel * height + i % kShortPanel;
        short_gram_tile<tile_rows()>(a, panels + j * height, pairs, step + i, step + j, c + i * ldc + j, ldc,
                                     i - j, last);
      });
}

template <int R, int C>
DSE_INLINE void short_accumulate_tile(const ShortPair* a, int64_t lda, const ShortPair* b, int64_t ldb,
                                      int64_t pairs, const float* row_step, const float* step, float alpha,
                                      float* const* out, int64_t j) {
  short_tile<R, C>(a, lda, b + j, ldb, pairs, [&](int i, int v, const Reals& sum) {
    Reals& dst = *reinterpret_cast<Reals*>(out[i] + j + v * kShortLanes);
    dst += row_step[i] * *reinterpret_cast<const Reals*>(step + j + v * kShortLanes) * sum * alpha;
  });
}

template <int R>
DSE_INLINE void short_accumulate_rows(const ShortPair* a, int64_t lda, const ShortPair* b, int64_t ldb,
                                      int64_t pairs, const float* row_step, const float* step, float alpha,
                                      float* const* out, int64_t n) {
  constexpr int C = 3;
  int64_t j = 0;
  for (; j + C * kShortLanes <= n; j += C * kShortLanes)
    short_accumulate_tile<R, C>(a, lda, b, ldb, pairs, row_step, step, alpha, out, j);
  for (; j < n; j += kShortLanes)
    short_accumulate_tile<R, 1>(a, lda, b, ldb, pairs, row_step, step, alpha, out, j);
}

// out[i][j] += alpha row_step[i] step[j] sum_r <a[r * lda + i], b[r * ldb + j]> for i < m, j < n, a multiple
// of 16.
void short_accumulate(const ShortPair* a, int64_t lda, const ShortPair* b, int64_t ldb, int64_t pairs,
                      const float* row_step, const float* step, float alpha, float* const* out, int64_t m,
                      int64_t n) {
  constexpr int R = kTileRows;
  int64_t i = 0;
  for (; i + R <= m; i += R)
    short_accumulate_rows<R>(a + i, lda, b, ldb, pairs, row_step + i, step, alpha, out + i, n);
  for (; i < m; ++i) short_accumulate_rows<1>(a + i, lda, b, ldb, pairs, row_step + i, step, alpha, out + i, n);
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
