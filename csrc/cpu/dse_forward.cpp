// torch.ops.dse_ext.dse_components on the CPU.
//
// Order of the stages: row norms, local and global k-means (labels), nuclear norms of all clusters, effective
// rank, spread of the rows, distance to the nearest other centroid. Features are read in place; the largest
// workspaces are groups of rows, one a thread, while k-means runs.

#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/rng.h"
#include "cpu/arguments.h"
#include "cpu/clusters.h"
#include "cpu/dse_state.h"
#include "cpu/kmeans.h"
#include "cpu/lazy_zeros.h"
#include "cpu/operators.h"
#include "cpu/row_statistics.h"
#include "cpu/stage.h"
#include "cpu/streamed.h"
#include "cpu/streamed_rank.h"
#include "cpu/validate.h"

namespace dse::cpu {
namespace {

using torch::headeronly::ScalarType;

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

// Clusters of groups of rows, local or global.
struct Partition {
  std::vector<ClusterIndex> index;
  std::vector<double> norms;  // groups * k
  int64_t k = 0;

  double norm(size_t g, int64_t c) const { return norms[g * static_cast<size_t>(k) + static_cast<size_t>(c)]; }
};

template <typename T>
class Forward {
 public:
  Forward(const Tensor& z, Problem problem, uint64_t seed, KMeansOptions options, bool save)
      : z_(z), p_(problem), seed_(seed), options_(options), x_(Features::of(z, "z")), rows_(p_), index_(p_) {
    const ScalarType real = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
    for (Tensor& component : components_) component = empty(z, {}, real);
    local_labels_ = empty(z, {p_.images, p_.positions}, ScalarType::Long);
    global_labels_ = empty(z, {p_.images, p_.positions}, ScalarType::Long);
    centroids_ = empty(z, {p_.groups(), p_.global_clusters, p_.dim}, real);
    const int64_t kept = save ? 1 : 0;
    saved_local_ = lazy_zeros({kept * p_.images, p_.positions, p_.dim}, real);
    saved_global_ = lazy_zeros({kept * p_.images, p_.positions, p_.dim}, real);
    saved_dim_ = empty(z, {kept * dim_matrices(p_), dim_side(p_), dim_side(p_)}, ScalarType::Double);
    saved_rows_ = empty(z, {kept * rows_.size()}, ScalarType::Double);
    saved_index_ = empty(z, {kept * index_.size()}, ScalarType::Long);
    save_ = save;
    if (!save) {
      scratch_rows_.reserve(rows_.size());
      scratch_index_.reserve(index_.size());
    }
    real_ = save ? static_cast<double*>(saved_rows_.mutable_data_ptr()) : scratch_rows_.data();
    int_ = save ? static_cast<int64_t*>(saved_index_.mutable_data_ptr()) : scratch_index_.data();
  }

  DseOutputs run(const std::optional<Tensor>& local_labels, const std::optional<Tensor>& global_labels,
                 const std::optional<Tensor>& global_centroids) {
    const bool finite = row_scales(x_, p_.normalize, real_ + rows_.scale(), real_ + rows_.mean());
    x_.row_scale = real_ + rows_.scale();
    x_.unit_rows = p_.normalize;
    int_[index_.finite()] = finite ? 1 : 0;
    if (!finite) {
      poison();
      return outputs();
    }
    label_locally(local_labels);
    label_globally(global_labels, global_centroids);
    double value[5];
    if (p_.variant == Variant::kEvaluation) {
      measure_clusters(nullptr);
      value[3] = permuted_rank();
    } else {
      value[3] = rank_and_radii();
    }
    value[4] = average_norm(x_, real_ + rows_.mean(), real_ + rows_.mean_direction());
    value[0] = inter_distance();
    value[1] = mean_local_radius();
    value[2] = mean_global_radius();
    if (divides_by_avg_norm(p_.variant)) {
      // All rows equal: nothing to measure the radii by, and nothing to measure.
      for (int i = 0; i < 3; ++i) value[i] = value[4] > 0.0 ? value[i] / value[4] : 0.0;
    }
    for (size_t i = 0; i < 5; ++i) {
      real_[rows_.components() + static_cast<int64_t>(i)] = value[i];
      write_scalar(components_[i], value[i]);
    }
    return outputs();
  }

