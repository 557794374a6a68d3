// The products of short_products.h in AMX's tiles, or, with DSE_AMX 0, in what stands for them: included after
// short_steps.kernels.h.
//
// Tiles multiply bytes: 16 columns of A with 16 of B, 64 bytes of each. An int16 is 256 h + l with two signed
// bytes (encode()), and a product the sum of 65536 h h', 256 (h l' + l h') and l l'. B is used as it lies in
// memory, pairs of (l, h); columns of A are turned, and each is there three times: (0, h) meets h', (l, 0) meets
// l', and (h, l) meets both crosswise. Sums over a chunk of the depth are exact, and rounded to float32 once.

namespace dse::cpu::DSE_ISA {
namespace {

constexpr int64_t kTileSide = 16;                      // columns of either operand, and pairs
constexpr int64_t kTileCells = kTileSide * kTileSide;  // of 32 bits
constexpr int64_t kTileChunk = 8 * kTileSide;          // pairs at a time: what meets fits the smallest cache
// Sums of one kind stay integers that float32 holds.
static_assert(2 * kTileChunk * 2 * (1 << 14) <= 1 << 24);
constexpr int64_t kBeside = 3;  // rows of sums between two products of tiles

using Row = Vec<ShortPair, 64>;
using Sums = Vec<float, 64>;

// --- The tiles.
#if DSE_AMX

#define DSE_TILE_ZERO(tile) _tile_zero(tile)
#define DSE_TILE_LOAD(tile, from, bytes) _tile_loadd(tile, from, bytes)
#define DSE_TILE_DOT(sum, a, b) _tile_dpbssd(sum, a, b)
#define DSE_TILE_STORE(tile, to) _tile_stored(tile, to, 64)

// The tiles of this thread, as long as it lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.bytes[tile] = 64;
      shapes.rows[tile] = 16;
    }
    // Compilers take it for a read of the first eight bytes, and might leave out or postpone the others.
    asm volatile("" : : "r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#else

struct Tiles {
  alignas(64) ShortPair cells[8][kTileCells];

  void load(int tile, const void* from, int64_t bytes) {
    for (int64_t r = 0; r < kTileSide; ++r)
      std::memcpy(cells[tile] + r * kTileSide, static_cast<const char*>(from) + r * bytes, 64);
  }
  void dot(int sum, int a, int b) {
    const auto byte = [&](int tile, int64_t row, int64_t k) {
      return static_cast<ShortPair>(reinterpret_cast<const int8_t*>(cells[tile] + row * kTileSide)[k]);
    };
    for (int64_t i = 0; i < kTileSide; ++i)
      for (int64_t k = 0; k < 64; ++k)
        for (int64_t j = 0; j < kTileSide; ++j)
          cells[sum][i * kTileSide + j] += byte(a, i, k) * byte(b, k / 4, 4 * j + k % 4);
  }
};

#define DSE_TILE_ZERO(tile) std::memset(tiles.cells[tile], 0, sizeof(tiles.cells[tile]))
#define DSE_TILE_LOAD(tile, from, bytes) tiles.load(tile, from, bytes)
#define DSE_TILE_DOT(sum, a, b) tiles.dot(sum, a, b)
#define DSE_TILE_STORE(tile, to) std::memcpy(to, tiles.cells[tile], sizeof(tiles.cells[tile]))

#endif

// Three forms of 16 columns of A, kTileChunk pairs.
struct alignas(64) TurnedColumns {
  ShortPair high[kTileChunk * kTileSide];   // (0, h)
  ShortPair cross[kTileChunk * kTileSide];  // (h, l)
  ShortPair low[kTileChunk * kTileSide];    // (l, 0)
};

DSE_INLINE void turn_sixteen(Row* r) {
  // Halves of rows eight apart, then quarters of rows four apart, pairs, neighbours.
  for (int i = 0; i < 8; ++i) {
    const Row a = r[i], b = r[i + 8];
    r[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    r[i + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int h = 0; h < 16; h += 8) {
    for (int i = h; i < h + 4; ++i) {
      const Row a = r[i], b = r[i + 4];
      r[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      r[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  }
  for (int h = 0; h < 16; h += 4) {
    for (int i = h; i < h + 2; ++i) {
      const Row a = r[i], b = r[i + 2];
      r[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[i + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  for (int i = 0; i < 16; i += 2) {
    const Row a = r[i], b = r[i + 1];
    r[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    r[i + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}

// Of `columns` columns and `pairs` pairs of A, at most what `out` holds; zeros beside them.
void turn_columns(const ShortPair* a, int64_t lda, int64_t columns, int64_t pairs, TurnedColumns* out) {
  for (int64_t p = 0; p < pairs; p += kTileSide) {
    Row rows[kTileSide] = {};
    for (int64_t r = 0; r < std::min(kTileSide, pairs - p); ++r) {
      if (columns == kTileSide) rows[r] = *reinterpret_cast<const Row*>(a + (p + r) * lda);
      else std::memcpy(&rows[r], a + (p + r) * lda, static_cast<size_t>(columns) * sizeof(ShortPair));
    }
    turn_sixteen(rows);
    for (int64_t i = 0; i < kTileSide; ++i) {
      const Row own = rows[i], highs = own & static_cast<ShortPair>(0xff00ff00u), lows = own & 0x00ff00ff;
      *reinterpret_cast<Row*>(out->high + (p + i) * kTileSide) = highs;
      *reinterpret_cast<Row*>(out->cross + (p + i) * kTileSide) = ((highs >> 8) & 0x00ff00ff) | (lows << 8);
      *reinterpret_cast<Row*>(out->low + (p + i) * kTileSide) = lows;
    }
  }
#if DSE_AMX
  asm volatile("" ::: "memory");  // the tiles' loads do not say that they read memory
#endif
}

using Eight = Vec<float, 32>;
using WideEight = Vec<double, 64>;
DSE_INLINE WideEight widen(const Eight& x) {
#if DSE_AMX  // the compiler would do it in halves, and warns of _mm512_cvtps_pd()
  return reinterpret_cast<WideEight>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(x)));
#else
  return __builtin_convertvector(x, WideEight);
#endif
}

// What the products of 16 columns of A with 16 of B are the sum of.
struct alignas(64) TileSums {
  ShortPair high[kTileCells], cross[kTileCells], low[kTileCells];

  Sums row(int64_t i) const {
    const auto of = [&](const ShortPair* sums) __attribute__((always_inline)) {
      return __builtin_convertvector(*reinterpret_cast<const Row*>(sums + i * kTileSide), Sums);
    };
    return of(high) * 65536.0f + (of(cross) * 256.0f + of(low));
  }
};

// The products with 16 columns of B, whose pairs are ldb apart; what follows those may be anything. Calls
// beside(i) for i < 16 in between: a tile's sums are stored long before the processor can read them.
template <typename Beside>
DSE_INLINE void multiply_tiles([[maybe_unused]] Tiles& tiles, const TurnedColumns& a, const ShortPair* b,
                               int64_t ldb, int64_t pairs, TileSums* out, const Beside& beside) {
  DSE_TILE_ZERO(0);
  DSE_TILE_ZERO(1);
  DSE_TILE_ZERO(2);
  int64_t done = 0;
  for (int64_t p = 0; p < pairs; p += kTileSide) {
    DSE_TILE_LOAD(3, b + p * ldb, ldb * static_cast<int64_t>(sizeof(ShortPair)));
    DSE_TILE_LOAD(4, a.high + p * kTileSide, 64);
    DSE_TILE_LOAD(5, a.cross + p * kTileSide, 64);
    DSE_TILE_LOAD(6, a.low + p * kTileSide, 64);
    DSE_TILE_DOT(0, 4, 3);
    DSE_TILE_DOT(1, 5, 3);
    DSE_TILE_DOT(2, 6, 3);
    for (int64_t q = 0; q < kBeside && done < kTileSide; ++q) beside(done++);
  }
  for (; done < kTileSide; ++done) beside(done);
  DSE_TILE_STORE(0, out->high);
  DSE_TILE_STORE(1, out->cross);
  DSE_TILE_STORE(2, out->low);
}

// Turned columns of A against columns j0 .. j1 of B, sixteen at a time, which `from(j)` has: row(i, j, sums)
// takes sums of a row.
template <typename From, typename TakeRow>
DSE_INLINE void multiply_all_tiles(Tiles& tiles, const TurnedColumns& a, int64_t pairs, int64_t j0, int64_t j1,
                                   const From& from, const TakeRow& row) {
  TileSums sums[2];
  int64_t which = 0;
  for (int64_t j = j0; j < j1; j += kTileSide, which = 1 - which) {
    multiply_tiles(tiles, a, from(j), kShortPanel, pairs, sums + which,
                   [&](int64_t i) __attribute__((always_inline)) {
                     if (j > j0) row(i, j - kTileSide, sums[1 - which].row(i));
                   });
  }
  if (j0 >= j1) return;
  const int64_t last = j0 + (j1 - j0 - 1) / kTileSide * kTileSide;
  for (int64_t i = 0; i < kTileSide; ++i) row(i, last, sums[1 - which].row(i));
}

// Columns i0 .. i1 of A, which left(i) has, against columns of B, which right(j) has, from first(i) to j1, a
// chunk of the depth at a time: row(i, j, sums) takes sums of a row. Pairs of A are lda apart.
template <typename Left, typename Right, typename First, typename TakeRow>
DSE_INLINE void multiply_in_chunks(int64_t pairs, int64_t i0, int64_t i1, int64_t j1, const Left& left,
                                   int64_t lda, const Right& right, const First& first, const TakeRow& row) {
  Tiles tiles;
  TurnedColumns turned;
  for (int64_t p = 0; p < pairs; p += kTileChunk) {
    const int64_t depth = std::min(kTileChunk, pairs - p);
    for (int64_t i = i0; i < i1; i += kTileSide) {
      turn_columns(left(i) + p * lda, lda, std::min(kTileSide, i1 - i), depth, &turned);
      multiply_all_tiles(
          tiles, turned, depth, first(i), j1, [&](int64_t j) { return right(j) + p * kShortPanel; },
          [&](int64_t r, int64_t j, const Sums& sum) __attribute__((always_inline)) {
            if (i + r < i1) row(i + r, j, sum);
          });
    }
  }
}

// short_gram_upper() of short_products.h.
void tile_gram_upper(const ShortPair* panels, int64_t height, int64_t pairs, const float* step, double* c,
                     int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const auto column = [&](int64_t j) {
    return panels + j / kShortPanel * kShortPanel * height + j % kShortPanel;
  };
  multiply_in_chunks(
      pairs, i0, i1, j1, column, kShortPanel, column, [&](int64_t i) { return std::max(i, j0); },
      [&](int64_t i, int64_t j, const Sums& sum) __attribute__((always_inline)) {
        const auto scale = static_cast<double>(step[i]);
        const Eight* steps = reinterpret_cast<const Eight*>(step + j);
        auto* dst = reinterpret_cast<WideEight*>(c + i * ldc + j);
        const Eight low = __builtin_shufflevector(sum, sum, 0, 1, 2, 3, 4, 5, 6, 7),
                    high = __builtin_shufflevector(sum, sum, 8, 9, 10, 11, 12, 13, 14, 15);
        dst[0] += scale * widen(steps[0]) * widen(low);
        dst[1] += scale * widen(steps[1]) * widen(high);
      });
}

// out[i][j] += alpha row_step[i] step[j] sum_r <a[r * lda + i], b_j[r]> for i < m, j < n, a multiple of 16. B
// lies in panels of kShortPanel columns.
void tile_accumulate(const ShortPair* a, int64_t lda, const ShortPair* b, int64_t pairs, const float* row_step,
                     const float* step, float alpha, float* const* out, int64_t m, int64_t n) {
  multiply_in_chunks(
      pairs, 0, m, n, [&](int64_t i) { return a + i; }, lda,
      [&](int64_t j) { return b + j / kShortPanel * kShortPanel * pairs + j % kShortPanel; },
      [](int64_t) { return int64_t{0}; },
      [&](int64_t i, int64_t j, const Sums& sum) __attribute__((always_inline)) {
        const Sums scale = *reinterpret_cast<const Sums*>(step + j) * (alpha * row_step[i]);
        *reinterpret_cast<Sums*>(out[i] + j) += scale * sum;
      });
}

#undef DSE_TILE_ZERO
#undef DSE_TILE_LOAD
#undef DSE_TILE_DOT
#undef DSE_TILE_STORE

}  // namespace
}  // namespace dse::cpu::DSE_ISA
