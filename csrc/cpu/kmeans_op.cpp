// torch.ops.dse_ext.kmeans on the CPU.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/arguments.h"
#include "cpu/kmeans.h"
#include "cpu/operators.h"
#include "cpu/row_statistics.h"
#include "cpu/validate.h"

namespace dse::cpu {
namespace {

using torch::headeronly::ScalarType;

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, int64_t k, uint64_t seed, const KMeansOptions& options) {
  const ScalarType real = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Features features = Features::of(x, "x");
  const int64_t groups = features.outer, n = features.inner, d = features.dim;
  const std::array<int64_t, 3> centroid_shape{groups, k, d};
  const std::array<int64_t, 2> label_shape{groups, n};
  Tensor centroids = torch::stable::new_empty(x, {centroid_shape.data(), 3}, real);
  Tensor labels = torch::stable::new_empty(x, {label_shape.data(), 2}, ScalarType::Long);
  Tensor inertia = torch::stable::new_empty(x, {label_shape.data(), 1}, real);
  auto* centroid_data = static_cast<T*>(centroids.mutable_data_ptr());
  auto* label_data = static_cast<int64_t*>(labels.mutable_data_ptr());
  auto* inertia_data = static_cast<T*>(inertia.mutable_data_ptr());

  // One group's bad rows do not touch the others.
  std::vector<double> scale(static_cast<size_t>(groups * n));
  const bool all_finite = row_scales(features, false, scale.data());
  std::vector<KMeansWorkspace<T>> workspaces(static_cast<size_t>(max_workers()));
  Buffer<double> wide(max_workers() * k * d);
  for_each_problem(groups, groups * n * d * k, [&](int64_t g, int64_t worker) {
    double* own = wide.data() + worker * k * d;
    if (!all_finite && !group_is_finite(features, g)) {
      std::fill_n(centroid_data + g * k * d, k * d, std::numeric_limits<T>::quiet_NaN());
      std::fill_n(label_data + g * n, n, int64_t{0});
      inertia_data[g] = std::numeric_limits<T>::quiet_NaN();
      return;
    }
    inertia_data[g] = static_cast<T>(
        kmeans<T>(features, g * n, n, k, options, {seed, RngPurpose::kKMeansOp, static_cast<uint64_t>(g)},
                  workspaces[static_cast<size_t>(worker)], label_data + g * n, own, true));
    for (int64_t i = 0; i < k * d; ++i) centroid_data[g * k * d + i] = static_cast<T>(own[i]);
  });
  return {centroids, labels, inertia};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> kmeans_op(const Tensor& x, int64_t k, const Tensor& seed, int64_t max_iters,
                                             double tol) {
  require_features(x, "x", "(G, n, d)");
  require_at_least(k, 1, "k");
  require_kmeans_options(max_iters, tol, "max_iters");
  const int64_t clusters = std::min(k, x.size(1));
  const KMeansOptions options{max_iters, tol};
  const uint64_t number = seed_value(seed);
  if (x.scalar_type() == ScalarType::Double) return run<double>(x, clusters, number, options);
  return run<float>(x, clusters, number, options);
}

}  // namespace dse::cpu
