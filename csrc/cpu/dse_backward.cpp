// Gradient of dse_components in closed form (docs/definitions.md).
//
// Group by group, in a workspace of one group of rows: g = X F (effective rank), plus W_c X_c of every local and
// global cluster, plus the two distances' unit vectors; then the Jacobian of the normalization, and the row is
// written once in the input's dtype. The evaluation variant's effective ranks run across all images, so they
// are summed into a buffer of all rows first.

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/arguments.h"
#include "cpu/aten.h"
#include "cpu/clusters.h"
#include "cpu/dse_state.h"
#include "cpu/operators.h"
#include "cpu/validate.h"

namespace dse::cpu {
namespace {

using torch::headeronly::ScalarType;

// Upstream gradients, in the order of the components.
struct Upstream {
  double inter, image, batch, dim, average;
};

template <typename T>
class Backward {
 public:
  Backward(const Tensor& z, const Problem& p, const Upstream& upstream, const Tensor& local_labels,
           const Tensor& global_labels, const Tensor& centroids, const Tensor& saved_local,
           const Tensor& saved_global, const Tensor& saved_dim, const Tensor& saved_rows,
           const Tensor& saved_index)
      : p_(p),
        up_(upstream),
        x_(Features::of(z, "z")),
        rows_at_(p),
        index_at_(p),
        local_labels_(static_cast<const int64_t*>(local_labels.const_data_ptr())),
        global_labels_(static_cast<const int64_t*>(global_labels.const_data_ptr())),
        centroids_(static_cast<const T*>(centroids.const_data_ptr())),
        saved_local_(static_cast<const T*>(saved_local.const_data_ptr())),
        saved_global_(static_cast<const T*>(saved_global.const_data_ptr())),
        saved_dim_(static_cast<const double*>(saved_dim.const_data_ptr())),
        real_(static_cast<const double*>(saved_rows.const_data_ptr())),
        int_(static_cast<const int64_t*>(saved_index.const_data_ptr())) {
    x_.row_scale = real_ + rows_at_.scale();
    grad_ = torch::stable::new_empty(z, {shape_.data(), 3});
  }

  Tensor run() {
    if (int_[index_at_.finite()] == 0) {
      fill_nan();
      return grad_;
    }
    weigh_components();
    index_clusters();
    if (p_.variant == Variant::kEvaluation) add_permuted_ranks();
    for (int64_t g = 0; g < p_.groups(); ++g) group(g);
    return grad_;
  }

 private:
  char* out_row(int64_t i) const {
    return static_cast<char*>(grad_.mutable_data_ptr()) + i * p_.dim * x_.element_size;
  }

  void fill_nan() {
    std::vector<double> row(static_cast<size_t>(p_.dim), std::numeric_limits<double>::quiet_NaN());
    for (int64_t i = 0; i < p_.rows(); ++i) store_run(x_.dtype, row.data(), p_.dim, out_row(i));
  }

  // Components -> the terms that they are means of, and avg_norm's share.
  void weigh_components() {
    const double* component = real_ + rows_at_.components();
    const double average = component[4];
    inter_ = up_.inter;
    image_ = up_.image;
    batch_ = up_.batch;
    spread_ = up_.average;
    if (divides_by_avg_norm(p_.variant)) {
      const double inverse = average > 0.0 ? 1.0 / average : 0.0;
      spread_ -= (up_.inter * component[0] + up_.image * component[1] + up_.batch * component[2]) * inverse;
      inter_ *= inverse;
      image_ *= inverse;
      batch_ *= inverse;
    }
    if (average == 0.0) spread_ = 0.0;
    rank_ = up_.dim;
    if (p_.variant != Variant::kPaper) rank_ /= static_cast<double>(dim_side(p_));
    if (p_.variant == Variant::kEvaluation) rank_ /= static_cast<double>(p_.positions);
  }

  void index_clusters() {
    local_.resize(static_cast<size_t>(p_.images));
    global_.resize(static_cast<size_t>(p_.groups()));
    int64_t images_with_terms = 0, global_terms = 0;
    for (int64_t b = 0; b < p_.images; ++b) {
      const int64_t begin = b * p_.positions;
      local_[static_cast<size_t>(b)].build(local_labels_ + begin, p_.positions, p_.local_clusters, begin);
      if (count_terms(local_[static_cast<size_t>(b)], p_.local_clusters, 2) > 0) ++images_with_terms;
    }
    inter_terms_ = 0;
    for (int64_t g = 0; g < p_.groups(); ++g) {
      const int64_t begin = p_.group_begin(g);
      ClusterIndex& index = global_[static_cast<size_t>(g)];
      index.build(global_labels_ + begin, p_.group_end(g) - begin, p_.global_clusters, begin);
      global_terms += count_terms(index, p_.global_clusters, 2);
      if (int_[index_at_.nearest() + begin] < 0) continue;
      inter_terms_ += p_.variant == Variant::kPaper ? count_terms(index, p_.global_clusters, 1) : 1;
    }
    if (images_with_terms > 0) image_ /= static_cast<double>(images_with_terms);
    if (global_terms > 0) batch_ /= static_cast<double>(global_terms);
    if (inter_terms_ > 0) inter_ /= static_cast<double>(inter_terms_);
  }

