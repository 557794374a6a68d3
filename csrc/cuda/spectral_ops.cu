// torch.ops.dse_ext.cluster_nuclear_norms and effective_rank on a GPU.

#include "cpu/arguments.h"
#include "cuda/backward.cuh"
#include "cuda/dse_state.h"
#include "cuda/labels.h"
#include "cuda/operators.h"
#include "cuda/rank.h"
#include "cuda/row_statistics.cuh"
#include "cuda/steep_clusters.cuh"

namespace dse::cuda {
namespace {

constexpr auto kDouble = static_cast<int64_t>(sizeof(double));

// What saved_form says of a matrix whose effective rank was measured; as on the CPU, less its steep form.
constexpr int64_t kPlain = 0, kNotFinite = 2;

__global__ __launch_bounds__(kRowThreads) void rank_forms_kernel(const int* finite, int64_t count,
                                                                 int64_t* forms) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + thread_id();
  if (i < count) forms[i] = finite[i] != 0 ? kPlain : kNotFinite;
}

Clusters groups_of(Call& call, const Tensor& x, const int64_t* labels, int64_t k) {
  Clusters c;
  c.rows = x.size(0) * x.size(1);
  c.group_rows = x.size(1);
  c.k = k;
  c.groups = x.size(0);
  c.labels = labels;
  c.offset = call.borrow<int64_t>(c.groups * (k + 1));
  c.order = call.borrow<int64_t>(c.rows);
  c.sizes = call.borrow<int64_t>(c.groups * k);
  run_cluster_index(c, call.stream);
  return c;
}

template <class S>
std::tuple<Tensor, Tensor, Tensor> norms_forward(const Tensor& x, const Tensor& labels, int64_t k, bool save) {
  using C = typename Types<S>::Real;
  Call call(x);
  const FeatureView<S> view = view_of<S>(x);
  const int64_t groups = view.outer, n = view.inner, d = view.dim, kept = save ? groups : 0;
  const int64_t width = std::min(n, d);
  const Tensor norms = empty(x, {groups, k}, kRealType<C>);
  const Tensor saved = empty(x, {kept, n, width}, ScalarType::Double);
  const Tensor form = empty(x, {kept, k}, ScalarType::Long);
  auto* own_labels = call.borrow<int64_t>(groups * n);
  copy_given_labels(call, labels, x, groups, n, k, "labels", own_labels);
  int* finite = call.borrow<int>(groups);
  run_row_scales(view, false, nullptr, finite, n, call.stream);
  const Clusters all = groups_of(call, x, own_labels, k);
  const int64_t part = save ? groups : call.part_of(groups, n * width * kDouble);
  ClusterNormArgs<S> a;
  a.x = view;
  a.clusters = all;
  a.slots = {save ? data_of<double>(saved) : call.borrow<double>(part * n * width), width, false};
  a.want_w = save;
  a.finite = finite;
  a.norms = call.borrow<double>(groups * k);
  a.forms = save ? data_of<int64_t>(form) : nullptr;
  a.gram_blocks = 16 * call.multiprocessors;
  a.eigen = eigen_plan(call);
  // Without a gradient the values of float32 need no more than a Gram matrix holds.
  const bool refine = save || sizeof(S) == 8;
  if (refine) a.steep = call.borrow<int>(groups * k);
  a.steep_ratio = steep_ratio<S>();
  const SteepPlan steep = plan_steep(part * k, width, d, call.shared_limit, call.multiprocessors, call.budget());
  void* space = call.borrow_bytes(std::max(cluster_norms_workspace(part * k, n, d, a.eigen), steep.workspace()));
  for (int64_t begin = 0; begin < groups; begin += part) {
    a.clusters.group_begin = begin;
    a.clusters.groups = std::min(part, groups - begin);
    run_cluster_norms(a, space, call.stream);
    if (refine) run_steep_clusters(view, steep_clusters(a), steep, space, call.stream);
  }
  run_store_centroids(a.norms, groups * k, finite, k, data_of<C>(norms), call.stream);
  return {norms, saved, form};
}

template <class S>
Tensor norms_backward(const Tensor& grad, const Tensor& x, const Tensor& labels, const Tensor& saved,
                      const Tensor& saved_form) {
  Call call(x);
  const FeatureView<S> view = view_of<S>(x);
  const int64_t groups = view.outer, n = view.inner, d = view.dim, k = grad.size(1), width = std::min(n, d);
  const Tensor out = empty(x, {groups, n, d}, x.scalar_type());
  const Tensor own_labels = contiguous_as(labels, ScalarType::Long);
  const Tensor weights = contiguous_as(grad, ScalarType::Double);
  const Clusters all = groups_of(call, x, const_data_of<int64_t>(own_labels), k);
  const int64_t part = call.part_of(groups, n * d * kDouble);
  auto* sum = call.borrow<double>(part * n * d);
  void* space = call.borrow_bytes(cluster_gradient_workspace(part * k, d));
  for (int64_t begin = 0; begin < groups; begin += part) {
    const int64_t count = std::min(part, groups - begin);
    call.clear(sum, count * n * d * kDouble);
    ClusterGradientArgs<S> a;
    a.x = view;
    a.clusters = all;
    a.clusters.group_begin = begin;
    a.clusters.groups = count;
    a.slots = {data_of<double>(saved) + begin * n * width, width, false};
    a.weights = const_data_of<double>(weights);
    a.accumulator = sum;
    a.blocks = 16 * call.multiprocessors;
    run_cluster_gradient(a, space, call.stream);
    run_store_rows(sum, count, n, d, const_data_of<int64_t>(saved_form) + begin * k, k,
                   data_of<S>(out) + begin * n * d, call.stream);
  }
  return out;
}

template <class S>
std::tuple<Tensor, Tensor, Tensor> rank_forward(const Tensor& x, bool center, bool save) {
  using C = typename Types<S>::Real;
  Call call(x);
  const FeatureView<S> view = view_of<S>(x);
  const int64_t count = view.outer, n = view.inner, side = std::min(n, view.dim), kept = save ? count : 0;
  const Tensor ranks = empty(x, {count}, kRealType<C>);
  const Tensor saved = empty(x, {kept, side, side}, ScalarType::Double);
  const Tensor form = empty(x, {kept}, ScalarType::Long);
  int* finite = call.borrow<int>(count);
  run_row_scales(view, false, nullptr, finite, n, call.stream);
  RankMatrices r;
  r.count = count;
  r.n = n;
  r.center = center;
  r.finite = finite;
  r.finite_stride = 1;
  r.values = call.borrow<double>(count);
  r.want_w = save;
  r.w = save ? data_of<double>(saved) : nullptr;
  measure_ranks(call, view, r);
  run_store_centroids(r.values, count, finite, 1, data_of<C>(ranks), call.stream);
  if (save) {
    launch(DSE_KERNEL(rank_forms_kernel), {grid_of(ceil_div(count, kRowThreads)), kRowThreads, 0, call.stream},
           finite, count, data_of<int64_t>(form));
  }
  return {ranks, saved, form};
}

// weight * M (H X) for n <= d, else weight * (H X) M.
template <class S>
Tensor rank_backward(const Tensor& grad, const Tensor& x, const Tensor& saved, const Tensor& saved_form,
                     bool center) {
  Call call(x);
  const FeatureView<S> view = view_of<S>(x);
  const int64_t count = view.outer, n = view.inner, d = view.dim;
  const Tensor out = empty(x, {count, n, d}, x.scalar_type());
  const Tensor weights = contiguous_as(grad, ScalarType::Double);
  const Clusters all = whole_groups(call, count, n, nullptr);
  const int64_t part = call.part_of(count, n * d * kDouble);
  auto* means = center ? call.borrow<double>(part * d) : nullptr;
  Tensor matrices = saved;
  Tensor all_rows = call.temporary({part, n, d}, ScalarType::Double);
  Tensor all_shares = call.temporary({part, n, d}, ScalarType::Double);
  for (int64_t begin = 0; begin < count; begin += part) {
    const int64_t now = std::min(part, count - begin);
    if (center) {
      Clusters p = all;
      p.group_begin = begin;
      p.groups = now;
      run_cluster_means(view, p, 0.0, means, nullptr, call.stream);
    }
    const Tensor rows = torch::stable::narrow(all_rows, 0, 0, now);
    run_gather_rows(view, nullptr, begin * n, now * n, means, n, data_of<double>(rows), call.stream);
    const Tensor own = torch::stable::narrow(matrices, 0, begin, now);
    const Tensor share = torch::stable::narrow(all_shares, 0, 0, now);
    n <= d ? multiply(own, rows, share) : multiply(rows, own, share);
    launch(DSE_KERNEL(store_weighted_kernel<S>),
           {grid_of(ceil_div(now * n * d, kMatrixThreads)), kMatrixThreads, 0, call.stream},
           const_data_of<double>(share), now * n * d, n * d, const_data_of<double>(weights) + begin,
           const_data_of<int64_t>(saved_form) + begin, kNotFinite, data_of<S>(out) + begin * n * d);
  }
  return out;
}

Tensor as_matrices(const Tensor& x) {
  require_device(x, x, "x");
  return cpu::flatten_matrices(x);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cluster_nuclear_norms(const Tensor& x, const Tensor& labels, int64_t k,
                                                         bool save_for_backward) {
  require_device(x, x, "x");
  cpu::require_three_axes(x, "x", "(G, n, d)");
  cpu::require_at_least(k, 1, "k");
  return with_types(x, "x", [&](auto types) {
    return norms_forward<typename decltype(types)::Feature>(x, labels, k, save_for_backward);
  });
}

Tensor cluster_nuclear_norms_backward(const Tensor& grad, const Tensor& x, const Tensor& labels,
                                      const Tensor& saved, const Tensor& saved_form) {
  require_device(x, x, "x");
  cpu::require_three_axes(x, "x", "(G, n, d)");
  require_device(grad, x, "grad");
  if (grad.dim() != 2 || grad.size(0) != x.size(0))
    reject("grad must have shape (G, k), got ", shape_of(grad), ".");
  require_device(labels, x, "labels");
  cpu::require_label_shape(labels, x.size(0), x.size(1), "labels");
  if (saved.numel() != x.size(0) * x.size(1) * std::min(x.size(1), x.size(2)) ||
      saved_form.numel() != grad.numel()) {
    reject("saved and saved_form do not belong to these features.");
  }
  return with_types(x, "x", [&](auto types) {
    return norms_backward<typename decltype(types)::Feature>(grad, x, labels, saved, saved_form);
  });
}

std::tuple<Tensor, Tensor, Tensor> effective_rank(const Tensor& x, bool center, bool save_for_backward) {
  const Tensor matrices = as_matrices(x);
  auto [ranks, saved, form] = with_types(x, "x", [&](auto types) {
    return rank_forward<typename decltype(types)::Feature>(matrices, center, save_for_backward);
  });
  const std::vector<int64_t> leading = cpu::leading_shape(x, x.dim() - 2);
  return {torch::stable::view(ranks, {leading.data(), leading.size()}), saved, form};
}

Tensor effective_rank_backward(const Tensor& grad, const Tensor& x, const Tensor& saved, const Tensor& saved_form,
                               bool center) {
  const Tensor matrices = as_matrices(x);
  require_device(grad, x, "grad");
  const int64_t count = matrices.size(0), side = std::min(matrices.size(1), matrices.size(2));
  if (grad.numel() != count)
    reject("grad must have one entry a matrix (", count, "), got shape ", shape_of(grad), ".");
  if (saved.numel() != count * side * side || saved_form.numel() != count) {
    reject("saved and saved_form do not belong to these features.");
  }
  const Tensor flat = torch::stable::reshape(grad, {&count, 1});
  const Tensor out = with_types(x, "x", [&](auto types) {
    return rank_backward<typename decltype(types)::Feature>(flat, matrices, saved, saved_form, center);
  });
  const std::vector<int64_t> shape = cpu::leading_shape(x, x.dim());
  return torch::stable::view(out, {shape.data(), shape.size()});
}

}  // namespace dse::cuda
