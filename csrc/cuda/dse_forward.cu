// torch.ops.dse_ext.dse_components on a GPU: the stages of the CPU operator, as kernels on the current stream.
//
// The host decides by shapes alone and waits for nothing; features that are not finite are found on the device,
// where a flag turns every result into NaN. saved_local and saved_global are float64 and as wide as the largest
// matrix needs (heuristics.h); the other outputs are those of the CPU.

#include <string>
#include <tuple>

#include "cpu/arguments.h"
#include "cpu/dse_state.h"
#include "cuda/dse_state.h"
#include "cuda/image_kernel.cuh"
#include "cuda/kmeans.cuh"
#include "cuda/labels.h"
#include "cuda/operators.h"
#include "cuda/rank.h"
#include "cuda/row_statistics.cuh"
#include "cuda/steep_clusters.cuh"

namespace dse::cuda {
namespace {

struct Options {
  Problem problem;
  const int64_t* seed = nullptr;
  int64_t max_iters = 20;
  double tol = 1e-4;
  bool save = true;
};

struct Given {
  const std::optional<Tensor>& local_labels;
  const std::optional<Tensor>& global_labels;
  const std::optional<Tensor>& global_centroids;
};

__global__ void spread_flag_kernel(const int* flag, int64_t count, int* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + thread_id();
  if (i < count) out[i] = *flag;
}

template <class S>
class Forward {
  using C = typename Types<S>::Real;

 public:
  Forward(const Tensor& z, const Options& o)
      : call_(z), z_(z), o_(o), p_(o.problem), x_(view_of<S>(z)), rows_(p_), index_(p_) {
    for (Tensor& component : components_) component = empty(z, {}, kRealType<C>);
    local_labels_ = empty(z, {p_.images, p_.positions}, ScalarType::Long);
    global_labels_ = empty(z, {p_.images, p_.positions}, ScalarType::Long);
    centroids_ = empty(z, {p_.groups(), p_.global_clusters, p_.dim}, kRealType<C>);
    const int64_t kept = o.save ? 1 : 0;
    const int64_t side = cpu::dim_side(p_);
    saved_local_ = empty(z, {kept * p_.images, p_.positions, local_width(p_)}, ScalarType::Double);
    saved_global_ = empty(z, {kept * p_.images, p_.positions, global_width(p_)}, ScalarType::Double);
    saved_dim_ = empty(z, {kept * cpu::dim_matrices(p_), side, side}, ScalarType::Double);
    saved_rows_ = empty(z, {kept * rows_.size()}, ScalarType::Double);
    saved_index_ = empty(z, {kept * index_.size()}, ScalarType::Long);
    real_ = o.save ? data_of<double>(saved_rows_) : call_.template borrow<double>(rows_.size());
    int_ = o.save ? data_of<int64_t>(saved_index_) : call_.template borrow<int64_t>(index_.size());
    call_.clear(int_, index_.size() * static_cast<int64_t>(sizeof(int64_t)));
    finite_ = call_.template borrow<int>(1);
  }

  DseOutputs run(const Given& given) {
    ComponentArgs c;
    c.variant = p_.variant;
    c.dim = p_.dim;
    c.images = p_.images;
    c.groups = p_.groups();
    c.local_clusters = p_.local_clusters;
    c.global_clusters = p_.global_clusters;
    measure_local(given, &c);
    label_globally(given);
    const Clusters global = index_globally(given);
    measure_global(global, &c);
    measure_rank(&c);
    measure_rows(global, &c);
    c.finite = finite_;
    c.saved = real_ + rows_.components();
    c.saved_finite = int_ + index_.finite();
    ComponentOutputs<C> out;
    for (size_t i = 0; i < 5; ++i) out.value[i] = data_of<C>(components_[i]);
    run_components(c, out, call_.stream);
    return {components_[0], components_[1], components_[2], components_[3], components_[4],
            local_labels_,  global_labels_, centroids_,     saved_local_,   saved_global_,
            saved_dim_,     saved_rows_,    saved_index_};
  }

 private:
  int64_t* local_labels() const { return data_of<int64_t>(local_labels_); }
  int64_t* global_labels() const { return data_of<int64_t>(global_labels_); }
  int64_t group_rows() const { return p_.group_images * p_.positions; }

