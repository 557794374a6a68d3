// Effective rank of one matrix of many rows whose spectrum is too steep for its second moment (steep.cuh), by the
// whole device where there is something to share out: the rotated second moment and the matrix of the gradient
// are tiles of 64 x 64, the decompositions are one block's.
//
// Every kernel looks at the matrix's flag first and leaves if it is not set. Cost of a steep one at 50 k rows and
// d = 1024, estimated: 1.8 Tflop for the rotated second moment, 60 ms at half of 67 TFLOP/s; 0.3 s for the
// eigenvectors and up to 4 s for the rotations where all directions are steep; both are one block's and grow as
// d^3: a twentieth of that at d = 384.
#pragma once

#include "cuda/matrices.cuh"
#include "cuda/matrix_functions.cuh"
#include "cuda/steep.cuh"

namespace dse::cuda {

inline constexpr int kSettleThreads = 512;

template <class S>
struct SteepRank {
  GramRanks r;  // of which matrix `at` is looked at
  int64_t at = 0;
  const int* steep = nullptr;  // its flag
  SteepMatrix<S> a;            // its rows
  bool exact = false;          // the value is wanted, too
  double* g = nullptr;         // m x m: working memory, then the matrix of the gradient
  double* partials = nullptr;  // splits x upper tiles x 4096
  int splits = 1;
  KnownSpectrum* known = nullptr;
  double* coefficient = nullptr;  // m
  double* vectors = nullptr;      // eigen_vectors(m)
  bool near = false;              // in shared memory instead

  __device__ __forceinline__ double* v() const { return r.grams + at * r.gram_stride; }
  __device__ __forceinline__ double* working_memory() const {
    return near ? reinterpret_cast<double*>(dynamic_shared()) : vectors;
  }
};

// One block: the second moment gives way to its eigenvectors.
template <class S>
__global__ __launch_bounds__(kSettleThreads, 1) void steep_rank_eigen_kernel(SteepRank<S> p) {
  __shared__ double sums[33];
  if (*p.steep == 0) return;
  const auto m = static_cast<int>(p.a.side());
  int null = 0;
  double floor = 0.0;
  inspect_gram(p.r, p.at, sums, &null, &floor);
  if (thread_id() == 0) *p.known = {floor, null, 1};
  double* vectors = p.working_memory();
  block_eigen(p.v(), m, m, vectors + eigen_scratch(m), vectors, true);
}

// Grid (upper tiles, splits).
template <class S>
__global__ __launch_bounds__(kSteepThreads) void steep_rank_partials_kernel(SteepRank<S> p) {
  __shared__ SteepTile tile;
  if (*p.steep == 0) return;
  const int64_t m = p.a.side(), chunks = ceil_div(p.a.length(), kSteepChunk);
  const int64_t begin = chunks * blockIdx.y / gridDim.y, end = chunks * (blockIdx.y + 1) / gridDim.y;
  int bi, bj;
  upper_tile_position(ceil_div(m, kSteepTile), blockIdx.x, &bi, &bj);
  double acc[4][4] = {};
  const int64_t last = end * kSteepChunk < p.a.length() ? end * kSteepChunk : p.a.length();
  rotated_tile(p.a, p.v(), m, bi, bj, begin * kSteepChunk, last, tile, acc);
  double* out = p.partials + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * kSteepTile * kSteepTile;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[(thread_id() / 16 + 16 * i) * kSteepTile + thread_id() % 16 + 16 * j] = acc[i][j];
    }
  }
}

// One block: singular values, the effective rank and the weights of its gradient.
template <class S>
__global__ __launch_bounds__(kSettleThreads, 1) void steep_rank_settle_kernel(SteepRank<S> p) {
  __shared__ double sums[33];
  if (*p.steep == 0) return;
  const auto m = static_cast<int>(p.a.side());
  const int64_t tiles = ceil_div(m, kSteepTile), packed = upper_tiles(tiles);
  constexpr int64_t kElements = kSteepTile * kSteepTile;
  for (int64_t e = thread_id(); e < packed * kElements; e += block_threads()) {
    int bi, bj;
    upper_tile_position(tiles, e / kElements, &bi, &bj);
    const int64_t row = int64_t{bi} * kSteepTile + e % kElements / kSteepTile;
    const int64_t column = int64_t{bj} * kSteepTile + e % kSteepTile;
    if (row > column || column >= m) continue;
    double sum = 0.0;
    for (int s = 0; s < p.splits; ++s) sum += p.partials[s * packed * kElements + e];
    p.g[row * m + column] = sum;
    p.g[column * m + row] = sum;
  }
  block_sync();
  double* vectors = p.working_memory();
  double* values = vectors + eigen_scratch(m);
  const int64_t most = p.a.n > p.a.x.dim ? p.a.n : p.a.x.dim;
  const double cut = block_settle(p.g, m, p.v(), m, m, most, p.known->floor, values, vectors, sums);
  const double value =
      block_spectral_weights(SpectralKind::kEffectiveRank, values, m, p.known->null, cut, values + eigen_even(m));
  if (p.exact && thread_id() == 0) p.r.values[p.at] = value;
  for (int i = thread_id(); i < m; i += block_threads()) p.coefficient[i] = values[i];
}

