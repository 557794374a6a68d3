// torch.ops.dse_ext.kmeans on a GPU.

#include "cpu/arguments.h"
#include "cuda/host.h"
#include "cuda/kmeans.cuh"
#include "cuda/operators.h"
#include "cuda/row_statistics.cuh"

namespace dse::cuda {
namespace {

template <class S>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, int64_t k, const int64_t* seed, int64_t max_iters,
                                       double tol) {
  using C = typename Types<S>::Real;
  Call call(x);
  const FeatureView<S> view = view_of<S>(x);
  const int64_t groups = view.outer, n = view.inner, d = view.dim;
  const Tensor centroids = empty(x, {groups, k, d}, kRealType<C>);
  const Tensor labels = empty(x, {groups, n}, ScalarType::Long);
  const Tensor inertia = empty(x, {groups}, kRealType<C>);
  // One group's bad rows do not touch the others.
  int* finite = call.borrow<int>(groups);
  run_row_scales(view, false, nullptr, finite, n, call.stream);
  KMeansArgs<S> a;
  a.x = view;
  a.rows = n;
  a.problems = groups;
  a.k = k;
  a.max_iters = max_iters;
  a.tol = tol;
  a.seed = seed;
  a.purpose = RngPurpose::kKMeansOp;
  a.finite = finite;
  a.finite_stride = 1;
  a.labels = data_of<int64_t>(labels);
  a.centroids = call.borrow<double>(groups * k * d);
  a.inertia = call.borrow<double>(groups);
  run_kmeans(a, call.borrow_bytes(kmeans_workspace(groups, n, d, k)), call.stream);
  run_store_centroids(a.centroids, groups * k * d, finite, k * d, data_of<C>(centroids), call.stream);
  run_store_centroids(a.inertia, groups, finite, 1, data_of<C>(inertia), call.stream);
  return {centroids, labels, inertia};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> kmeans_op(const Tensor& x, int64_t k, const Tensor& seed, int64_t max_iters,
                                             double tol) {
  require_device(x, x, "x");
  cpu::require_three_axes(x, "x", "(G, n, d)");
  cpu::require_at_least(k, 1, "k");
  cpu::require_kmeans_options(max_iters, tol, "max_iters");
  const int64_t clusters = std::min(k, x.size(1));
  const int64_t* number = seed_of(seed, x);
  return with_types(x, "x", [&](auto types) {
    return run<typename decltype(types)::Feature>(x, clusters, number, max_iters, tol);
  });
}

}  // namespace dse::cuda
