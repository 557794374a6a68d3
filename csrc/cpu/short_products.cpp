#include "cpu/short_products.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>

#include "cpu/processor.h"
#include "cpu/vectors.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(DSE_EMULATE_AVX512)
#define DSE_HAS_VNNI 1
#include <immintrin.h>
#else
#define DSE_HAS_VNNI 0
#endif

#define DSE_VNNI 0
#define DSE_KERNELS "cpu/short_products.kernels.h"
#include "cpu/every_isa.h"
#undef DSE_VNNI

#if DSE_HAS_VNNI
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
#define DSE_VNNI 1
#define DSE_ISA avx512vnni
#define DSE_VECTOR_BYTES 64
#define DSE_WHOLE_VECTORS 1
#include "cpu/short_products.kernels.h"
#pragma GCC pop_options
#endif

namespace dse::cpu {
namespace {

bool find_vnni() {
#if DSE_HAS_VNNI
  return kIsa == Isa::kAvx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}
const bool kVnni = find_vnni();

bool wants_short_products() {
  const char* wish = std::getenv("DSE_EXT_INT16");
  if (wish != nullptr && std::string_view(wish) == "never") return false;
  if (wish != nullptr && std::string_view(wish) == "always") return true;
#ifdef DSE_EMULATE_AVX512
  return true;
#else
  return find_vnni();  // kVnni may not have been set yet
#endif
}

#if DSE_HAS_VNNI
#define DSE_CALL_SHORT(function, ...) \
  (kVnni ? avx512vnni::function(__VA_ARGS__) : DSE_CALL_BY_ISA(function, __VA_ARGS__))
#else
#define DSE_CALL_SHORT(function, ...) DSE_CALL_BY_ISA(function, __VA_ARGS__)
#endif

}  // namespace

bool uses_short_products() {
  static const bool uses = wants_short_products();
  return uses;
}

void quantize_columns(const float* panel, int64_t rows, ShortPair* out, float* step) {
  DSE_CALL_SHORT(quantize_columns, panel, rows, out, step);
}

void short_gram_upper(const ShortPair* panels, int64_t height, int64_t pairs, const float* step, double* c,
                      int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  DSE_CALL_SHORT(short_gram_upper, panels, height, pairs, step, c, ldc, i0, i1, j0, j1);
}

void copy_panel(const float* values, int64_t ld, int64_t rows, int64_t width, float* panel) {
  for (int64_t r = 0; r < rows; ++r) {
    float* out = panel + r * kShortPanel;
    std::copy_n(values + r * ld, width, out);
    std::fill(out + width, out + kShortPanel, 0.0f);
  }
}

void ShortMatrix::reserve(int64_t depth, int64_t columns, int64_t panel) {
  depth_ = depth;
  columns_ = columns;
  panel_ = panel;
  const int64_t padded_columns = (columns + panel - 1) / panel * panel;
  data_.reserve(padded_columns * pairs());
  step_.reserve(padded_columns);
}

void ShortMatrix::set_columns(int64_t first, int64_t count, const float* values, int64_t ld) {
  constexpr int64_t kSome = 16;  // columns at a time: whole cache lines are written
  Buffer<int16_t> work(kSome * 2 * pairs());
  for (int64_t c0 = 0; c0 < count; c0 += kSome) {
    const int64_t some = std::min(kSome, count - c0);
    for (int64_t c = 0; c < some; ++c) {
      int16_t* own = work.data() + c * 2 * pairs();
      DSE_CALL_SHORT(quantize_vector, values + (c0 + c) * ld, depth_, own, step_.data() + first + c0 + c);
      if (depth_ % 2 != 0) own[depth_] = 0;
    }
    ShortPair* out = at(first + c0);
    for (int64_t p = 0; p < pairs(); ++p)
      for (int64_t c = 0; c < some; ++c)
        std::memcpy(out + p * panel_ + c, work.data() + 2 * (c * pairs() + p), sizeof(ShortPair));
  }
}

void ShortMatrix::set_panel(int64_t first, const float* values, int64_t ld) {
  float* rows = rows_.reserve(depth_ * kShortPanel);
  copy_panel(values + first, ld, depth_, std::min(kShortPanel, columns_ - first), rows);
  quantize_columns(rows, depth_, at(first), step_.data() + first);
}

void ShortMatrix::clear_columns(int64_t first, int64_t count) {
  std::fill_n(step_.data() + first, count, 0.0f);
  for (int64_t c = first; c < first + count; ++c)
    for (int64_t p = 0; p < pairs(); ++p) at(c)[p * panel_] = 0;
}

void round_as_short(float* rows, int64_t n, int64_t d, bool by_rows) {
  if (by_rows) {
    Buffer<int16_t> whole(d);
    for (int64_t i = 0; i < n; ++i) {
      float step = 0.0f;
      DSE_CALL_SHORT(quantize_vector, rows + i * d, d, whole.data(), &step);
      for (int64_t f = 0; f < d; ++f) rows[i * d + f] = step * static_cast<float>(whole[f]);
    }
    return;
  }
  ShortPair whole[kShortRows / 2 * kShortPanel];
  float panel[kShortRows * kShortPanel], step[kShortPanel];
  for (int64_t begin = 0; begin < n; begin += kShortRows) {
    const int64_t count = std::min(kShortRows, n - begin);
    for (int64_t first = 0; first < d; first += kShortPanel) {
      const int64_t width = std::min(kShortPanel, d - first);
      float* own = rows + begin * d + first;
      copy_panel(own, d, count, width, panel);
      quantize_columns(panel, count, whole, step);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          const ShortPair pair = whole[i / 2 * kShortPanel + j];
          own[i * d + j] = step[j] * static_cast<float>(static_cast<int16_t>(i % 2 == 0 ? pair : pair >> 16));
        }
      }
    }
  }
}

void accumulate_product(const ShortMatrix& a, int64_t m, const ShortMatrix& b, float alpha, float* const* out) {
  constexpr int64_t kMost = 96;
  // What all rows of a block meet of a panel stays in the smallest cache, beside a few columns of A.
  constexpr int64_t kPairs = 128;
  float* shifted[kMost];
  const int64_t width = padded(b.columns());
  for (int64_t i0 = 0; i0 < m; i0 += kMost) {
    const int64_t count = std::min(kMost, m - i0);
    for (int64_t first = 0; first < width; first += b.panel()) {
      for (int64_t i = 0; i < count; ++i) shifted[i] = out[i0 + i] + first;
      for (int64_t p = 0; p < b.pairs(); p += kPairs) {
        DSE_CALL_SHORT(short_accumulate, a.data(i0) + p * a.panel(), a.panel(), b.data(first) + p * b.panel(),
                       b.panel(), std::min(kPairs, b.pairs() - p), a.step() + i0, b.step() + first, alpha,
                       shifted, count, std::min(b.panel(), width - first));
      }
    }
  }
}

}  // namespace dse::cpu