  // Row scales, local labels, nuclear norms of the local clusters.
  void measure_local(const Given& given, ComponentArgs* c) {
    const int64_t clusters = p_.images * p_.local_clusters;
    if (given.local_labels) {
      copy_given_labels(call_, *given.local_labels, z_, p_.images, p_.positions, p_.local_clusters,
                        "local_labels", local_labels());
    }
    auto* norms = call_.template borrow<double>(clusters);
    c->local_norms = norms;
    if (uses_image_kernel(p_)) {
      c->local_sizes = run_images(given.local_labels.has_value(), norms);
      settle_labels(call_, local_labels(), p_.rows(), p_.local_clusters, finite_);
      return;
    }
    run_row_scales(x_, p_.normalize, real_ + rows_.scale(), finite_, p_.rows(), call_.stream);
    x_.row_scale = real_ + rows_.scale();
    if (!given.local_labels) {
      const Call::Scope scope(call_);
      KMeansArgs<S> a = kmeans_args(p_.images, p_.positions, p_.local_clusters, RngPurpose::kLocalKMeans);
      a.labels = local_labels();
      run_kmeans(a, call_.borrow_bytes(kmeans_workspace(a.problems, a.rows, p_.dim, a.k)), call_.stream);
    }
    settle_labels(call_, local_labels(), p_.rows(), p_.local_clusters, finite_);
    const Clusters local = local_partition(call_, p_, local_labels());
    run_cluster_index(local, call_.stream);
    measure_clusters(local, local_width(p_), saved_local_, norms, int_ + index_.local_form());
    c->local_sizes = local.sizes;
  }

  // Returns the sizes of the clusters.
  const int64_t* run_images(bool labels_given, double* norms) {
    const ImagePlan plan = plan_image(p_.images, p_.positions, p_.dim, call_.shared_limit, call_.multiprocessors);
    ImageArguments<S> a;
    a.x = x_;
    a.local_clusters = static_cast<int>(p_.local_clusters);
    a.normalize = p_.normalize;
    a.seed = o_.seed;
    a.labels_given = labels_given;
    a.max_iters = static_cast<int>(std::min<int64_t>(o_.max_iters, 1 << 30));
    a.tol = o_.tol;
    a.row_scale = real_ + rows_.scale();
    a.finite = finite_;
    a.labels = local_labels();
    a.sizes = call_.template borrow<int64_t>(p_.images * p_.local_clusters);
    a.norms = norms;
    a.forms = int_ + index_.local_form();
    a.slots = o_.save ? data_of<double>(saved_local_) : nullptr;
    a.workspace = call_.template borrow<double>(plan.workspace());
    if (refines()) {
      a.steep = call_.template borrow<int>(p_.images * p_.local_clusters);
      a.steep_ratio = steep_ratio<S>();
      a.order = call_.template borrow<int64_t>(p_.rows());
      a.offset = call_.template borrow<int64_t>(p_.images * (p_.local_clusters + 1));
    }
    launch(DSE_KERNEL(fill_flags_kernel), {dim3(1), kRowThreads, 0, call_.stream}, finite_, int64_t{1});
    run_image_kernel(a, plan, call_.stream);
    x_.row_scale = real_ + rows_.scale();
    if (refines()) settle_images(a);
    return a.sizes;
  }

  // Without a gradient the values of float32 need no more than a Gram matrix holds.
  bool refines() const { return o_.save || sizeof(S) == 8; }

  // The local clusters whose spectra are too steep for the image kernel.
  void settle_images(const ImageArguments<S>& a) {
    const Call::Scope scope(call_);
    SteepClusters s;
    s.clusters.rows = p_.rows();
    s.clusters.group_rows = p_.positions;
    s.clusters.k = p_.local_clusters;
    s.clusters.groups = p_.images;
    s.clusters.offset = a.offset;
    s.clusters.order = a.order;
    s.steep = a.steep;
    s.exact = sizeof(S) == 8;
    s.values = a.norms;
    s.slots = {a.slots, p_.positions, true};
    const SteepPlan plan = plan_steep(p_.images * p_.local_clusters, p_.positions, p_.dim, call_.shared_limit,
                                      call_.multiprocessors, call_.budget());
    run_steep_clusters(x_, s, plan, call_.borrow_bytes(plan.workspace()), call_.stream);
  }

