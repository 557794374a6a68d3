// From floats to the 16-bit integers of short_products.h, for one instruction set: see every_isa.h. DSE_TILES:
// for the products of tile_products.kernels.h.

namespace dse::cpu::DSE_ISA {
namespace {

// Adding it to a float below 2^22 leaves the rounded float in the low bits.
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
DSE_INLINE int32_t to_integer(float x) {
  return __builtin_bit_cast(int32_t, x + kRoundToInteger) - __builtin_bit_cast(int32_t, kRoundToInteger);
}

// Norms up to 46000 have inner products below 2^31, their roundings included, and numbers up to 32639 two signed
// bytes.
constexpr float kShortNorm = 46000.0f, kShortMost = 32639.0f, kLeastMost = 1e-30f;

// How the products want an int16.
DSE_INLINE int32_t encode(int32_t x) {
#if DSE_TILES
  return (x + 128) ^ 128;  // 256 h + l with a signed l, in two's complement each
#else
  return x;
#endif
}

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
      for (int64_t j = 0; j < kWidth; ++j) own[j] = encode(to_integer(first[j] * inverse[j])) & 0xffff;
      break;
    }
    for (int64_t j = 0; j < kWidth; ++j) {
      const auto low = static_cast<uint32_t>(encode(to_integer(first[j] * inverse[j]))) & 0xffffu;
      const auto high = static_cast<uint32_t>(encode(to_integer(first[kWidth + j] * inverse[j]))) << 16;
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
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int16_t>(encode(to_integer(values[i] * inverse)));
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
