// The kernels of products.h for one instruction set: see every_isa.h.

#include "cpu/upper_panels.kernels.h"

namespace dse::cpu::DSE_ISA {
namespace {

constexpr int kBytes = DSE_VECTOR_BYTES;
// The tiles of wide registers (64 bytes, 32 of them) and of narrow ones (32 bytes, 16 of them).
constexpr bool kWideRegisters = kBytes == 64;

// `x - 0`: `x + 0` would be an addition, because it turns -0 into 0.
template <typename V, typename T>
DSE_INLINE V broadcast(T x) {
  return x - V{};
}

// The sum of a vector's halves.
template <typename T, int kSize>
DSE_INLINE Vec<T, kSize / 2> add_halves(const Vec<T, kSize>& v) {
  using Half = Vec<T, kSize / 2>;
  Half half[2];
  __builtin_memcpy(half, &v, sizeof(v));
  return half[0] + half[1];
}

// Sums of vectors, pairwise: the order does not depend on how a vector is mapped to registers. First down to 16
// bytes in registers, the rest from memory for many sums side by side.
template <typename T, int kSize>
DSE_INLINE void partial_sum(const Vec<T, kSize>& v, T* out) {
  if constexpr (kSize == 64) {
    partial_sum<T, 32>(add_halves<T, 64>(v), out);
  } else {
    const auto rest = add_halves<T, 32>(v);
    __builtin_memcpy(out, &rest, sizeof(rest));
  }
}
template <typename T>
DSE_INLINE T finish_sum(const T* part) {
  if constexpr (sizeof(T) == 8) return part[0] + part[1];
  else return (part[0] + part[2]) + (part[1] + part[3]);
}

// R rows against C columns, all accumulators in registers.
template <typename T, int R, int C>
DSE_INLINE void dot_tile(const T* a, const T* b, int64_t ld, T* out, int64_t ldo) {
  using V = Vec<T, kBytes>;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  V acc[R][C] = {};
  for (int64_t p = 0; p < ld; p += kLanes) {
    V bv[C];
    for (int c = 0; c < C; ++c) bv[c] = *reinterpret_cast<const V*>(b + c * ld + p);
    for (int r = 0; r < R; ++r) {
      const V av = *reinterpret_cast<const V*>(a + r * ld + p);
      for (int c = 0; c < C; ++c) acc[r][c] += av * bv[c];
    }
  }
  constexpr int kPart = 16 / sizeof(T);
  T part[R][C * kPart];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) partial_sum<T, kBytes>(acc[r][c], part[r] + c * kPart);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * ldo + c] = finish_sum(part[r] + c * kPart);
}

template <typename T, int R>
DSE_INLINE void dot_rows(const T* a, const T* b, int64_t k, int64_t ld, T* out, int64_t ldo) {
  int64_t c = 0;
  if constexpr (kWideRegisters) {
    for (; c + 6 <= k; c += 6) dot_tile<T, R, 6>(a, b + c * ld, ld, out + c, ldo);
  }
  for (; c + 3 <= k; c += 3) dot_tile<T, R, 3>(a, b + c * ld, ld, out + c, ldo);
  for (; c < k; ++c) dot_tile<T, R, 1>(a, b + c * ld, ld, out + c, ldo);
}

template <typename T>
void row_dots(const T* a, int64_t m, const T* b, int64_t k, int64_t ld, T* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) dot_rows<T, 4>(a + i * ld, b, k, ld, out + i * ldo, ldo);
  for (; i < m; ++i) dot_rows<T, 1>(a + i * ld, b, k, ld, out + i * ldo, ldo);
}

// One row against R others.
template <typename T, int R>
DSE_INLINE void distance_tile(const T* a, const T* const* b, int64_t ld, T* out) {
  using V = Vec<T, kBytes>;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  V acc[R] = {};
  for (int64_t p = 0; p < ld; p += kLanes) {
    const V av = *reinterpret_cast<const V*>(a + p);
    for (int r = 0; r < R; ++r) {
      const V step = av - *reinterpret_cast<const V*>(b[r] + p);
      acc[r] += step * step;
    }
  }
  constexpr int kPart = 16 / sizeof(T);
  T part[R * kPart];
  for (int r = 0; r < R; ++r) partial_sum<T, kBytes>(acc[r], part + r * kPart);
  for (int r = 0; r < R; ++r) out[r] = finish_sum(part + r * kPart);
}