  KMeansArgs<S> kmeans_args(int64_t problems, int64_t rows, int64_t k, RngPurpose purpose) const {
    KMeansArgs<S> a;
    a.x = x_;
    a.unit_rows = p_.normalize;
    a.rows = rows;
    a.problems = problems;
    a.k = k;
    a.max_iters = o_.max_iters;
    a.tol = o_.tol;
    a.seed = o_.seed;
    a.purpose = purpose;
    a.finite = finite_;
    return a;
  }

  void label_globally(const Given& given) {
    if (given.global_centroids) load_centroids(*given.global_centroids);
    if (given.global_labels) {
      copy_given_labels(call_, *given.global_labels, z_, p_.images, p_.positions, p_.global_clusters,
                        "global_labels", global_labels());
    } else if (given.global_centroids) {
      NearestArgs<C> a;
      a.centroids = data_of<C>(centroids_);
      a.group_rows = group_rows();
      a.k = p_.global_clusters;
      a.assigned = global_labels();
      run_nearest_centroid(x_, a, call_.stream);
    } else {
      const Call::Scope scope(call_);
      KMeansArgs<S> a = kmeans_args(p_.groups(), group_rows(), p_.global_clusters, RngPurpose::kGlobalKMeans);
      a.labels = global_labels();
      a.centroids = call_.template borrow<double>(centroids_.numel());
      run_kmeans(a, call_.borrow_bytes(kmeans_workspace(a.problems, a.rows, p_.dim, a.k)), call_.stream);
      store_centroids(a.centroids);
    }
    settle_labels(call_, global_labels(), p_.rows(), p_.global_clusters, finite_);
  }

  void load_centroids(const Tensor& given) {
    const Tensor cast = contiguous_as(given, kRealType<C>);
    const int64_t last = p_.rows() - (p_.groups() - 1) * group_rows();
    run_load_centroids(view_of<C>(cast), last, group_rows(), finite_, data_of<C>(centroids_), call_.stream);
  }

  void store_centroids(const double* from) {
    run_store_centroids(from, centroids_.numel(), finite_, centroids_.numel(), data_of<C>(centroids_),
                        call_.stream);
  }

  // Centroids of given labels are the means of their rows; a cluster without rows has none.
  Clusters index_globally(const Given& given) {
    const Clusters global = global_partition(call_, p_, global_labels());
    run_cluster_index(global, call_.stream);
    if (given.global_labels && !given.global_centroids) {
      const Call::Scope scope(call_);
      auto* means = call_.template borrow<double>(centroids_.numel());
      run_cluster_means(x_, global, static_cast<double>(INFINITY), means, nullptr, call_.stream);
      store_centroids(means);
    }
    return global;
  }

  void measure_global(const Clusters& global, ComponentArgs* c) {
    auto* norms = call_.template borrow<double>(p_.groups() * p_.global_clusters);
    measure_clusters(global, global_width(p_), saved_global_, norms, int_ + index_.global_form());
    c->global_norms = norms;
    c->global_sizes = global.sizes;
  }

  // Nuclear norms. Without a gradient the matrices are working memory, for some groups at a time.
  void measure_clusters(const Clusters& all, int64_t width, const Tensor& saved, double* norms, int64_t* forms) {
    const Call::Scope scope(call_);
    auto* flags = call_.template borrow<int>(all.groups);
    launch(DSE_KERNEL(spread_flag_kernel),
           {grid_of(ceil_div(all.groups, kRowThreads)), kRowThreads, 0, call_.stream}, finite_, all.groups,
           flags);
    const int64_t group_elements = all.group_rows * width;
    const int64_t part =
        o_.save ? all.groups : call_.part_of(all.groups, group_elements * static_cast<int64_t>(sizeof(double)));
    ClusterNormArgs<S> a;
    a.x = x_;
    a.clusters = all;
    a.slots = {o_.save ? data_of<double>(saved) : call_.template borrow<double>(part * group_elements), width,
               false};
    a.want_w = o_.save;
    a.finite = flags;
    a.norms = norms;
    a.forms = forms;
    a.gram_blocks = 16 * call_.multiprocessors;
    a.eigen = eigen_plan(call_);
    if (refines()) a.steep = call_.template borrow<int>(all.groups * all.k);
    a.steep_ratio = steep_ratio<S>();
    const SteepPlan steep = plan_steep(part * all.k, std::min(all.group_rows, p_.dim), p_.dim, call_.shared_limit,
                                       call_.multiprocessors, call_.budget());
    void* space = call_.borrow_bytes(
        std::max(cluster_norms_workspace(part * all.k, all.group_rows, p_.dim, a.eigen), steep.workspace()));
    for (int64_t begin = 0; begin < all.groups; begin += part) {
      a.clusters.group_begin = begin;
      a.clusters.groups = std::min(part, all.groups - begin);
      run_cluster_norms(a, space, call_.stream);
      if (refines()) run_steep_clusters(x_, steep_clusters(a), steep, space, call_.stream);
    }
  }

