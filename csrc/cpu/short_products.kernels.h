// The kernels of short_products.h for one instruction set: see every_isa.h. DSE_VNNI: with VPDPWSSD.

#include "cpu/short_steps.kernels.h"
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
