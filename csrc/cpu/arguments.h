// What the arguments of dse_components mean, and which are accepted: shared by the operator and by the NumPy
// entry points, which check before they call it (torch's dispatcher passes no exception on to C++).
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "common/problem.h"
#include "cpu/validate.h"

namespace dse::cpu {

// The problem that z and the options pose, before any labels or centroids are given.
inline Problem make_problem(const torch::stable::Tensor& z, const std::string& variant, int64_t local_clusters,
                            int64_t global_clusters, std::optional<int64_t> group_images, bool normalize) {
  require_features(z, "z", "(B, N, d)");
  Problem p;
  p.images = z.size(0);
  p.positions = z.size(1);
  p.dim = z.size(2);
  if (!parse_variant(variant, &p.variant)) {
    reject("variant must be 'regularizer', 'evaluation' or 'paper', got '", variant, "'.");
  }
  require_at_least(local_clusters, 1, "local_clusters");
  require_at_least(global_clusters, 1, "global_clusters");
  p.group_images = group_images.value_or(std::max<int64_t>(global_clusters / local_clusters, 1));
  require_at_least(p.group_images, 1, "group_images");
  p.group_images = std::min(p.group_images, p.images);
  p.local_clusters = local_clusters;
  p.global_clusters = global_clusters;
  p.normalize = normalize;
  return p;
}

inline void require_kmeans_options(int64_t max_iters, double tol, const char* max_iters_name) {
  require_at_least(max_iters, 1, max_iters_name);
  if (!(tol > 0.0)) reject("tol must be > 0, got ", tol, ".");
}

// Checks the given labels and centroids and fixes the numbers of clusters: k-means finds no more than there are
// rows, given labels may name more, given centroids bring their own k.
inline void apply_given(Problem& p, const std::optional<torch::stable::Tensor>& local_labels,
                        const std::optional<torch::stable::Tensor>& global_labels,
                        const std::optional<torch::stable::Tensor>& global_centroids) {
  if (!local_labels) p.local_clusters = std::min(p.local_clusters, p.positions);
  if (global_centroids) {
    const torch::stable::Tensor& c = *global_centroids;
    require_cpu(c, "global_centroids");
    if (c.dim() != 3 || c.size(0) != p.groups() || c.size(1) < 1 || c.size(2) != p.dim) {
      reject("global_centroids must have shape (", p.groups(), ", k, ", p.dim, ") with k >= 1, got ", shape_of(c),
             ".");
    }
    p.global_clusters = c.size(1);
  } else if (!global_labels) {
    p.global_clusters = std::min(p.global_clusters, p.group_images * p.positions);
  }
  if (local_labels) require_labels(*local_labels, p.images, p.positions, p.local_clusters, "local_labels");
  if (global_labels) require_labels(*global_labels, p.images, p.positions, p.global_clusters, "global_labels");
}

}  // namespace dse::cpu