template <typename T>
void squared_distances(const T* a, const T* b, int64_t ld, const int64_t* rows, int64_t count, T* out) {
  constexpr int R = kWideRegisters ? 8 : 4;
  const T* row[R];
  const auto take = [&](int64_t first, int64_t n) {
    for (int64_t r = 0; r < n; ++r) row[r] = b + (rows != nullptr ? rows[first + r] : first + r) * ld;
  };
  int64_t i = 0;
  for (; i + R <= count; i += R) {
    take(i, R);
    distance_tile<T, R>(a, row, ld, out + i);
  }
  for (; i + 2 <= count; i += 2) {
    take(i, 2);
    distance_tile<T, 2>(a, row, ld, out + i);
  }
  if (i < count) {
    take(i, 1);
    distance_tile<T, 1>(a, row, ld, out + i);
  }
}

// Outer-product tile of A^T B: R rows of C vectors. store(i, v, sum) takes the sums.
template <typename T, int kSize, int R, int C, typename Store>
DSE_INLINE void tn_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, const Store& store) {
  using V = Vec<T, kSize>;
  constexpr int64_t kLanes = kSize / sizeof(T);
  V acc[R][C] = {};
  for (int64_t r = 0; r < depth; ++r) {
    V bv[C];
    for (int v = 0; v < C; ++v) bv[v] = *reinterpret_cast<const V*>(b + r * ldb + v * kLanes);
    for (int i = 0; i < R; ++i) {
      const V av = broadcast<V>(a[r * lda + i]);
      for (int v = 0; v < C; ++v) acc[i][v] += av * bv[v];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < C; ++v) store(i, v, acc[i][v]);
}

// --- Upper triangles in panels of kGramPanel columns: three vectors of eight, or twice three of four.

template <typename T>
constexpr int kGramBytes = sizeof(T) == 8 ? kBytes : 32;
constexpr int kGramRows = kWideRegisters ? 8 : 4;

// With fewer than three vectors, those are the last ones.
template <typename T, int R, int C = 3>
DSE_INLINE void gram_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t rows, T* c, int64_t ldc) {
  using V = Vec<T, kGramBytes<T>>;
  constexpr int64_t kLanes = kGramBytes<T> / sizeof(T);
  for (int64_t j = (3 - C) * kLanes; j < kGramPanel; j += 3 * kLanes) {
    tn_tile<T, kGramBytes<T>, R, C>(a, lda, b + j, ldb, rows, [&](int i, int v, const V& sum) {
      *reinterpret_cast<V*>(c + i * ldc + j + v * kLanes) += sum;
    });
  }
}

// Of two panels of float32.
DSE_INLINE void double_gram_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, float* c,
                                 int64_t ldc) {
  constexpr int kWide = 64;
  constexpr int64_t kLanes = kWide / sizeof(float);
  static_assert(3 * kLanes == 2 * kGramPanel);
  tn_tile<float, kWide, kGramRows, 3>(a, lda, b, ldb, rows, [&](int i, int v, const Vec<float, kWide>& sum) {
    *reinterpret_cast<Vec<float, kWide>*>(c + i * ldc + v * kLanes) += sum;
  });
}

// Tiles wholly below the diagonal are left out, and so are blocks of eight columns where vectors are as wide.
// a(i) is the left operand from column i on.
template <typename T, typename Left>
DSE_INLINE void gram_column(const Left& a, int64_t lda, const T* b, int64_t ldb, int64_t rows, T* c, int64_t ldc,
                            int64_t i0, int64_t i1, int64_t j) {
  constexpr int R = kGramRows;
  constexpr bool by_eight = kGramBytes<T> / sizeof(T) == 8;
  int64_t i = i0;
  const int64_t whole = by_eight ? j + 8 : j + kGramPanel;
  for (; i + R <= i1 && i < whole; i += R) gram_tile<T, R>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
  if constexpr (by_eight) {
    for (; i >= j + 8 && i + R <= i1 && i < j + 16; i += R)
      gram_tile<T, R, 2>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
    for (; i >= j + 16 && i + R <= i1 && i < j + 24; i += R)
      gram_tile<T, R, 1>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
  }
  for (; i + 2 <= i1 && i < j + kGramPanel; i += 2)
    gram_tile<T, 2>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
  for (; i < i1 && i < j + kGramPanel; ++i) gram_tile<T, 1>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
}

