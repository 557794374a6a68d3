// What the kernels over rows of features share: exact reads of scaled rows, scans of a block, and tiles of
// products between rows and centroids.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/portability.h"
#include "cuda/device.cuh"
#include "cuda/features.cuh"

namespace dse::cuda {

DSE_HOST_DEVICE inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The compiler needs a few more registers for the same kernels from sm_100 on: one resident block less is asked
// for there, rather than have it spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr int kFewerBlocks = 1;
#else
inline constexpr int kFewerBlocks = 0;
#endif

// Blocks of a one-dimensional grid.
inline dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

// A row as float64, scaled. The product is rounded before anything is subtracted from it: fused into one
// instruction with a subtraction, it would leave a residue where two rows are equal.
template <class S>
struct RowReader {
  const S* data = nullptr;
  int64_t stride = 1;
  double scale = 1.0;

  __device__ __forceinline__ double operator()(int64_t f) const {
    return __dmul_rn(to_double(data[f * stride]), scale);
  }
};

// Elements between the first feature of `row` and that of row 0. Row numbers mostly fit 32 bits, whose division
// is far cheaper.
template <class S>
__device__ __forceinline__ int64_t row_offset(const FeatureView<S>& x, int64_t row) {
  if (row <= 0x7fffffff && x.inner <= 0x7fffffff) {
    const auto i = static_cast<uint32_t>(row), inner = static_cast<uint32_t>(x.inner);
    const uint32_t image = i / inner;
    return static_cast<int64_t>(image) * x.stride_outer +
           static_cast<int64_t>(i - image * inner) * x.stride_inner;
  }
  return (row / x.inner) * x.stride_outer + (row % x.inner) * x.stride_inner;
}

template <class S>
__device__ __forceinline__ RowReader<S> row_reader(const FeatureView<S>& x, int64_t row) {
  return {x.data + row_offset(x, row), x.stride_dim, x.scale(row)};
}

// Sum of the values of the threads before this one; `total` receives the sum of all. `scratch` holds 33 elements
// in shared memory, free for reuse on return.
template <class I>
__device__ __forceinline__ I block_exclusive_scan(I value, I* scratch, I* total) {
  const int lane = lane_id(), warp = warp_id();
  I inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const I other = shuffle_idx(inclusive, lane >= step ? lane - step : lane);
    if (lane >= step) inclusive += other;
  }
  if (lane == kWarp - 1) scratch[warp] = inclusive;
  block_sync();
  I before = 0, all = 0;
  for (int w = 0; w < block_warps(); ++w) {
    if (w < warp) before += scratch[w];
    all += scratch[w];
  }
  *total = all;
  block_sync();
  return before + inclusive - value;
}

// Largest i with prefix[i] <= value, for a non-decreasing prefix of n + 1 entries with prefix[0] <= value <
// prefix[n].
__device__ __forceinline__ int64_t find_interval(const int64_t* prefix, int64_t n, int64_t value) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (prefix[middle] <= value) low = middle;
    else high = middle;
  }
  return low;
}

// Rows on a block's list: where each begins, its scale, and a weight.
inline constexpr int kListThreads = 128;
inline constexpr int kListRows = 256;
inline constexpr int kListFeatures = 4;  // features of a thread
inline constexpr int kListSlab = kListThreads * kListFeatures;

struct RowList {
  int64_t offset[kListRows];
  double scale[kListRows];
  double weight[kListRows];

  template <class S>
  __device__ __forceinline__ void set(int e, const FeatureView<S>& x, int64_t row, double own_weight) {
    offset[e] = row_offset(x, row);
    scale[e] = x.scale(row);
    weight[e] = own_weight;
  }
};

// Feature j of this thread in the slab that begins at `slab_begin`.
__device__ __forceinline__ int64_t list_feature(int64_t slab_begin, int j) {
  return slab_begin + thread_id() + j * kListThreads;
}

// Calls visit(j, value, weight) for the thread's features of the listed rows, in the order of the list for each
// feature. Loads of several rows are under way at a time.
template <class S, class Visit>
__device__ __forceinline__ void for_each_listed(const FeatureView<S>& x, const RowList& list, int count,
                                                int64_t slab_begin, const Visit& visit) {
  constexpr int kAhead = 4;
  for (int e = 0; e < count; e += kAhead) {
    S raw[kAhead][kListFeatures] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int j = 0; j < kListFeatures; ++j) {
        const int64_t f = list_feature(slab_begin, j);
        if (e + u < count && f < x.dim) raw[u][j] = x.data[list.offset[e + u] + f * x.stride_dim];
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (e + u >= count) break;
#pragma unroll
      for (int j = 0; j < kListFeatures; ++j) {
        visit(j, __dmul_rn(to_double(raw[u][j]), list.scale[e + u]), list.weight[e + u]);
      }
    }
  }
}

// Tile of kTileRows rows against kTileColumns centroids, kTileFeatures features at a time, on the float64 tensor
// cores. Eight warps; each multiplies eight rows, which it also loads, with all columns. The pitch spreads the
// fragments' 8 x 4 elements over all banks.
inline constexpr int kTileRows = 64;
inline constexpr int kTileColumns = 32;
inline constexpr int kTileFeatures = 32;
inline constexpr int kTilePitch = kTileFeatures + 4;
inline constexpr int kTileThreads = 256;

