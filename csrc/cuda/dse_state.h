// The partitions of a batch into clusters, as the kernels see them, and how these are decomposed.
#pragma once

#include "cuda/clusters.cuh"
#include "cuda/heuristics.h"
#include "cuda/host.h"

namespace dse::cuda {

inline Clusters partition(Call& call, const Problem& p, int64_t groups, int64_t group_rows, int64_t k,
                          const int64_t* labels) {
  Clusters c;
  c.rows = p.rows();
  c.group_rows = group_rows;
  c.k = k;
  c.groups = groups;
  c.labels = labels;
  c.offset = call.borrow<int64_t>(groups * (k + 1));
  c.order = call.borrow<int64_t>(p.rows());
  c.sizes = call.borrow<int64_t>(groups * k);
  return c;
}

// Decompositions of clusters, as far as this device's shared memory goes: the large blocks' kernel has up to 12
// KB of its own.
inline EigenPlan eigen_plan(const Call& call) {
  constexpr size_t kOwn = 12 << 10;
  EigenPlan plan;
  plan.large_shared =
      std::min(plan.large_shared, static_cast<int64_t>((call.shared_limit - kOwn) / sizeof(double)));
  return plan;
}

// One group an image.
inline Clusters local_partition(Call& call, const Problem& p, const int64_t* labels) {
  return partition(call, p, p.images, p.positions, p.local_clusters, labels);
}
inline Clusters global_partition(Call& call, const Problem& p, const int64_t* labels) {
  return partition(call, p, p.groups(), p.group_images * p.positions, p.global_clusters, labels);
}

// What the effective ranks' sum is divided by.
inline double rank_divisor(const Problem& p) {
  if (p.variant == Variant::kPaper) return 1.0;
  if (p.variant == Variant::kRegularizer) return static_cast<double>(std::min(p.rows(), p.dim));
  return static_cast<double>(p.positions * std::min(p.images, p.dim));
}

}  // namespace dse::cuda
