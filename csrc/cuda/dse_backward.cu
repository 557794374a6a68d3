// Gradient of dse_components on a GPU (docs/definitions.md).
//
// As many groups of images at a time as a float64 accumulator of bounded size holds: the effective rank's share
// X F (a product of the library, in float64), then the clusters' shares, then one pass that adds the distances,
// applies the Jacobian of the normalization and writes every row once. Upstream gradients stay on the device. The
// evaluation variant's effective ranks run across all images: their shares are scattered into an accumulator of
// all rows first.

#include <string>

#include "cpu/arguments.h"
#include "cpu/dse_state.h"
#include "cuda/backward.cuh"
#include "cuda/dse_state.h"
#include "cuda/matrices.cuh"
#include "cuda/operators.h"

namespace dse::cuda {
namespace {

constexpr auto kDouble = static_cast<int64_t>(sizeof(double));

// out row order[i] = weight * row i; every row is in the order once.
__global__ __launch_bounds__(kMatrixThreads) void scatter_rows_kernel(const double* rows, const int64_t* order,
                                                                      int64_t d, const double* weight,
                                                                      double* out) {
  const int64_t i = blockIdx.x;
  for (int64_t f = thread_id(); f < d; f += kMatrixThreads) out[order[i] * d + f] = *weight * rows[i * d + f];
}

// to = weight * from.
__global__ __launch_bounds__(kMatrixThreads) void scale_kernel(const double* from, int64_t count,
                                                               const double* weight, double* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMatrixThreads + thread_id();
  if (i < count) to[i] = *weight * from[i];
}

struct Saved {
  const Tensor &local_labels, &global_labels, &centroids, &local, &global, &dim, &rows, &index;
};

template <class S>
class Backward {
  using C = typename Types<S>::Real;

 public:
  Backward(const Tensor& z, const Problem& p, const Saved& saved)
      : call_(z),
        z_(z),
        p_(p),
        saved_(saved),
        x_(view_of<S>(z)),
        rows_at_(p),
        index_at_(p),
        local_labels_(contiguous_as(saved.local_labels, ScalarType::Long)),
        global_labels_(contiguous_as(saved.global_labels, ScalarType::Long)),
        real_(const_data_of<double>(saved.rows)),
        int_(const_data_of<int64_t>(saved.index)),
        grad_(empty(z, {p.images, p.positions, p.dim}, z.scalar_type())) {
    x_.row_scale = real_ + rows_at_.scale();
  }

  Tensor run(const Tensor& upstream) {
    local_ = local_partition(call_, p_, const_data_of<int64_t>(local_labels_));
    global_ = global_partition(call_, p_, const_data_of<int64_t>(global_labels_));
    run_cluster_index(local_, call_.stream);
    run_cluster_index(global_, call_.stream);
    weigh(upstream);
    const bool evaluation = p_.variant == Variant::kEvaluation;
    const int64_t row_bytes = kDouble * p_.dim, group_rows = p_.group_images * p_.positions;
    const int64_t part = evaluation ? p_.groups() : call_.part_of(p_.groups(), group_rows * row_bytes);
    Tensor accumulator;
    if (evaluation) accumulator = permuted_ranks();
    else accumulator = prepare_rank(std::min(part * group_rows, p_.rows()));
    const int64_t items =
        std::max(std::min(part * p_.group_images, p_.images) * p_.local_clusters, part * p_.global_clusters);
    void* space = call_.borrow_bytes(cluster_gradient_workspace(items, p_.dim));
    for (int64_t g = 0; g < p_.groups(); g += part) {
      const int64_t last = std::min(g + part, p_.groups());
      const int64_t begin = p_.group_begin(g), end = p_.group_end(last - 1);
      if (!evaluation) rank_share(begin, end, torch::stable::narrow(accumulator, 0, 0, end - begin));
      auto* sum = data_of<double>(accumulator);
      add_clusters(local_, begin / p_.positions, end / p_.positions, saved_.local, local_width(p_),
                   uses_image_kernel(p_), local_weights_, sum, space);
      add_clusters(global_, g, last, saved_.global, global_width(p_), false, global_weights_, sum, space);
      finish(begin, end, sum);
    }
    return grad_;
  }