struct ScoreTile {
  double rows[kTileRows * kTilePitch];
  double centroids[kTileColumns * kTilePitch];
  double half_norm[kTileColumns];
  int64_t offset[kTileRows];
  double scale[kTileRows];
};

// Calls visit(c, value, half_norm) for every centroid c < k, where value = ||c||^2 / 2 - <p, c> orders the
// centroids by their distance from a row p = (x - shift) * inverse (shift may be null). A lane's calls are for
// row 8 * warp + lane / 4 of the tile, in ascending c; the four lanes of a row share its centroids. Centroids lie
// `dim` elements apart.
template <class S, class C, class Visit>
__device__ __forceinline__ void visit_scores(const FeatureView<S>& x, int64_t first, int64_t rows,
                                             const double* shift, double inverse, const C* centroids, int64_t k,
                                             ScoreTile& tile, const Visit& visit) {
  constexpr int kOctet = kTileRows / (kTileThreads / kWarp);
  constexpr int kShare = kTileColumns * kTileFeatures / kTileThreads;
  const int lane = lane_id(), warp = warp_id();
  const int64_t d = x.dim;
  if (thread_id() < kTileRows) {
    const bool present = thread_id() < rows;
    tile.offset[thread_id()] = present ? row_offset(x, first + thread_id()) : -1;
    tile.scale[thread_id()] = present ? x.scale(first + thread_id()) : 0.0;
  }
  block_sync();
  const int own_centroid = thread_id() / (kTileThreads / kTileColumns);
  const int own_feature = thread_id() % (kTileThreads / kTileColumns) * kShare;

  for (int64_t c0 = 0; c0 < k; c0 += kTileColumns) {
    const int octets = static_cast<int>(ceil_div(k - c0 < kTileColumns ? k - c0 : kTileColumns, 8));
    const bool has_centroid = c0 + own_centroid < k;
    const C* centroid = centroids + (has_centroid ? c0 + own_centroid : 0) * d;
    double acc[kTileColumns / 8][2] = {};
    double square = 0.0;
    // The next features are under way while the present ones are multiplied.
    S next_row[kOctet] = {};
    C next_centroid[kShare];
    double next_shift = 0.0;
    const auto fetch = [&](int64_t f0) {
      const int64_t f = f0 + lane;
      if (f < d) {
        next_shift = shift != nullptr ? shift[f] : 0.0;
#pragma unroll
        for (int r = 0; r < kOctet; ++r) {
          const int64_t offset = tile.offset[warp * kOctet + r];
          if (offset >= 0) next_row[r] = x.data[offset + f * x.stride_dim];
        }
      }
#pragma unroll
      for (int j = 0; j < kShare; ++j) {
        const int64_t g = f0 + own_feature + j;
        next_centroid[j] = has_centroid && g < d ? centroid[g] : C(0);
      }
    };
    fetch(0);
    for (int64_t f0 = 0; f0 < d; f0 += kTileFeatures) {
#pragma unroll
      for (int r = 0; r < kOctet; ++r) {
        const int row = warp * kOctet + r;
        double value = 0.0;
        if (f0 + lane < d && tile.offset[row] >= 0) {
          value = __dmul_rn(__dmul_rn(to_double(next_row[r]), tile.scale[row]) - next_shift, inverse);
        }
        tile.rows[row * kTilePitch + lane] = value;
      }
#pragma unroll
      for (int j = 0; j < kShare; ++j) {
        const auto value = static_cast<double>(next_centroid[j]);
        tile.centroids[own_centroid * kTilePitch + own_feature + j] = value;
        square += value * value;
      }
      block_sync();
      if (f0 + kTileFeatures < d) fetch(f0 + kTileFeatures);
#pragma unroll
      for (int step = 0; step < kTileFeatures / 4; ++step) {
        const int at = lane / 4 * kTilePitch + step * 4 + lane % 4;
        const double a = tile.rows[warp * kOctet * kTilePitch + at];
#pragma unroll
        for (int o = 0; o < kTileColumns / 8; ++o) {
          if (o < octets) mma_f64(acc[o], a, tile.centroids[o * 8 * kTilePitch + at]);
        }
      }
      block_sync();
    }
#pragma unroll
    for (int mask = kTileThreads / kTileColumns / 2; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
    if (thread_id() % (kTileThreads / kTileColumns) == 0) tile.half_norm[own_centroid] = 0.5 * square;
    block_sync();
#pragma unroll
    for (int o = 0; o < kTileColumns / 8; ++o) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = o * 8 + 2 * (lane % 4) + i;
        if (c0 + column < k) visit(c0 + column, tile.half_norm[column] - acc[o][i], tile.half_norm[column]);
      }
    }
    block_sync();
  }
}

// The lower of two candidates, the lower index where they are equal; an index below 0 is no candidate.
struct Candidate {
  double value = 0.0;
  int64_t index = -1;

  __device__ __forceinline__ void offer(double other, int64_t at) {
    if (at < 0) return;
    if (index < 0 || other < value || (other == value && at < index)) {
      value = other;
      index = at;
    }
  }
  // Among the four lanes of a row.
  __device__ __forceinline__ void share() {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      const double other = shuffle_xor(value, mask);
      const int64_t at = shuffle_xor(index, mask);
      offer(other, at);
    }
  }
};

}  // namespace dse::cuda