 private:
  DseOutputs outputs() const {
    return {components_[0], components_[1], components_[2], components_[3], components_[4],
            local_labels_,  global_labels_, centroids_,     saved_local_,   saved_global_,
            saved_dim_,     saved_rows_,    saved_index_};
  }

  static void write_scalar(Tensor& t, double value) {
    *static_cast<T*>(t.mutable_data_ptr()) = static_cast<T>(value);
  }
  int64_t* labels(Tensor& t) const { return static_cast<int64_t*>(t.mutable_data_ptr()); }

  // Features that are not finite: everything is NaN, labels are zero.
  void poison() {
    for (Tensor& component : components_) write_scalar(component, std::numeric_limits<double>::quiet_NaN());
    std::fill_n(labels(local_labels_), p_.rows(), int64_t{0});
    std::fill_n(labels(global_labels_), p_.rows(), int64_t{0});
    std::fill_n(static_cast<T*>(centroids_.mutable_data_ptr()), centroids_.numel(),
                std::numeric_limits<T>::quiet_NaN());
    std::fill_n(int_, index_.size(), int64_t{0});
    if (!save_) return;
    std::fill_n(static_cast<double*>(saved_dim_.mutable_data_ptr()), saved_dim_.numel(), 0.0);
    std::fill_n(real_, rows_.size(), 0.0);
  }

  static void copy_labels(const Tensor& from, int64_t* to) {
    const auto* src = static_cast<const int64_t*>(from.const_data_ptr());
    const int64_t rows = from.size(0), columns = from.size(1), s0 = from.stride(0), s1 = from.stride(1);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = src[i * s0 + j * s1];
  }

  void label_locally(const std::optional<Tensor>& given) {
    DSE_STAGE("local k-means");
    int64_t* out = labels(local_labels_);
    if (given) {
      copy_labels(*given, out);
      return;
    }
    std::vector<KMeansWorkspace<T>> workspaces(static_cast<size_t>(max_workers()));
    for_each_problem(p_.images, p_.rows() * p_.dim * p_.local_clusters, [&](int64_t image, int64_t worker) {
      kmeans<T>(x_, image * p_.positions, p_.positions, p_.local_clusters, options_,
                {seed_, RngPurpose::kLocalKMeans, static_cast<uint64_t>(image)},
                workspaces[static_cast<size_t>(worker)], out + image * p_.positions, nullptr, false);
    });
  }

  void label_globally(const std::optional<Tensor>& given, const std::optional<Tensor>& given_centroids) {
    DSE_STAGE("global k-means");
    int64_t* out = labels(global_labels_);
    auto* centroids = static_cast<T*>(centroids_.mutable_data_ptr());
    const int64_t k = p_.global_clusters, d = p_.dim;
    const T absent = std::numeric_limits<T>::infinity();
    std::fill_n(centroids, centroids_.numel(), absent);
    if (given) copy_labels(*given, out);
    if (given_centroids) copy_centroids(*given_centroids, centroids);
    if (given) return;
    std::vector<KMeansWorkspace<T>> workspaces(static_cast<size_t>(max_workers()));
    Buffer<double> fresh(max_workers() * k * d);
    for_each_problem(p_.groups(), p_.rows() * d * k, [&](int64_t g, int64_t worker) {
      const int64_t begin = p_.group_begin(g), n = p_.group_end(g) - begin;
      T* own = centroids + g * k * d;
      if (given_centroids) {
        assign_to_given(begin, n, own, out + begin);
        return;
      }
      const int64_t clusters = std::min(k, n);
      double* wide = fresh.data() + worker * k * d;
      kmeans<T>(x_, begin, n, clusters, options_, {seed_, RngPurpose::kGlobalKMeans, static_cast<uint64_t>(g)},
                workspaces[static_cast<size_t>(worker)], out + begin, wide, false);
      for (int64_t i = 0; i < clusters * d; ++i) own[i] = static_cast<T>(wide[i]);
    });
  }