  static int64_t count_terms(const ClusterIndex& index, int64_t k, int64_t least) {
    int64_t terms = 0;
    for (int64_t c = 0; c < k; ++c) terms += index.size(c) >= least ? 1 : 0;
    return terms;
  }

  static constexpr int64_t kRankRows = 392;

  // The saved matrix stands on the side of the rows (M X) rather than of the features (X M): there are no more
  // rows than features in the matrix whose rank was measured, of which a group may be a part.
  bool rows_side() const { return (p_.variant == Variant::kEvaluation ? p_.images : p_.rows()) <= p_.dim; }

  // Adds rank_ * M X or rank_ * X M for the rows X of `set` to rows of `accumulator`.
  template <typename C>
  void rank_gradient(const RowSet& set, const double* saved, T* accumulator, int64_t first_row) const {
    const int64_t d = p_.dim, n = set.n, side = dim_side(p_);
    Buffer<C> matrix(side * side);
    for (int64_t i = 0; i < side * side; ++i) matrix[i] = static_cast<C>(saved[i]);
    if (rows_side()) {
      Buffer<double> row(d);
      Buffer<C> x(n * d), product(n * d);
      for (int64_t i = 0; i < n; ++i) {
        x_.load(set.index(i), row.data());
        for (int64_t f = 0; f < d; ++f) x[i * d + f] = static_cast<C>(row[f]);
      }
      matmul(product.data(), {matrix.data(), n, n, n, 1}, {x.data(), n, d, d, 1}, product.data(), d);
      for (int64_t i = 0; i < n; ++i)
        add_scaled(product.data() + i * d, accumulator + (set.index(i) - first_row) * d);
      return;
    }
    const int64_t tasks = (n + kRankRows - 1) / kRankRows;
    const int64_t share = kRankRows * d;
    Buffer<C> work(max_workers() * 2 * share);
    Buffer<double> row_work(max_workers() * d);
    for_each_task(tasks, n * d * d, [&](int64_t task, int64_t worker) {
      C* x = work.data() + worker * 2 * share;
      C* product = x + share;
      double* row = row_work.data() + worker * d;
      const int64_t begin = task * kRankRows, rows = std::min(n - begin, kRankRows);
      for (int64_t i = 0; i < rows; ++i) {
        x_.load(set.index(begin + i), row);
        for (int64_t f = 0; f < d; ++f) x[i * d + f] = static_cast<C>(row[f]);
      }
      matmul(product, {x, rows, d, d, 1}, {matrix.data(), d, d, d, 1}, product, d);
      for (int64_t i = 0; i < rows; ++i)
        add_scaled(product + i * d, accumulator + (set.index(begin + i) - first_row) * d);
    });
  }

  template <typename C>
  void add_scaled(const C* src, T* dst) const {
    const C scale = static_cast<C>(rank_);
    for (int64_t f = 0; f < p_.dim; ++f) dst[f] += static_cast<T>(scale * src[f]);
  }

  void rank_gradient_of(const RowSet& set, const double* saved, bool steep, T* accumulator,
                        int64_t first_row) const {
    // A steep spectrum leaves small differences of large terms, which only float64 keeps; so do features (without
    // normalization) whose inverse squares leave the range of float32.
    const int64_t side = dim_side(p_);
    double largest = 0.0;
    for (int64_t i = 0; i < side; ++i) largest = std::max(largest, std::abs(saved[i * side + i]));
    const bool in_range = largest < 0x1p100 && largest > 0x1p-100;
    if (steep || !in_range || sizeof(T) == 8) {
      rank_gradient<double>(set, saved, accumulator, first_row);
    } else {
      rank_gradient<float>(set, saved, accumulator, first_row);
    }
  }

  void add_permuted_ranks() {
    const int64_t side = dim_side(p_);
    T* all = all_rows_.reserve_zeroed(p_.rows() * p_.dim);
    if (rank_ == 0.0) return;
    // Every row stands at one position only: positions are independent.
    for_each_task(p_.positions, p_.rows() * p_.dim * side, [&](int64_t j, int64_t) {
      const RowSet set{&x_, int_ + index_at_.permutation() + j * p_.images, 0, p_.images, false};
      rank_gradient_of(set, saved_dim_ + j * side * side, int_[index_at_.steep() + j] != 0, all, 0);
    });
  }