template <typename T>
void tn_product_upper(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t rows, T* c, int64_t ldc,
                      int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const auto left = [&](int64_t i) { return a + i; };
  int64_t j = j0;
  if constexpr (sizeof(T) == 4 && kWideRegisters) {
    // Two panels at a time make three whole registers, in rows above their diagonal.
    for (; j + 2 * kGramPanel <= j1; j += 2 * kGramPanel) {
      int64_t i = i0;
      for (; i + kGramRows <= i1 && i + kGramRows <= j; i += kGramRows)
        double_gram_tile(a + i, lda, b + j, ldb, rows, c + i * ldc + j, ldc);
      for (const int64_t own : {j, j + kGramPanel})
        gram_column<T>(left, lda, b + own, ldb, rows, c, ldc, i, i1, own);
    }
  }
  for (; j < j1; j += kGramPanel) gram_column<T>(left, lda, b + j, ldb, rows, c, ldc, i0, i1, j);
}

void panel_gram_upper(const double* panels, int64_t rows, double* c, int64_t ldc, int64_t i0, int64_t i1,
                      int64_t j0, int64_t j1) {
  const auto left = [&](int64_t i) { return panels + i / kGramPanel * kGramPanel * rows + i % kGramPanel; };
  for (int64_t j = j0; j < j1; j += kGramPanel) {
    gram_column<double>(left, kGramPanel, panels + j * rows, kGramPanel, rows, c, ldc, i0, i1, j);
  }
}

// Columns first .. last of a panel, whole tiles, but for those below the diagonal of row i.
template <int R>
DSE_INLINE void narrow_gram_tile(const float* a, const float* b, int64_t rows, double* c, int64_t ldc,
                                 int64_t first, int64_t last) {
  using V = Vec<float, kBytes>;
  constexpr int64_t kLanes = kBytes / sizeof(float);
  constexpr int C = 3;
  constexpr int64_t kStep = C * kLanes;
  for (int64_t j = 0; j < last; j += kStep) {
    if (j + kStep <= first) continue;
    tn_tile<float, kBytes, R, C>(a, kNarrowPanel, b + j, kNarrowPanel, rows, [&](int i, int v, const V& sum) {
      double* dst = c + i * ldc + j + v * kLanes;
      for (int64_t l = 0; l < kLanes; ++l) dst[l] += static_cast<double>(sum[l]);
    });
  }
}

void panel_gram_upper(const float* panels, int64_t rows, double* c, int64_t ldc, int64_t i0, int64_t i1,
                      int64_t j0, int64_t j1) {
  for_each_upper_tile_of_panels<kNarrowPanel, kWideRegisters ? 8 : 4>(
      i0, i1, j0, j1, [&](auto tile_rows, int64_t i, int64_t j, int64_t last) __attribute__((always_inline)) {
        const float* a = panels + i / kNarrowPanel * kNarrowPanel * rows + i % kNarrowPanel;
        narrow_gram_tile<tile_rows()>(a, panels + j * rows, rows, c + i * ldc + j, ldc, i - j, last);
      });
}

// --- Products that are added to rows anywhere.

template <typename T, int kSize, int R, int C>
DSE_INLINE void accumulate_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T alpha,
                                T* const* out, int64_t j) {
  using V = Vec<T, kSize>;
  constexpr int64_t kLanes = kSize / sizeof(T);
  tn_tile<T, kSize, R, C>(a, lda, b + j, ldb, depth, [&](int i, int v, const V& sum) {
    *reinterpret_cast<V*>(out[i] + j + v * kLanes) += alpha * sum;
  });
}