  void copy_centroids(const Tensor& given, T* centroids) {
    const int64_t k = p_.global_clusters, d = p_.dim;
    const DType type = dtype_of(given, "global_centroids");
    const auto* data = static_cast<const char*>(given.const_data_ptr());
    const auto bytes = static_cast<int64_t>(given.element_size());
    Buffer<double> row(d);
    for (int64_t g = 0; g < p_.groups(); ++g) {
      const int64_t rows = p_.group_end(g) - p_.group_begin(g);
      for (int64_t c = 0; c < k; ++c) {
        load_run(type, data + bytes * (g * given.stride(0) + c * given.stride(1)), given.stride(2), d, 1.0,
                 row.data());
        // A smaller last group may have fewer rows than clusters; zeros beyond them are padding.
        const bool padding =
            c >= rows && rows < p_.group_images * p_.positions && sum_of_squares(row.data(), d) == 0.0;
        if (padding) continue;
        for (int64_t f = 0; f < d; ++f) centroids[(g * k + c) * d + f] = static_cast<T>(row[f]);
      }
    }
  }

  // Labels of the nearest of the given centroids.
  void assign_to_given(int64_t begin, int64_t n, const T* centroids, int64_t* out) {
    const int64_t k = p_.global_clusters, d = p_.dim;
    Buffer<double> wide(k * d), distance(n);
    for (int64_t i = 0; i < k * d; ++i) wide[i] = static_cast<double>(centroids[i]);
    std::fill_n(out, n, int64_t{-1});  // no row has a centroid of its own yet
    Buffer<int64_t> nearest(n);
    if (nearest_other_centroid(x_, begin, begin + n, out, wide.data(), k, nearest.data(), distance.data())) {
      std::copy_n(nearest.data(), n, out);
    } else {
      std::fill_n(out, n, int64_t{0});
    }
  }

  void measure_clusters(const std::function<void()>& beside) {
    std::vector<ClusterItem<T>> items;
    T* local_slots = save_ ? static_cast<T*>(saved_local_.mutable_data_ptr()) : nullptr;
    T* global_slots = save_ ? static_cast<T*>(saved_global_.mutable_data_ptr()) : nullptr;
    const auto prepare = [&](Partition& part, int64_t groups, int64_t k) {
      part.k = k;
      part.index.resize(static_cast<size_t>(groups));
      part.norms.resize(static_cast<size_t>(groups * k));
    };
    prepare(local_, p_.images, p_.local_clusters);
    prepare(global_, p_.groups(), p_.global_clusters);
    const auto add = [&](Partition& part, int64_t g, const int64_t* label, int64_t begin, int64_t n, T* slots,
                         int64_t* forms) {
      ClusterIndex& index = part.index[static_cast<size_t>(g)];
      index.build(label + begin, n, part.k, begin);
      append_clusters<T>(index, part.k, p_.dim, slots != nullptr ? slots + begin * p_.dim : nullptr,
                         part.norms.data() + g * part.k, forms + g * part.k, items);
    };
    for (int64_t image = 0; image < p_.images; ++image) {
      add(local_, image, labels(local_labels_), image * p_.positions, p_.positions, local_slots,
          int_ + index_.local_form());
    }
    for (int64_t g = 0; g < p_.groups(); ++g) {
      add(global_, g, labels(global_labels_), p_.group_begin(g), p_.group_end(g) - p_.group_begin(g),
          global_slots, int_ + index_.global_form());
    }
    nuclear_norms(x_, items, beside);
  }

