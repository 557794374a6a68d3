// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011). A draw is a pure function of (seed, purpose, problem, index): no state, so every backend draws the
// same numbers in whatever order its threads run.
#pragma once

#include <cstdint>

#include "common/portability.h"

namespace dse {

enum class RngPurpose : uint32_t {
  kLocalKMeans = 1,
  kGlobalKMeans = 2,
  kPermutation = 3,
  kKMeansOp = 4,
  kSubspace = 5
};

struct Philox {
  uint32_t out[4];

  DSE_HOST_DEVICE Philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint32_t x0 = c0, x1 = c1, x2 = c2, x3 = c3;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * x0;
      const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * x2;
      const uint32_t y0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ key0;
      const uint32_t y2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ key1;
      x1 = static_cast<uint32_t>(p1);
      x3 = static_cast<uint32_t>(p0);
      x0 = y0;
      x2 = y2;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    out[0] = x0;
    out[1] = x1;
    out[2] = x2;
    out[3] = x3;
  }
};

// One stream of uniforms for one k-means problem or one image's permutation.
struct RngStream {
  uint64_t seed;
  RngPurpose purpose;
  uint64_t problem;

  // Uniform in [0, 1) with 53 bits.
  DSE_HOST_DEVICE double uniform(uint32_t index) const {
    const Philox draw(seed, index, static_cast<uint32_t>(problem), static_cast<uint32_t>(problem >> 32),
                      static_cast<uint32_t>(purpose));
    const uint64_t bits = (static_cast<uint64_t>(draw.out[0]) << 32) | draw.out[1];
    return static_cast<double>(bits >> 11) * (1.0 / 9007199254740992.0);
  }

  // Uniform integer in [0, n).
  DSE_HOST_DEVICE int64_t below(uint32_t index, int64_t n) const {
    const int64_t value = static_cast<int64_t>(uniform(index) * static_cast<double>(n));
    return value < n ? value : n - 1;
  }
};

}  // namespace dse
