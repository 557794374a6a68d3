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
#if DSE_HAS_VNNI && defined(__linux__)
#define DSE_HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define DSE_HAS_AMX 0
#endif

#define DSE_TILES 0
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
#include "cpu/short_products.kernels.h"
#undef DSE_ISA
#undef DSE_VECTOR_BYTES
#undef DSE_VNNI
#pragma GCC pop_options
#endif
#undef DSE_TILES

// Products in tiles, by the processor's or, everywhere and for tests, in what stands for them.
#define DSE_TILES 1
#define DSE_VECTOR_BYTES 64
#if DSE_HAS_AMX
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,amx-tile,amx-int8,prefer-vector-width=512")
#define DSE_AMX 1
#define DSE_ISA amx
#include "cpu/short_steps.kernels.h"
#include "cpu/tile_products.kernels.h"
#undef DSE_AMX
#undef DSE_ISA
#pragma GCC pop_options
#endif
#define DSE_AMX 0
#define DSE_ISA tiled
#include "cpu/short_steps.kernels.h"
#include "cpu/tile_products.kernels.h"
#undef DSE_AMX
#undef DSE_ISA
#undef DSE_VECTOR_BYTES
#undef DSE_TILES

namespace dse::cpu {
namespace {

enum class ShortUse { kNever, kVectors, kTiles };

bool find_vnni() {
#if DSE_HAS_VNNI
  return kIsa == Isa::kAvx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}
const bool kVnni = find_vnni();

// Whether there are tiles and the system lets this process have them: it has to be asked for their large state.
[[maybe_unused]] bool find_amx() {
#if DSE_HAS_AMX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return kIsa == Isa::kAvx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
[[maybe_unused]] bool has_amx() {
  static const bool has = find_amx();
  return has;
}

ShortUse find_short_use() {
  const char* variable = std::getenv("DSE_EXT_INT16");
  const std::string_view wish = variable != nullptr ? variable : "auto";
  if (wish == "never") return ShortUse::kNever;
  if (wish == "vectors") return ShortUse::kVectors;
  if (wish == "tiles") return ShortUse::kTiles;
#if defined(DSE_EMULATE_TILES)
  return ShortUse::kTiles;
#elif defined(DSE_EMULATE_AVX512)
  return ShortUse::kVectors;
#else
  if (has_amx()) return ShortUse::kTiles;
  // find_vnni(): kVnni may not have been set yet.
  return wish == "always" || find_vnni() ? ShortUse::kVectors : ShortUse::kNever;
#endif
}

ShortUse short_use() {
  static const ShortUse use = find_short_use();
  return use;
}

#if DSE_HAS_VNNI
#define DSE_CALL_VECTORS(function, ...) \
  (kVnni ? avx512vnni::function(__VA_ARGS__) : DSE_CALL_BY_ISA(function, __VA_ARGS__))
#else
#define DSE_CALL_VECTORS(function, ...) DSE_CALL_BY_ISA(function, __VA_ARGS__)
#endif

#if DSE_HAS_AMX
#define DSE_CALL_TILES(function, ...) (has_amx() ? amx::function(__VA_ARGS__) : tiled::function(__VA_ARGS__))
#else
#define DSE_CALL_TILES(function, ...) tiled::function(__VA_ARGS__)
#endif

// Integers are kept as the products want them.
#define DSE_CALL_STEPS(function, ...) \
  (uses_tiles() ? DSE_CALL_TILES(function, __VA_ARGS__) : DSE_CALL_VECTORS(function, __VA_ARGS__))

}  // namespace

bool uses_short_products() { return short_use() != ShortUse::kNever; }
bool uses_tiles() { return short_use() == ShortUse::kTiles; }

void quantize_columns(const float* panel, int64_t rows, ShortPair* out, float* step) {
  DSE_CALL_STEPS(quantize_columns, panel, rows, out, step);
}

void short_gram_upper(const ShortPair* panels, int64_t height, int64_t pairs, const float* step, double* c,
                      int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  if (uses_tiles()) DSE_CALL_TILES(tile_gram_upper, panels, height, pairs, step, c, ldc, i0, i1, j0, j1);
  else DSE_CALL_VECTORS(short_gram_upper, panels, height, pairs, step, c, ldc, i0, i1, j0, j1);
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
  data_.reserve(padded_columns * pairs() + kShortSlack);
  step_.reserve(padded_columns);
}

void ShortMatrix::set_columns(int64_t first, int64_t count, const float* values, int64_t ld) {
  constexpr int64_t kSome = 16;  // columns at a time: whole cache lines are written
  Buffer<int16_t> work(kSome * 2 * pairs());
  for (int64_t c0 = 0; c0 < count; c0 += kSome) {
    const int64_t some = std::min(kSome, count - c0);
    for (int64_t c = 0; c < some; ++c) {
      int16_t* own = work.data() + c * 2 * pairs();
      DSE_CALL_STEPS(quantize_vector, values + (c0 + c) * ld, depth_, own, step_.data() + first + c0 + c);
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

// The vectors' steps in any case, whose integers are not encoded. Tiles that are emulated may round the largest
// number of a vector otherwise, by one.
void round_as_short(float* rows, int64_t n, int64_t d, bool by_rows) {
  if (by_rows) {
    Buffer<int16_t> whole(d);
    for (int64_t i = 0; i < n; ++i) {
      float step = 0.0f;
      DSE_CALL_VECTORS(quantize_vector, rows + i * d, d, whole.data(), &step);
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
      DSE_CALL_VECTORS(quantize_columns, panel, count, whole, step);
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
  const int64_t width = padded(b.columns());
  if (uses_tiles()) {
    DSE_CALL_TILES(tile_accumulate, a.data(0), a.panel(), b.data(0), b.pairs(), a.step(), b.step(), alpha, out, m,
                   width);
    return;
  }
  constexpr int64_t kMost = 96;
  // What all rows of a block meet of a panel stays in the smallest cache, beside a few columns of A.
  constexpr int64_t kPairs = 128;
  float* shifted[kMost];
  for (int64_t i0 = 0; i0 < m; i0 += kMost) {
    const int64_t count = std::min(kMost, m - i0);
    for (int64_t first = 0; first < width; first += b.panel()) {
      for (int64_t i = 0; i < count; ++i) shifted[i] = out[i0 + i] + first;
      for (int64_t p = 0; p < b.pairs(); p += kPairs) {
        DSE_CALL_VECTORS(short_accumulate, a.data(i0) + p * a.panel(), a.panel(), b.data(first) + p * b.panel(),
                         b.panel(), std::min(kPairs, b.pairs() - p), a.step() + i0, b.step() + first, alpha,
                         shifted, count, std::min(b.panel(), width - first));
      }
    }
  }
}

}  // namespace dse::cpu