 private:
  void weigh(const Tensor& upstream) {
    GradientWeightArgs<double> a;
    const Tensor wide = contiguous_as(upstream, ScalarType::Double);
    a.upstream = const_data_of<double>(wide);
    a.components = real_ + rows_at_.components();
    a.variant = p_.variant;
    a.rows = p_.rows();
    a.dim = p_.dim;
    a.images = p_.images;
    a.local_clusters = p_.local_clusters;
    a.groups = p_.groups();
    a.group_rows = p_.group_images * p_.positions;
    a.global_clusters = p_.global_clusters;
    a.rank_divisor = rank_divisor(p_);
    a.local_sizes = local_.sizes;
    a.global_sizes = global_.sizes;
    a.nearest = int_ + index_at_.nearest();
    weights_ = call_.template borrow<double>(kGradientWeights);
    local_weights_ = call_.template borrow<double>(p_.images * p_.local_clusters);
    global_weights_ = call_.template borrow<double>(p_.groups() * p_.global_clusters);
    a.weights = weights_;
    a.local_weights = local_weights_;
    a.global_weights = global_weights_;
    run_gradient_weights(a, call_.stream);
  }

  void rows_as_double(int64_t begin, int64_t end) {
    run_gather_rows(x_, nullptr, begin, end - begin, nullptr, end - begin, data_of<double>(rows_), call_.stream);
  }

  // The saved matrix, times its weight. Returns the accumulator for `rows` rows.
  Tensor prepare_rank(int64_t rows) {
    const int64_t side = cpu::dim_side(p_);
    rank_ = call_.temporary({side, side}, ScalarType::Double);
    launch(DSE_KERNEL(scale_kernel),
           {grid_of(ceil_div(side * side, kMatrixThreads)), kMatrixThreads, 0, call_.stream},
           const_data_of<double>(saved_.dim), side * side, weights_ + kRankWeight, data_of<double>(rank_));
    const bool rows_side = p_.rows() <= p_.dim;
    rows_ = call_.temporary({rows_side ? p_.rows() : rows, p_.dim}, ScalarType::Double);
    if (rows_side) rows_as_double(0, p_.rows());
    return call_.temporary({rows, p_.dim}, ScalarType::Double);
  }

  // Rows begin .. end of X F, or of F X where there are no more rows than features.
  void rank_share(int64_t begin, int64_t end, const Tensor& to) {
    if (p_.rows() <= p_.dim) {
      multiply(torch::stable::narrow(rank_, 0, begin, end - begin), rows_, to);
      return;
    }
    rows_as_double(begin, end);
    multiply(torch::stable::narrow(rows_, 0, 0, end - begin), rank_, to);
  }

  Tensor permuted_ranks() {
    const int64_t n = p_.images, d = p_.dim;
    const Tensor all = call_.temporary({p_.rows(), d}, ScalarType::Double);
    const int64_t* order = int_ + index_at_.permutation();
    Tensor matrices = saved_.dim;
    const int64_t part = call_.part_of(p_.positions, n * d * kDouble);
    Tensor all_rows = call_.temporary({part, n, d}, ScalarType::Double);
    Tensor all_shares = call_.temporary({part, n, d}, ScalarType::Double);
    for (int64_t begin = 0; begin < p_.positions; begin += part) {
      const int64_t count = std::min(part, p_.positions - begin);
      const Tensor rows = torch::stable::narrow(all_rows, 0, 0, count);
      run_gather_rows(x_, order + begin * n, 0, count * n, nullptr, n, data_of<double>(rows), call_.stream);
      const Tensor own = torch::stable::narrow(matrices, 0, begin, count);
      const Tensor share = torch::stable::narrow(all_shares, 0, 0, count);
      n <= d ? multiply(own, rows, share) : multiply(rows, own, share);
      launch(DSE_KERNEL(scatter_rows_kernel), {grid_of(count * n), kMatrixThreads, 0, call_.stream},
             const_data_of<double>(share), order + begin * n, d, weights_ + kRankWeight, data_of<double>(all));
    }
    return all;
  }