  // Effective rank of all rows, around the clusters' nuclear norms: one thread finds the eigenvalues of the large
  // matrix while the others go through the clusters, and does the rest of what threads cannot share.
  double rank_and_radii() {
    StreamedRank rank;
    rank.measure({&x_, nullptr, 0, p_.rows(), false}, kExact);
    if (!rank.is_small()) rank.reduce(kExact);
    RankForm form;
    std::optional<double> early;
    const auto finish = [&] { return rank.finish(kExact, save_ ? matrices() : nullptr, &form); };
    measure_clusters([&] {
      if (rank.is_small()) rank.reduce(kExact);
      rank.find_eigenvalues();
      if (rank.is_small() && rank.is_nearly_done()) early = finish();
    });
    const double value = early ? *early : finish();
    int_[index_.rank_form()] = form.code();
    if (p_.variant == Variant::kPaper) return value;
    return value / static_cast<double>(std::min(p_.rows(), p_.dim));
  }

  // Mean effective rank of the positions of the permuted images: one row of every image each.
  double permuted_rank() {
    int64_t* permutation = int_ + index_.permutation();
    int64_t* forms = int_ + index_.rank_form();
    permute_positions(permutation);
    const int64_t side = dim_side(p_);
    std::vector<double> values(static_cast<size_t>(p_.positions));
    std::vector<StreamedRank> ranks(static_cast<size_t>(max_workers()));
    for_each_task(p_.positions, p_.rows() * p_.dim * side, [&](int64_t j, int64_t worker) {
      RankForm form;
      values[static_cast<size_t>(j)] =
          ranks[static_cast<size_t>(worker)].run({&x_, permutation + j * p_.images, 0, p_.images, false}, kExact,
                                                 save_ ? matrices() + j * side * side : nullptr, &form);
      forms[j] = form.code();
    });
    double total = 0.0;
    for (const double value : values) total += value;
    return total / static_cast<double>(p_.positions * std::min(p_.images, p_.dim));
  }

  double* matrices() const { return static_cast<double*>(saved_dim_.mutable_data_ptr()); }

  // rows[j * B + b] = the row of image b that stands at position j after a random permutation of its positions
  // (Fisher and Yates).
  void permute_positions(int64_t* rows) {
    for_each_task(p_.images, 100 * p_.rows(), [&](int64_t b, int64_t) {
      const RngStream rng{seed_, RngPurpose::kPermutation, static_cast<uint64_t>(b)};
      std::vector<int64_t> order(static_cast<size_t>(p_.positions));
      for (size_t j = 0; j < order.size(); ++j) order[j] = b * p_.positions + static_cast<int64_t>(j);
      for (int64_t j = p_.positions - 1; j > 0; --j) {
        std::swap(order[static_cast<size_t>(j)],
                  order[static_cast<size_t>(rng.below(static_cast<uint32_t>(j), j + 1))]);
      }
      for (int64_t j = 0; j < p_.positions; ++j) rows[j * p_.images + b] = order[static_cast<size_t>(j)];
    });
  }

  double inter_distance() {
    const int64_t k = p_.global_clusters, d = p_.dim;
    auto* centroids = static_cast<T*>(centroids_.mutable_data_ptr());
    int64_t* nearest = int_ + index_.nearest();
    double* distance = real_ + rows_.distance();
    Buffer<double> wide(k * d);
    double total = 0.0;
    int64_t terms = 0;
    for (int64_t g = 0; g < p_.groups(); ++g) {
      const int64_t begin = p_.group_begin(g), end = p_.group_end(g);
      T* own = centroids + g * k * d;
      const ClusterIndex& index = global_.index[static_cast<size_t>(g)];
      if (centroids_from_labels_) label_means(index, own);
      for (int64_t i = 0; i < k * d; ++i) wide[i] = static_cast<double>(own[i]);
      if (!nearest_other_centroid(x_, begin, end, labels(global_labels_) + begin, wide.data(), k, nearest + begin,
                                  distance + begin)) {
        continue;
      }
      if (p_.variant != Variant::kPaper) {
        double sum = 0.0;
        for (int64_t i = begin; i < end; ++i) sum += distance[i];
        total += sum / static_cast<double>(end - begin);
        ++terms;
        continue;
      }
      for (int64_t c = 0; c < k; ++c) {
        if (index.size(c) == 0) continue;
        double sum = 0.0;
        for (int64_t i = 0; i < index.size(c); ++i) {
          const double dist = distance[index.rows(c)[i]];
          sum += dist * dist;
        }
        total += sum / static_cast<double>(index.size(c));
        ++terms;
      }
    }
    return terms > 0 ? total / static_cast<double>(terms) : 0.0;
  }