  void group(int64_t g) {
    const int64_t begin = p_.group_begin(g), end = p_.group_end(g), n = end - begin, d = p_.dim;
    T* sum = nullptr;
    if (p_.variant == Variant::kEvaluation) {
      sum = all_rows_.data() + begin * d;
    } else {
      sum = group_rows_.reserve_zeroed(n * d);
      if (rank_ != 0.0 && !rows_side()) {
        rank_gradient_of({&x_, nullptr, begin, n, false}, saved_dim_, int_[index_at_.steep()] != 0, sum, begin);
      } else if (rank_ != 0.0) {
        add_rows_side_rank(begin, n, sum);
      }
    }
    add_radii(g, sum, begin);
    finish_rows(g, sum);
  }

  // Fewer rows than features in all: the gradient's matrix is M x M, of which this group takes its rows.
  void add_rows_side_rank(int64_t begin, int64_t n, T* sum) {
    const int64_t rows = p_.rows(), d = p_.dim;
    if (rank_rows_.data() == nullptr) {
      T* all = rank_rows_.reserve_zeroed(rows * d);
      rank_gradient_of({&x_, nullptr, 0, rows, false}, saved_dim_, int_[index_at_.steep()] != 0, all, 0);
    }
    const T* own = rank_rows_.data() + begin * d;
    for (int64_t i = 0; i < n * d; ++i) sum[i] += own[i];
  }

  void add_radii(int64_t g, T* sum, int64_t first_row) {
    const int64_t d = p_.dim;
    const int64_t first_image = g * p_.group_images;
    const int64_t last_image = std::min(first_image + p_.group_images, p_.images);
    std::vector<ClusterGradientItem<T>> items;
    const auto collect = [&](const ClusterIndex& index, int64_t k, const T* slots, const int64_t* forms,
                             double weight) {
      for (int64_t c = 0; c < k; ++c) {
        const int64_t n = index.size(c);
        if (n < 2) continue;
        items.push_back({index.rows(c), n, slots + index.offset[static_cast<size_t>(c)] * d,
                         static_cast<SavedForm>(forms[c]), weight * radius_scale(p_.variant, n, d)});
      }
    };
    std::vector<ClusterGradientWorkspace<T>> workspaces(static_cast<size_t>(max_workers()));
    const auto run = [&] {
      int64_t work = 0;
      for (const auto& item : items) work += item.n * d * std::min(item.n, d);
      for_each_task(static_cast<int64_t>(items.size()), work, [&](int64_t task, int64_t worker) {
        add_cluster_gradient(x_, items[static_cast<size_t>(task)], first_row, sum,
                             workspaces[static_cast<size_t>(worker)]);
      });
      items.clear();
    };
    // Local clusters share no rows with each other, nor do global ones; the two kinds do.
    for (int64_t b = first_image; b < last_image; ++b) {
      const ClusterIndex& index = local_[static_cast<size_t>(b)];
      const int64_t terms = count_terms(index, p_.local_clusters, 2);
      if (terms == 0) continue;
      collect(index, p_.local_clusters, saved_local_ + b * p_.positions * d,
              int_ + index_at_.local_form() + b * p_.local_clusters, image_ / static_cast<double>(terms));
    }
    run();
    collect(global_[static_cast<size_t>(g)], p_.global_clusters, saved_global_ + first_row * d,
            int_ + index_at_.global_form() + g * p_.global_clusters, batch_);
    run();
  }

