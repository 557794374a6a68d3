// What the arguments of dse_components mean, and which are accepted: shared by the operator and by the NumPy
// entry points, which check before they call it (torch's dispatcher passes no exception on to C++).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/problem.h"
#include "cpu/validate.h"

namespace dse::cpu {

// The problem that z and the options pose, before any labels or centroids are given; z may be on any device.
inline Problem pose_problem(const torch::stable::Tensor& z, const std::string& variant, int64_t local_clusters,
                            int64_t global_clusters, std::optional<int64_t> group_images, bool normalize) {
  require_three_axes(z, "z", "(B, N, d)");
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

inline Problem make_problem(const torch::stable::Tensor& z, const std::string& variant, int64_t local_clusters,
                            int64_t global_clusters, std::optional<int64_t> group_images, bool normalize) {
  require_cpu(z, "z");
  return pose_problem(z, variant, local_clusters, global_clusters, group_images, normalize);
}

// Sizes of the leading axes.
inline std::vector<int64_t> leading_shape(const torch::stable::Tensor& x, int64_t axes) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < axes; ++i) shape.push_back(x.size(i));
  return shape;
}

// (..., n, d) as (P, n, d), on any device.
inline torch::stable::Tensor flatten_matrices(const torch::stable::Tensor& x) {
  if (x.dim() < 2) reject("x must have shape (..., n, d), got ", shape_of(x), ".");
  if (x.numel() == 0) reject("x must have no empty axis, got shape ", shape_of(x), ".");
  const int64_t n = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  const std::array<int64_t, 3> shape{x.numel() / (n * d), n, d};
  return torch::stable::reshape(x, {shape.data(), 3});
}

inline void require_kmeans_options(int64_t max_iters, double tol, const char* max_iters_name) {
  require_at_least(max_iters, 1, max_iters_name);
  if (!(tol > 0.0)) reject("tol must be > 0, got ", tol, ".");
}

// Fixes the numbers of clusters: k-means finds no more than there are rows, given labels may name more, given
// centroids bring their own k.
inline void count_clusters(Problem& p, bool local_labels, bool global_labels,
                           const std::optional<torch::stable::Tensor>& global_centroids) {
  if (!local_labels) p.local_clusters = std::min(p.local_clusters, p.positions);
  if (global_centroids) {
    const torch::stable::Tensor& c = *global_centroids;
    if (c.dim() != 3 || c.size(0) != p.groups() || c.size(1) < 1 || c.size(2) != p.dim) {
      reject("global_centroids must have shape (", p.groups(), ", k, ", p.dim, ") with k >= 1, got ", shape_of(c),
             ".");
    }
    p.global_clusters = c.size(1);
  } else if (!global_labels) {
    p.global_clusters = std::min(p.global_clusters, p.group_images * p.positions);
  }
}

// Checks the given labels and centroids and fixes the numbers of clusters.
inline void apply_given(Problem& p, const std::optional<torch::stable::Tensor>& local_labels,
                        const std::optional<torch::stable::Tensor>& global_labels,
                        const std::optional<torch::stable::Tensor>& global_centroids) {
  if (global_centroids) require_cpu(*global_centroids, "global_centroids");
  count_clusters(p, local_labels.has_value(), global_labels.has_value(), global_centroids);
  if (local_labels) require_labels(*local_labels, p.images, p.positions, p.local_clusters, "local_labels");
  if (global_labels) require_labels(*global_labels, p.images, p.positions, p.global_clusters, "global_labels");
}

}  // namespace dse::cpu