template <typename T, int R>
DSE_INLINE void accumulate_rows(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T alpha,
                                T* const* out, int64_t n) {
  constexpr int64_t kLanes = kBytes / sizeof(T);
  constexpr int C = 3;
  int64_t j = 0;
  for (; j + C * kLanes <= n; j += C * kLanes)
    accumulate_tile<T, kBytes, R, C>(a, lda, b, ldb, depth, alpha, out, j);
  for (; j + kLanes <= n; j += kLanes) accumulate_tile<T, kBytes, R, 1>(a, lda, b, ldb, depth, alpha, out, j);
  if constexpr (kLanes == 16) {  // columns come in multiples of eight
    if (j < n) accumulate_tile<T, kBytes / 2, R, 1>(a, lda, b, ldb, depth, alpha, out, j);
  }
}

template <typename T>
void tn_accumulate(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T alpha, T* const* out,
                   int64_t m, int64_t n) {
  constexpr int R = kWideRegisters ? 8 : 4;
  int64_t i = 0;
  for (; i + R <= m; i += R) accumulate_rows<T, R>(a + i, lda, b, ldb, depth, alpha, out + i, n);
  for (; i + 2 <= m; i += 2) accumulate_rows<T, 2>(a + i, lda, b, ldb, depth, alpha, out + i, n);
  for (; i < m; ++i) accumulate_rows<T, 1>(a + i, lda, b, ldb, depth, alpha, out + i, n);
}

// --- Products of rows, A B.

// Outer-product tile, R rows of C vectors of A B and, with kHalf, of one half as wide; they are added to `out`.
template <typename T, int R, int C, bool kHalf = false>
DSE_INLINE void nn_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo) {
  using V = Vec<T, kBytes>;
  using Half = Vec<T, kBytes / 2>;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  V acc[R][C + 1] = {};
  Half rest[R] = {};
  for (int64_t r = 0; r < depth; ++r) {
    const T* row = b + r * ldb;
    V bv[C + 1];
    Half last;
    for (int v = 0; v < C; ++v) bv[v] = *reinterpret_cast<const V*>(row + v * kLanes);
    if constexpr (kHalf) last = *reinterpret_cast<const Half*>(row + C * kLanes);
    for (int i = 0; i < R; ++i) {
      const V av = broadcast<V>(a[i * lda + r]);
      for (int v = 0; v < C; ++v) acc[i][v] += av * bv[v];
      if constexpr (kHalf) rest[i] += broadcast<Half>(a[i * lda + r]) * last;
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < C; ++v) *reinterpret_cast<V*>(out + i * ldo + v * kLanes) += acc[i][v];
    if constexpr (kHalf) *reinterpret_cast<Half*>(out + i * ldo + C * kLanes) += rest[i];
  }
}

template <typename T, int R>
DSE_INLINE void nn_rows(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo,
                        int64_t n) {
  constexpr int64_t kLanes = kBytes / sizeof(T);
  int64_t j = 0;
  for (; j + 3 * kLanes <= n; j += 3 * kLanes) nn_tile<T, R, 3>(a, lda, b + j, ldb, depth, out + j, ldo);
  if constexpr (kLanes == 16) {  // columns come in multiples of eight, many of them by 24
    for (; j + 24 <= n; j += 24) nn_tile<T, R, 1, true>(a, lda, b + j, ldb, depth, out + j, ldo);
    for (; j < n; j += 8) nn_tile<T, R, 0, true>(a, lda, b + j, ldb, depth, out + j, ldo);
  } else {
    for (; j < n; j += kLanes) nn_tile<T, R, 1>(a, lda, b + j, ldb, depth, out + j, ldo);
  }
}

template <typename T>
void nn_accumulate(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo,
                   int64_t m, int64_t n) {
  constexpr int R = kGramRows;
  int64_t i = 0;
  for (; i + R <= m; i += R) nn_rows<T, R>(a + i * lda, lda, b, ldb, depth, out + i * ldo, ldo, n);
  if constexpr (R > 4) {
    for (; i + 4 <= m; i += 4) nn_rows<T, 4>(a + i * lda, lda, b, ldb, depth, out + i * ldo, ldo, n);
  }
  for (; i + 2 <= m; i += 2) nn_rows<T, 2>(a + i * lda, lda, b, ldb, depth, out + i * ldo, ldo, n);
  for (; i < m; ++i) nn_rows<T, 1>(a + i * lda, lda, b, ldb, depth, out + i * ldo, ldo, n);
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
