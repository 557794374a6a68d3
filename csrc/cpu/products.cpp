#include "cpu/products.h"

// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace dse::cpu {
namespace {

#define DSE_INLINE inline __attribute__((always_inline))

template <typename T, int kBytes>
struct VecOf;
template <>
struct VecOf<float, 16> {
  typedef float type __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct VecOf<double, 16> {
  typedef double type __attribute__((vector_size(16), aligned(8), may_alias));
};
template <>
struct VecOf<float, 32> {
  typedef float type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct VecOf<double, 32> {
  typedef double type __attribute__((vector_size(32), aligned(8), may_alias));
};
template <>
struct VecOf<float, 64> {
  typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
};
template <>
struct VecOf<double, 64> {
  typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
};

template <typename V, typename T>
DSE_INLINE V broadcast(T x) {
  return V{} + x;
}

// The sum of a vector's halves.
template <typename T, int kBytes>
DSE_INLINE typename VecOf<T, kBytes / 2>::type add_halves(const typename VecOf<T, kBytes>::type& v) {
  using Half = typename VecOf<T, kBytes / 2>::type;
  Half half[2];
  __builtin_memcpy(half, &v, sizeof(v));
  return half[0] + half[1];
}

// Sums of vectors, pairwise: the order does not depend on how a vector is mapped to registers. First down to 16
// bytes in registers, the rest from memory for many sums side by side.
template <typename T, int kBytes>
DSE_INLINE void partial_sum(const typename VecOf<T, kBytes>::type& v, T* out) {
  if constexpr (kBytes == 64) {
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
template <typename T, int kBytes, int R, int C>
DSE_INLINE void dot_tile(const T* a, const T* b, int64_t ld, T* out, int64_t ldo) {
  using V = typename VecOf<T, kBytes>::type;
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

template <typename T, int kBytes, int R>
DSE_INLINE void dot_rows(const T* a, const T* b, int64_t k, int64_t ld, T* out, int64_t ldo) {
  int64_t c = 0;
  if constexpr (kBytes == 64) {
    for (; c + 6 <= k; c += 6) dot_tile<T, kBytes, R, 6>(a, b + c * ld, ld, out + c, ldo);
  }
  for (; c + 3 <= k; c += 3) dot_tile<T, kBytes, R, 3>(a, b + c * ld, ld, out + c, ldo);
  for (; c < k; ++c) dot_tile<T, kBytes, R, 1>(a, b + c * ld, ld, out + c, ldo);
}

template <int kBytes, typename T>
DSE_INLINE void row_dots_impl(const T* a, int64_t m, const T* b, int64_t k, int64_t ld, T* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) dot_rows<T, kBytes, 4>(a + i * ld, b, k, ld, out + i * ldo, ldo);
  for (; i < m; ++i) dot_rows<T, kBytes, 1>(a + i * ld, b, k, ld, out + i * ldo, ldo);
}

// One row against R others.
template <typename T, int kBytes, int R>
DSE_INLINE void distance_tile(const T* a, const T* const* b, int64_t ld, T* out) {
  using V = typename VecOf<T, kBytes>::type;
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

template <int kBytes, typename T>
DSE_INLINE void squared_distances_impl(const T* a, const T* b, int64_t ld, const int64_t* rows, int64_t count,
                                       T* out) {
  constexpr int R = kBytes == 64 ? 8 : 4;
  const T* row[R];
  const auto take = [&](int64_t first, int64_t n) {
    for (int64_t r = 0; r < n; ++r) row[r] = b + (rows != nullptr ? rows[first + r] : first + r) * ld;
  };
  int64_t i = 0;
  for (; i + R <= count; i += R) {
    take(i, R);
    distance_tile<T, kBytes, R>(a, row, ld, out + i);
  }
  for (; i + 2 <= count; i += 2) {
    take(i, 2);
    distance_tile<T, kBytes, 2>(a, row, ld, out + i);
  }
  if (i < count) {
    take(i, 1);
    distance_tile<T, kBytes, 1>(a, row, ld, out + i);
  }
}

// Outer-product tile of A^T B: R rows of C vectors. store(i, v, acc) takes the sums.
template <typename T, int kBytes, int R, int C, typename Store>
DSE_INLINE void tn_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, const Store& store) {
  using V = typename VecOf<T, kBytes>::type;
  constexpr int64_t kLanes = kBytes / sizeof(T);
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

// kGramPanel columns: three 64-byte vectors at once, or twice three 32-byte ones. With fewer than three, those
// are the last ones.
template <int kBytes, int R, int C = 3>
DSE_INLINE void gram_tile(const double* a, int64_t lda, const double* b, int64_t ldb, int64_t rows, double* c,
                          int64_t ldc) {
  using V = typename VecOf<double, kBytes>::type;
  constexpr int64_t kLanes = kBytes / sizeof(double);
  for (int64_t j = (3 - C) * kLanes; j < kGramPanel; j += 3 * kLanes) {
    tn_tile<double, kBytes, R, C>(a, lda, b + j, ldb, rows, [&](int i, int v, const V& sum) {
      *reinterpret_cast<V*>(c + i * ldc + j + v * kLanes) += sum;
    });
  }
}

// Tiles wholly below the diagonal are left out, and so are blocks of eight columns where vectors are as wide.
// a(i) is the left operand from column i on.
template <int kBytes, typename Left>
DSE_INLINE void gram_column(const Left& a, int64_t lda, const double* b, int64_t ldb, int64_t rows, double* c,
                            int64_t ldc, int64_t i0, int64_t i1, int64_t j) {
  constexpr int R = kBytes == 64 ? 8 : 4;
  int64_t i = i0;
  const int64_t whole = kBytes == 64 ? j + R : j + kGramPanel;
  for (; i + R <= i1 && i < whole; i += R) gram_tile<kBytes, R>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
  if constexpr (kBytes == 64) {
    if (i == j + R && i + R <= i1) {
      gram_tile<kBytes, R, 2>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
      i += R;
    }
    if (i == j + 2 * R && i + R <= i1) {
      gram_tile<kBytes, R, 1>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
      i += R;
    }
  }
  for (; i + 2 <= i1 && i < j + kGramPanel; i += 2)
    gram_tile<kBytes, 2>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
  for (; i < i1 && i < j + kGramPanel; ++i) gram_tile<kBytes, 1>(a(i), lda, b, ldb, rows, c + i * ldc + j, ldc);
}

template <int kBytes>
DSE_INLINE void tn_product_upper_impl(const double* a, int64_t lda, const double* b, int64_t ldb, int64_t rows,
                                      double* c, int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const auto left = [&](int64_t i) { return a + i; };
  for (int64_t j = j0; j < j1; j += kGramPanel) {
    gram_column<kBytes>(left, lda, b + j, ldb, rows, c, ldc, i0, i1, j);
  }
}

template <int kBytes>
DSE_INLINE void panel_gram_upper_impl(const double* panels, int64_t rows, double* c, int64_t ldc, int64_t i0,
                                      int64_t i1, int64_t j0, int64_t j1) {
  const auto left = [&](int64_t i) { return panels + i / kGramPanel * kGramPanel * rows + i % kGramPanel; };
  for (int64_t j = j0; j < j1; j += kGramPanel) {
    gram_column<kBytes>(left, kGramPanel, panels + j * rows, kGramPanel, rows, c, ldc, i0, i1, j);
  }
}

template <int kBytes, int R>
DSE_INLINE void narrow_gram_tile(const float* a, const float* b, int64_t rows, double* c, int64_t ldc) {
  using V = typename VecOf<float, kBytes>::type;
  constexpr int64_t kLanes = kBytes / sizeof(float);
  constexpr int C = kBytes == 64 ? 3 : 2;
  for (int64_t j = 0; j < kNarrowPanel; j += C * kLanes) {
    tn_tile<float, kBytes, R, C>(a, kNarrowPanel, b + j, kNarrowPanel, rows, [&](int i, int v, const V& sum) {
      double* dst = c + i * ldc + j + v * kLanes;
      for (int64_t l = 0; l < kLanes; ++l) dst[l] += static_cast<double>(sum[l]);
    });
  }
}

template <int kBytes>
DSE_INLINE void panel_gram_upper_impl(const float* panels, int64_t rows, double* c, int64_t ldc, int64_t i0,
                                      int64_t i1, int64_t j0, int64_t j1) {
  constexpr int R = kBytes == 64 ? 8 : 6;
  const auto left = [&](int64_t i) { return panels + i / kNarrowPanel * kNarrowPanel * rows + i % kNarrowPanel; };
  for (int64_t j = j0; j < j1; j += kNarrowPanel) {
    const float* b = panels + j * rows;
    int64_t i = i0;
    for (; i + R <= i1 && i < j + kNarrowPanel; i += R)
      narrow_gram_tile<kBytes, R>(left(i), b, rows, c + i * ldc + j, ldc);
    for (; i < i1 && i < j + kNarrowPanel; ++i)
      narrow_gram_tile<kBytes, 1>(left(i), b, rows, c + i * ldc + j, ldc);
  }
}

template <typename T, int kBytes, int R, int C>
DSE_INLINE void accumulate_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T alpha,
                                T* const* out, int64_t j) {
  using V = typename VecOf<T, kBytes>::type;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  tn_tile<T, kBytes, R, C>(a, lda, b + j, ldb, depth, [&](int i, int v, const V& sum) {
    *reinterpret_cast<V*>(out[i] + j + v * kLanes) += alpha * sum;
  });
}

template <typename T, int kBytes, int R>
DSE_INLINE void accumulate_rows(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T alpha,
                                T* const* out, int64_t n) {
  constexpr int64_t kLanes = kBytes / sizeof(T);
  constexpr int C = kBytes == 64 ? 3 : 2;
  int64_t j = 0;
  for (; j + C * kLanes <= n; j += C * kLanes)
    accumulate_tile<T, kBytes, R, C>(a, lda, b, ldb, depth, alpha, out, j);
  for (; j < n; j += kLanes) accumulate_tile<T, kBytes, R, 1>(a, lda, b, ldb, depth, alpha, out, j);
}

template <int kBytes, typename T>
DSE_INLINE void tn_accumulate_impl(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T alpha,
                                   T* const* out, int64_t m, int64_t n) {
  constexpr int R = kBytes == 64 ? 8 : 6;
  int64_t i = 0;
  for (; i + R <= m; i += R) accumulate_rows<T, kBytes, R>(a + i, lda, b, ldb, depth, alpha, out + i, n);
  for (; i + 2 <= m; i += 2) accumulate_rows<T, kBytes, 2>(a + i, lda, b, ldb, depth, alpha, out + i, n);
  for (; i < m; ++i) accumulate_rows<T, kBytes, 1>(a + i, lda, b, ldb, depth, alpha, out + i, n);
}

}  // namespace

// One function for each instruction set, and a third that picks. Not by target_clones: the tiles differ.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace {
enum class Level { kBaseline, kAvx2, kAvx512 };
Level processor_level() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    return Level::kAvx512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Level::kAvx2 : Level::kBaseline;
}
const Level kLevel = processor_level();
}  // namespace

#define DSE_BY_PROCESSOR(name, parameters, arguments)                                                  \
  namespace {                                                                                          \
  __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void name##_avx512 parameters {    \
    name##_impl<64> arguments;                                                                         \
  }                                                                                                    \
  __attribute__((target("arch=x86-64-v3"))) void name##_avx2 parameters { name##_impl<32> arguments; } \
  void name##_baseline parameters { name##_impl<32> arguments; }                                       \
  }                                                                                                    \
  void name parameters {                                                                               \
    if (kLevel == Level::kAvx512) name##_avx512 arguments;                                             \
    else if (kLevel == Level::kAvx2) name##_avx2 arguments;                                            \
    else name##_baseline arguments;                                                                    \
  }
#else
#define DSE_BY_PROCESSOR(name, parameters, arguments) \
  void name parameters { name##_impl<32> arguments; }
#endif

#define DSE_ROW_DOTS(T)                                                                                       \
  DSE_BY_PROCESSOR(row_dots, (const T* a, int64_t m, const T* b, int64_t k, int64_t ld, T* out, int64_t ldo), \
                   (a, m, b, k, ld, out, ldo))
DSE_ROW_DOTS(float)
DSE_ROW_DOTS(double)

#define DSE_SQUARED_DISTANCES(T)                                                                     \
  DSE_BY_PROCESSOR(squared_distances,                                                                \
                   (const T* a, const T* b, int64_t ld, const int64_t* rows, int64_t count, T* out), \
                   (a, b, ld, rows, count, out))
DSE_SQUARED_DISTANCES(float)
DSE_SQUARED_DISTANCES(double)

#define DSE_TN_ACCUMULATE(T)                                                                                 \
  DSE_BY_PROCESSOR(tn_accumulate,                                                                            \
                   (const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T alpha, T* const* out, \
                    int64_t m, int64_t n),                                                                   \
                   (a, lda, b, ldb, depth, alpha, out, m, n))
DSE_TN_ACCUMULATE(float)
DSE_TN_ACCUMULATE(double)

DSE_BY_PROCESSOR(tn_product_upper,
                 (const double* a, int64_t lda, const double* b, int64_t ldb, int64_t rows, double* c,
                  int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1),
                 (a, lda, b, ldb, rows, c, ldc, i0, i1, j0, j1))

#define DSE_PANEL_GRAM(T)                                                                                      \
  DSE_BY_PROCESSOR(                                                                                            \
      panel_gram_upper,                                                                                        \
      (const T* panels, int64_t rows, double* c, int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1), \
      (panels, rows, c, ldc, i0, i1, j0, j1))
DSE_PANEL_GRAM(float)
DSE_PANEL_GRAM(double)

}  // namespace dse::cpu