  // Distances, then the normalization: dz = (g - x <x, g>) / ||z||.
  void finish_rows(int64_t g, const T* sum) {
    const int64_t begin = p_.group_begin(g), end = p_.group_end(g), n = end - begin, d = p_.dim;
    const int64_t k = p_.global_clusters;
    const double* mean = real_ + rows_at_.mean();
    const double* mean_direction = real_ + rows_at_.mean_direction();
    const double spread = spread_ / static_cast<double>(p_.rows());
    const ClusterIndex& index = global_[static_cast<size_t>(g)];
    constexpr int64_t kRows = 32;
    Buffer<double> work(max_workers() * 2 * d);
    for_each_task((n + kRows - 1) / kRows, 32 * n * d, [&](int64_t task, int64_t worker) {
      double* x = work.data() + worker * 2 * d;
      double* grad = x + d;
      for (int64_t i = begin + task * kRows; i < std::min(end, begin + (task + 1) * kRows); ++i) {
        x_.load(i, x);
        const T* partial = sum + (i - begin) * d;
        for (int64_t f = 0; f < d; ++f) grad[f] = static_cast<double>(partial[f]);
        const int64_t nearest = int_[index_at_.nearest() + i];
        const double distance = real_[rows_at_.distance() + i];
        if (nearest >= 0 && distance > 0.0) {
          // d(dist)/dx = (x - c) / dist; d(dist^2)/dx = 2 (x - c).
          const double weight = p_.variant == Variant::kPaper
                                    ? 2.0 * inter_ / static_cast<double>(index.size(global_labels_[i]))
                                    : inter_ / (static_cast<double>(n) * distance);
          const T* centroid = centroids_ + (g * k + nearest) * d;
          for (int64_t f = 0; f < d; ++f) grad[f] += weight * (x[f] - static_cast<double>(centroid[f]));
        }
        if (spread != 0.0) {
          double square = 0.0;
          for (int64_t f = 0; f < d; ++f) square += (x[f] - mean[f]) * (x[f] - mean[f]);
          const double inverse = square > 0.0 ? spread / std::sqrt(square) : 0.0;
          for (int64_t f = 0; f < d; ++f) grad[f] += inverse * (x[f] - mean[f]) - spread * mean_direction[f];
        }
        if (p_.normalize) normalization_jacobian(real_[rows_at_.scale() + i], x, grad);
        store_run(x_.dtype, grad, d, out_row(i));
      }
    });
  }

  void normalization_jacobian(double scale, const double* x, double* grad) const {
    const int64_t d = p_.dim;
    // A row below the floor has no direction: it is a dead token, and gets no gradient (rather than 1e12 times
    // the upstream one, which no optimizer survives).
    if (scale >= 1.0 / kNormFloor) {
      std::fill(grad, grad + d, 0.0);
      return;
    }
    axpy(-dot(x, grad, d), x, grad, d);
    for (int64_t f = 0; f < d; ++f) grad[f] *= scale;
  }

  Problem p_;
  Upstream up_;
  Features x_;
  SavedRows rows_at_;
  SavedIndex index_at_;
  const int64_t* local_labels_;
  const int64_t* global_labels_;
  const T* centroids_;
  const T* saved_local_;
  const T* saved_global_;
  const double* saved_dim_;
  const double* real_;
  const int64_t* int_;
  std::array<int64_t, 3> shape_{p_.images, p_.positions, p_.dim};
  Tensor grad_;
  double inter_ = 0.0, image_ = 0.0, batch_ = 0.0, rank_ = 0.0, spread_ = 0.0;
  int64_t inter_terms_ = 0;
  std::vector<ClusterIndex> local_, global_;
  Buffer<T> group_rows_, all_rows_, rank_rows_;
};

double scalar_at(const Tensor& t, int64_t i) {
  double value = 0.0;
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  load_run(dtype_of(t, "grad_components"), data + i * t.stride(0) * static_cast<int64_t>(t.element_size()), 1, 1,
           1.0, &value);
  return value;
}

}  // namespace

Tensor dse_components_backward(const Tensor& grad_components, const Tensor& z, const Tensor& local_labels,
                               const Tensor& global_labels, const Tensor& global_centroids,
                               const Tensor& saved_local, const Tensor& saved_global, const Tensor& saved_dim,
                               const Tensor& saved_rows, const Tensor& saved_index, std::string variant,
                               int64_t local_clusters, int64_t group_images, bool normalize) {
  const Problem p = make_problem(z, variant, local_clusters, std::max<int64_t>(global_centroids.size(1), 1),
                                 group_images, normalize);
  require_cpu(grad_components, "grad_components");
  if (grad_components.numel() != 5)
    reject("grad_components must have 5 entries, got shape ", shape_of(grad_components), ".");
  if (saved_rows.numel() != SavedRows(p).size() || saved_index.numel() != SavedIndex(p).size()) {
    reject("saved_rows and saved_index do not belong to these features.");
  }
  const Upstream upstream{scalar_at(grad_components, 0), scalar_at(grad_components, 1),
                          scalar_at(grad_components, 2), scalar_at(grad_components, 3),
                          scalar_at(grad_components, 4)};
  const auto compute = [&](auto tag) {
    return Backward<decltype(tag)>(z, p, upstream, local_labels, global_labels, global_centroids, saved_local,
                                   saved_global, saved_dim, saved_rows, saved_index)
        .run();
  };
  return z.scalar_type() == ScalarType::Double ? compute(double{}) : compute(float{});
}

}  // namespace dse::cpu