  void measure_rank(ComponentArgs* c) {
    RankMatrices r;
    r.count = cpu::dim_matrices(p_);
    r.n = p_.rows() / r.count;
    if (p_.variant == Variant::kEvaluation) {
      int64_t* permutation = int_ + index_.permutation();
      run_permute_positions(o_.seed, p_.images, p_.positions, permutation, call_.stream);
      r.order = permutation;
    }
    r.finite = finite_;
    r.values = call_.template borrow<double>(r.count);
    r.want_w = o_.save;
    r.w = o_.save ? data_of<double>(saved_dim_) : nullptr;
    {
      const Call::Scope scope(call_);
      measure_ranks(call_, x_, r);
    }
    c->ranks = r.values;
    c->rank_count = r.count;
    c->rank_divisor = rank_divisor(p_);
  }

  // avg_norm, and the distance of every row to its nearest other centroid.
  void measure_rows(const Clusters& global, ComponentArgs* c) {
    auto* average = call_.template borrow<double>(1);
    {
      const Call::Scope scope(call_);
      run_average_norm(x_, real_ + rows_.mean(), real_ + rows_.mean_direction(), average,
                       call_.borrow_bytes(average_norm_workspace(p_.rows(), p_.dim)), call_.stream);
    }
    c->average = average;
    NearestArgs<C> a;
    a.centroids = data_of<C>(centroids_);
    a.labels = global_labels();
    a.group_rows = group_rows();
    a.k = p_.global_clusters;
    a.nearest = int_ + index_.nearest();
    a.distance = real_ + rows_.distance();
    run_nearest_centroid(x_, a, call_.stream);
    auto* sums = call_.template borrow<double>(p_.groups());
    auto* terms = call_.template borrow<int64_t>(p_.groups());
    run_inter_terms(a.distance, a.nearest, p_.rows(), group_rows(), p_.global_clusters, p_.variant, global.offset,
                    global.order, sums, terms, call_.stream);
    c->inter_sums = sums;
    c->inter_terms = terms;
  }

  Call call_;
  const Tensor& z_;
  const Options& o_;
  const Problem& p_;
  FeatureView<S> x_;
  cpu::SavedRows rows_;
  cpu::SavedIndex index_;
  std::array<Tensor, 5> components_;
  Tensor local_labels_, global_labels_, centroids_;
  Tensor saved_local_, saved_global_, saved_dim_, saved_rows_, saved_index_;
  double* real_ = nullptr;
  int64_t* int_ = nullptr;
  int* finite_ = nullptr;
};

}  // namespace

DseOutputs dse_components(const Tensor& z, const Tensor& seed, std::string variant, int64_t local_clusters,
                          int64_t global_clusters, std::optional<int64_t> group_images, bool normalize,
                          int64_t max_kmeans_iters, double tol, std::optional<Tensor> local_labels,
                          std::optional<Tensor> global_labels, std::optional<Tensor> global_centroids,
                          bool save_for_backward) {
  require_device(z, z, "z");
  Options o;
  o.problem = cpu::pose_problem(z, variant, local_clusters, global_clusters, group_images, normalize);
  cpu::require_kmeans_options(max_kmeans_iters, tol, "max_kmeans_iters");
  if (global_centroids) {
    require_device(*global_centroids, z, "global_centroids");
    with_types(*global_centroids, "global_centroids", [](auto) { return 0; });
  }
  cpu::count_clusters(o.problem, local_labels.has_value(), global_labels.has_value(), global_centroids);
  o.seed = seed_of(seed, z);
  o.max_iters = max_kmeans_iters;
  o.tol = tol;
  o.save = save_for_backward;
  return with_types(z, "z", [&](auto types) {
    return Forward<typename decltype(types)::Feature>(z, o).run({local_labels, global_labels, global_centroids});
  });
}

}  // namespace dse::cuda