// One block an upper tile: g = V^T diag(coefficient) V.
template <class S>
__global__ __launch_bounds__(kSteepThreads) void steep_rank_project_kernel(SteepRank<S> p) {
  constexpr int kPitch = kSteepTile + 1;
  __shared__ double left[kSteepChunk * kPitch];
  __shared__ double right[kSteepChunk * kPitch];
  if (*p.steep == 0) return;
  const int64_t m = p.a.side();
  const double* v = p.v();
  int bi, bj;
  upper_tile_position(ceil_div(m, kSteepTile), blockIdx.x, &bi, &bj);
  const int ty = thread_id() / 16, tx = thread_id() % 16;
  double acc[4][4] = {};
  for (int64_t r0 = 0; r0 < m; r0 += kSteepChunk) {
    for (int e = thread_id(); e < kSteepChunk * kSteepTile; e += kSteepThreads) {
      const int r = e / kSteepTile, c = e % kSteepTile;
      const int64_t row = r0 + r, i = int64_t{bi} * kSteepTile + c, j = int64_t{bj} * kSteepTile + c;
      left[r * kPitch + c] = row < m && i < m ? v[row * m + i] * p.coefficient[row] : 0.0;
      right[r * kPitch + c] = row < m && j < m ? v[row * m + j] : 0.0;
    }
    block_sync();
#pragma unroll 4
    for (int r = 0; r < kSteepChunk; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] += left[r * kPitch + ty + 16 * i] * right[r * kPitch + tx + 16 * j];
      }
    }
    block_sync();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = int64_t{bi} * kSteepTile + ty + 16 * i, column = int64_t{bj} * kSteepTile + tx + 16 * j;
      if (row > column || column >= m) continue;
      p.g[row * m + column] = acc[i][j];
      p.g[column * m + row] = acc[i][j];
    }
  }
}

// Doubles of working memory beside g and the partial sums.
inline int64_t steep_rank_space(int64_t m) {
  constexpr auto kKnown = static_cast<int64_t>(sizeof(KnownSpectrum) / sizeof(double));
  return kKnown + ceil_div(m, 2) * 2 + eigen_vectors(m);
}

// p without its working memory, of which `space` is steep_rank_space(m) doubles. shared_limit: of a block.
template <class S>
void run_steep_rank(SteepRank<S> p, bool want_gradient, double* space, size_t shared_limit, cudaStream_t stream) {
  constexpr int64_t kOwnBytes = 12 << 10;
  const int64_t m = p.a.x.dim, doubles = eigen_vectors(m);
  const auto bytes = sizeof(double) * static_cast<size_t>(doubles);
  p.known = reinterpret_cast<KnownSpectrum*>(space);
  p.coefficient = space + sizeof(KnownSpectrum) / sizeof(double);
  p.vectors = p.coefficient + ceil_div(m, 2) * 2;
  p.near = static_cast<int64_t>(bytes) + kOwnBytes <= static_cast<int64_t>(shared_limit);
  const size_t shared = p.near ? bytes : 0;
  const auto packed = static_cast<unsigned>(upper_tiles(ceil_div(m, kSteepTile)));
  launch(DSE_KERNEL(steep_rank_eigen_kernel<S>), {dim3(1), kSettleThreads, shared, stream}, p);
  launch(DSE_KERNEL(steep_rank_partials_kernel<S>),
         {dim3(packed, static_cast<unsigned>(p.splits)), kSteepThreads, 0, stream}, p);
  launch(DSE_KERNEL(steep_rank_settle_kernel<S>), {dim3(1), kSettleThreads, shared, stream}, p);
  if (want_gradient) {
    launch(DSE_KERNEL(steep_rank_project_kernel<S>), {dim3(packed), kSteepThreads, 0, stream}, p);
  }
}

}  // namespace dse::cuda