  // Centroids of given labels: the means of their rows; a cluster without rows has none.
  void label_means(const ClusterIndex& index, T* centroids) {
    const int64_t d = p_.dim;
    Buffer<double> means(max_workers() * d);
    for_each_task(p_.global_clusters, index.offset.back() * d, [&](int64_t c, int64_t worker) {
      if (index.size(c) == 0) return;
      double* mean = means.data() + worker * d;
      column_means({&x_, index.rows(c), 0, index.size(c), false}, mean);
      for (int64_t f = 0; f < d; ++f) centroids[c * d + f] = static_cast<T>(mean[f]);
    });
  }

  // Mean over images of the mean over the clusters of an image.
  double mean_local_radius() const {
    double total = 0.0;
    int64_t terms = 0;
    for (size_t image = 0; image < local_.index.size(); ++image) {
      double sum = 0.0;
      int64_t clusters = 0;
      add_radii(local_, image, &sum, &clusters);
      if (clusters == 0) continue;
      total += sum / static_cast<double>(clusters);
      ++terms;
    }
    return terms > 0 ? total / static_cast<double>(terms) : 0.0;
  }

  // Mean over all clusters of all groups.
  double mean_global_radius() const {
    double sum = 0.0;
    int64_t clusters = 0;
    for (size_t g = 0; g < global_.index.size(); ++g) add_radii(global_, g, &sum, &clusters);
    return clusters > 0 ? sum / static_cast<double>(clusters) : 0.0;
  }

  void add_radii(const Partition& part, size_t g, double* sum, int64_t* clusters) const {
    for (int64_t c = 0; c < part.k; ++c) {
      const int64_t n = part.index[g].size(c);
      if (n < 2) continue;
      *sum += part.norm(g, c) * radius_scale(p_.variant, n, p_.dim);
      ++*clusters;
    }
  }

 public:
  // Labels were given without centroids.
  bool centroids_from_labels_ = false;

 private:
  static constexpr bool kExact = sizeof(T) == 8;

  const Tensor& z_;
  Problem p_;
  uint64_t seed_;
  KMeansOptions options_;
  Features x_;
  SavedRows rows_;
  SavedIndex index_;
  bool save_ = false;
  std::array<Tensor, 5> components_;
  Tensor local_labels_, global_labels_, centroids_;
  Tensor saved_local_, saved_global_, saved_dim_, saved_rows_, saved_index_;
  Buffer<double> scratch_rows_;
  Buffer<int64_t> scratch_index_;
  double* real_ = nullptr;
  int64_t* int_ = nullptr;
  Partition local_, global_;
};

}  // namespace

DseOutputs dse_components(const Tensor& z, const Tensor& seed, std::string variant, int64_t local_clusters,
                          int64_t global_clusters, std::optional<int64_t> group_images, bool normalize,
                          int64_t max_kmeans_iters, double tol, std::optional<Tensor> local_labels,
                          std::optional<Tensor> global_labels, std::optional<Tensor> global_centroids,
                          bool save_for_backward) {
  Problem p = make_problem(z, variant, local_clusters, global_clusters, group_images, normalize);
  dtype_of(z, "z");
  require_kmeans_options(max_kmeans_iters, tol, "max_kmeans_iters");
  if (global_centroids) dtype_of(*global_centroids, "global_centroids");
  apply_given(p, local_labels, global_labels, global_centroids);
  const uint64_t seed_number = seed_value(seed);
  const auto compute = [&](auto tag) {
    Forward<decltype(tag)> forward(z, p, seed_number, {max_kmeans_iters, tol}, save_for_backward);
    forward.centroids_from_labels_ = global_labels.has_value() && !global_centroids.has_value();
    return forward.run(local_labels, global_labels, global_centroids);
  };
  return z.scalar_type() == ScalarType::Double ? compute(double{}) : compute(float{});
}

}  // namespace dse::cpu
