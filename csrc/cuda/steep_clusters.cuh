// Clusters, and other listed matrices, whose spectrum is too steep for their Gram matrix (steep.cuh): singular
// values and W once more, from the rows themselves.
//
// The kernels that decomposed the Gram matrices left a flag for every cluster. A block looks through the flags of
// all clusters and takes every gridDim.x-th of those that are set; without any it is gone after one read a
// thread, which is all that the usual call pays. Small matrices have a launch of their own, with both matrices in
// shared memory; blocks with memory of their own take the others, fewer of them for the largest.
//
// Cost of one steep cluster of 65 x 1024, estimated: 0.1 Gflop for the rotated Gram matrix (1 ms by one block),
// then a QL chain and eight sweeps of Jacobi rotations, 1 ms together. One of 1024 x 1024: seconds.
#pragma once

#include <algorithm>

#include "cuda/clusters.cuh"
#include "cuda/steep.cuh"

namespace dse::cuda {

struct SteepClusters {
  Clusters clusters;                               // indexed
  const int* steep = nullptr;                      // all groups x k
  SpectralKind kind = SpectralKind::kNuclearNorm;  // of the rows, centred for the nuclear norm
  bool center = true;
  bool exact = false;        // the values are wanted, too
  double* values = nullptr;  // all groups x k
  ClusterSlots slots;        // W of the rows of these groups; without data: not wanted
  int64_t slot_stride = 0;   // where not 0: doubles from one cluster's slot to the next

  // Internal: sides that this launch takes, least < side <= most, and where the matrices are.
  int64_t least = 0, most = 0;
  bool in_shared = false;
  int64_t shared = 0;  // doubles of dynamic shared memory
  double* workspace = nullptr;
  int64_t block_space = 0;
};

inline constexpr int64_t kSteepTileDoubles = sizeof(SteepTile) / sizeof(double);

// One cluster; the whole block.
template <class S>
__device__ __forceinline__ void settle_cluster(const FeatureView<S>& x, const SteepClusters& p, int64_t item,
                                               const ClusterRef& own) {
  __shared__ double sums[33];
  const int64_t d = x.dim, n = own.n;
  auto* shared = reinterpret_cast<double*>(dynamic_shared());
  auto& tile = *reinterpret_cast<SteepTile*>(shared);
  shared += kSteepTileDoubles;
  double* space = p.workspace + blockIdx.x * p.block_space;
  double* mean = space;
  space += ceil_div(d, 2) * 2;
  SteepMatrix<S> a{x, p.clusters.order + own.begin, p.center ? mean : nullptr, n, p.slots.rows_side || n <= d};
  const auto m = static_cast<int>(a.side());
  const int ld = eigen_ld(m);
  double* v = p.in_shared ? shared : space;
  double* g = v + eigen_square(m);
  const bool near = p.in_shared || kSteepTileDoubles + eigen_vectors(m) <= p.shared;
  double* vectors = p.in_shared ? g + eigen_square(m) : near ? shared : g + eigen_square(m);
  double* values = vectors + eigen_scratch(m);
  double* scratch = values + eigen_even(m);

  // Relative to the first row, so that equal rows have exactly their own value as the mean.
  double squares = 0.0;
  for (int64_t f = thread_id(); f < d; f += kSteepThreads) {
    const double origin = row_reader(x, a.order[0])(f);
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double value = row_reader(x, a.order[i])(f);
      sum += value - origin;
      squares += value * value;
    }
    mean[f] = origin + sum / static_cast<double>(n);
  }
  squares = block_sum(squares, sums);
  const double floor = noise_floor(sqrt(squares / static_cast<double>(n)), n);

  block_rotated_gram(a, nullptr, 0, v, ld, tile);
  double zeros = 0.0;
  for (int i = thread_id(); i < m; i += kSteepThreads)
    zeros += v[static_cast<int64_t>(i) * ld + i] == 0.0 ? 1.0 : 0.0;
  // Rows that sum to zero, and rows or features that are zero, hide one singular value each that vanishes; rows
  // beyond the number of features as many more.
  int64_t null = static_cast<int64_t>(block_sum(zeros, sums)) + (p.center && n <= d ? 1 : 0);
  null = null > m - d ? null : m - d;
  block_eigen(v, m, ld, values, vectors, true);
  block_rotated_gram(a, v, ld, g, ld, tile);
  const double cut = block_settle(g, ld, v, ld, m, n > d ? n : d, floor, values, vectors, sums);
  double* w = nullptr;
  if (p.slots.data != nullptr) {
    w = p.slot_stride != 0 ? p.slots.data + item * p.slot_stride : p.slots.at(p.clusters, own);
  }
  const double value =
      block_spectral(p.kind, v, values, m, ld, static_cast<int>(null < m ? null : m), cut, w, m, scratch);
  if (p.exact && thread_id() == 0) p.values[own.g * p.clusters.k + own.c] = value;
}