  void add_clusters(const Clusters& all, int64_t begin, int64_t end, const Tensor& slots, int64_t width,
                    bool rows_side, const double* weights, double* sum, void* space) {
    ClusterGradientArgs<S> a;
    a.x = x_;
    a.clusters = all;
    a.clusters.group_begin = begin;
    a.clusters.groups = end - begin;
    // Read only.
    a.slots = {data_of<double>(slots) + all.first(begin) * width, width, rows_side};
    a.weights = weights;
    a.accumulator = sum;
    a.blocks = 16 * call_.multiprocessors;
    run_cluster_gradient(a, space, call_.stream);
  }

  void finish(int64_t begin, int64_t end, const double* sum) {
    FinishArgs<S, C> a;
    a.x = x_;
    a.variant = p_.variant;
    a.normalize = p_.normalize;
    a.row_begin = begin;
    a.row_end = end;
    a.group_rows = p_.group_images * p_.positions;
    a.k = p_.global_clusters;
    a.labels = const_data_of<int64_t>(global_labels_);
    a.sizes = global_.sizes;
    a.centroids = const_data_of<C>(saved_.centroids);
    a.nearest = int_ + index_at_.nearest();
    a.distance = real_ + rows_at_.distance();
    a.mean = real_ + rows_at_.mean();
    a.mean_direction = real_ + rows_at_.mean_direction();
    a.weights = weights_;
    a.accumulator = sum;
    a.finite = int_ + index_at_.finite();
    a.out = data_of<S>(grad_);
    run_finish_rows(a, call_.stream);
  }

  Call call_;
  const Tensor& z_;
  const Problem& p_;
  const Saved& saved_;
  FeatureView<S> x_;
  cpu::SavedRows rows_at_;
  cpu::SavedIndex index_at_;
  Tensor local_labels_, global_labels_;
  const double* real_;
  const int64_t* int_;
  Tensor grad_, rank_, rows_;
  Clusters local_, global_;
  double *weights_ = nullptr, *local_weights_ = nullptr, *global_weights_ = nullptr;
};

}  // namespace

Tensor dse_components_backward(const Tensor& grad_components, const Tensor& z, const Tensor& local_labels,
                               const Tensor& global_labels, const Tensor& global_centroids,
                               const Tensor& saved_local, const Tensor& saved_global, const Tensor& saved_dim,
                               const Tensor& saved_rows, const Tensor& saved_index, std::string variant,
                               int64_t local_clusters, int64_t group_images, bool normalize) {
  require_device(z, z, "z");
  const Problem p = cpu::pose_problem(z, variant, local_clusters, std::max<int64_t>(global_centroids.size(1), 1),
                                      group_images, normalize);
  require_device(grad_components, z, "grad_components");
  if (grad_components.numel() != 5) {
    reject("grad_components must have 5 entries, got shape ", shape_of(grad_components), ".");
  }
  if (saved_rows.numel() != cpu::SavedRows(p).size() || saved_index.numel() != cpu::SavedIndex(p).size()) {
    reject("saved_rows and saved_index do not belong to these features.");
  }
  if (saved_local.numel() != p.rows() * local_width(p) || saved_global.numel() != p.rows() * global_width(p)) {
    reject("saved_local and saved_global do not belong to these features.");
  }
  const Saved saved{local_labels, global_labels, global_centroids, saved_local,
                    saved_global, saved_dim,     saved_rows,       saved_index};
  return with_types(z, "z", [&](auto types) {
    return Backward<typename decltype(types)::Feature>(z, p, saved).run(grad_components);
  });
}

}  // namespace dse::cuda