template <class S>
__global__ __launch_bounds__(kSteepThreads, 1) void steep_clusters_kernel(FeatureView<S> x, SteepClusters p) {
  const int64_t items = p.clusters.items();
  const int* flags = p.steep + p.clusters.group_begin * p.clusters.k;
  int64_t found = 0;
  for (int64_t base = 0; base < items; base += kSteepThreads) {
    const int64_t own = base + thread_id();
    if (!block_any(own < items && flags[own] != 0)) continue;
    for (int64_t item = base; item < items && item < base + kSteepThreads; ++item) {
      if (flags[item] == 0) continue;
      const ClusterRef cluster(p.clusters, item);
      const int64_t m = cluster_side(cluster.n, x.dim, p.slots.rows_side);
      if (m <= p.least || m > p.most || found++ % gridDim.x != blockIdx.x) continue;
      settle_cluster(x, p, item, cluster);
      block_sync();
    }
  }
}

// Those that run_cluster_norms flagged.
template <class S>
SteepClusters steep_clusters(const ClusterNormArgs<S>& a) {
  SteepClusters s;
  s.clusters = a.clusters;
  s.steep = a.steep;
  s.exact = sizeof(S) == 8;
  s.values = a.norms;
  if (a.want_w) s.slots = a.slots;
  return s;
}

// How steep matrices are shared out on a device: a launch for each range of sides.
struct SteepPlan {
  struct Range {
    int64_t most = 0;    // sides up to this, above the range before
    int64_t blocks = 0;  // at least one
    int64_t shared = 0;  // doubles of shared memory
    int64_t space = 0;   // doubles of workspace a block
    bool in_shared = false;
  };
  Range ranges[3];
  int count = 0;

  // Bytes; the launches follow each other.
  int64_t workspace() const {
    int64_t doubles = 0;
    for (int i = 0; i < count; ++i) doubles = std::max(doubles, ranges[i].blocks * ranges[i].space);
    return static_cast<int64_t>(sizeof(double)) * doubles;
  }
};

// items: matrices of a call; side: of the largest one; bytes: about what the blocks of a launch may take
// together, if that is enough for four.
inline SteepPlan plan_steep(int64_t items, int64_t side, int64_t dim, size_t shared_limit, int multiprocessors,
                            int64_t bytes) {
  constexpr int64_t kOwnBytes = 12 << 10, kMostShared = 128, kMedium = 256, kMostVectors = 16384;
  constexpr auto kDouble = static_cast<int64_t>(sizeof(double));
  const int64_t room = (static_cast<int64_t>(shared_limit) - kOwnBytes) / kDouble;
  const int64_t mean = ceil_div(dim, 2) * 2, most_blocks = std::min<int64_t>(items, multiprocessors);
  const auto doubles = [](int64_t m) { return 2 * eigen_square(m) + eigen_vectors(m); };
  int64_t small = std::min(side, kMostShared);
  while (small > 1 && kSteepTileDoubles + doubles(small) > room) --small;
  SteepPlan plan;
  plan.ranges[plan.count++] = {small, most_blocks, kSteepTileDoubles + doubles(small), mean, true};
  const auto add = [&](int64_t most) {
    const int64_t space = mean + doubles(most), fitting = bytes / (kDouble * space);
    plan.ranges[plan.count++] = {most, std::min(most_blocks, std::max<int64_t>(fitting, 4)),
                                 std::min(room, kSteepTileDoubles + std::min(kMostVectors, eigen_vectors(most))),
                                 space, false};
  };
  if (small < kMedium && side > kMedium) add(kMedium);
  if (side > small) add(side);
  return plan;
}

template <class S>
void run_steep_clusters(const FeatureView<S>& x, SteepClusters p, const SteepPlan& plan, void* workspace,
                        cudaStream_t stream) {
  p.workspace = static_cast<double*>(workspace);
  for (int i = 0; i < plan.count; ++i) {
    const SteepPlan::Range& range = plan.ranges[i];
    p.least = i > 0 ? plan.ranges[i - 1].most : 0;
    p.most = range.most;
    p.in_shared = range.in_shared;
    p.shared = range.shared;
    p.block_space = range.space;
    launch(DSE_KERNEL(steep_clusters_kernel<S>),
           {grid_of(range.blocks), kSteepThreads, sizeof(double) * static_cast<size_t>(range.shared), stream}, x,
           p);
  }
}

}  // namespace dse::cuda
