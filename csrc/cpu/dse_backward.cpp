// Gradient of dse_components in closed form (docs/definitions.md).
//
// Group by group, in the rows of the result or, where these are not as sums need them, in a workspace of a group:
// g = X F (effective rank), plus W_c X_c of every local and global cluster, plus the two distances' unit vectors;
// then the Jacobian of the normalization, and the row is written in the input's dtype. The evaluation variant's
// effective ranks run across all images, so they are summed into a buffer of all rows first.

#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/arguments.h"
#include "cpu/clusters.h"
#include "cpu/dense.h"
#include "cpu/dominant.h"
#include "cpu/dse_state.h"
#include "cpu/operators.h"
#include "cpu/products.h"
#include "cpu/short_products.h"
#include "cpu/stage.h"
#include "cpu/streamed_rank.h"
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

  // Rows of one task of X M: with M's panel they fit a core's cache.
  static constexpr int64_t kRankRows = 96;
  static constexpr int64_t kTurnedRows = 16;

  // The matrix of an effective rank's gradient as a right operand, kept while the groups are gone through.
  template <typename C>
  struct RankMatrix {
    const double* source = nullptr;
    PanelMatrix<C> right;
  };
  struct RankWorkspace {
    RankMatrix<float> narrow;
    RankMatrix<double> wide;
    ShortMatrix short_right;
    Buffer<float> short_size;  // of the features, and inverses of it
    const double* short_source = nullptr;
    DominantPart dominant;
    Buffer<double> rest;  // the matrix without it
    const double* rest_of = nullptr;
  };

  // The saved matrix stands on the side of the rows (M X) rather than of the features (X M): there are no more
  // rows than features in the matrix whose rank was measured, of which a group may be a part.
  bool rows_side() const { return (p_.variant == Variant::kEvaluation ? p_.images : p_.rows()) <= p_.dim; }

  // Adds rank_ * M X or rank_ * X M for the rows X of `set` to rows of `accumulator`.
  template <typename C>
  void rank_gradient(const RowSet& set, const double* saved, RankMatrix<C>& matrix, T* accumulator,
                     int64_t first_row) const {
    const int64_t d = p_.dim, n = set.n, side = dim_side(p_);
    const auto target = [&](int64_t i) { return accumulator + (set.index(i) - first_row) * padded(d); };
    if (rows_side()) {
      Buffer<C> left(side * side);
      for (int64_t i = 0; i < side * side; ++i) left[i] = static_cast<C>(saved[i]);
      Buffer<double> row(d);
      matrix.right.reserve(n, d);
      for (int64_t i = 0; i < n; ++i) {
        x_.load(set.index(i), row.data());
        matrix.right.set_row(i, row.data());
      }
      add_product(left.data(), n, n, matrix.right, target);
      return;
    }
    if (matrix.source != saved) {
      matrix.right.reserve(d, d);
      for (int64_t f = 0; f < d; ++f) matrix.right.set_row(f, saved + f * d);
      matrix.source = saved;
    }
    const int64_t tasks = (n + kRankRows - 1) / kRankRows;
    Buffer<C> work(max_workers() * kRankRows * d);
    Buffer<C> row_work(max_workers() * kTurnedRows * d);
    for_each_task(tasks, n * d * d, [&](int64_t task, int64_t worker) {
      C* turned = work.data() + worker * kRankRows * d;
      C* some = row_work.data() + worker * kTurnedRows * d;
      const int64_t begin = task * kRankRows, rows = std::min(n - begin, kRankRows);
      for (int64_t i0 = 0; i0 < rows; i0 += kTurnedRows) {  // a few rows at a time: whole cache lines are written
        const int64_t count = std::min(rows - i0, kTurnedRows);
        for (int64_t i = 0; i < count; ++i) x_.load(set.index(begin + i0 + i), some + i * d);
        for (int64_t f = 0; f < d; ++f)
          for (int64_t i = 0; i < count; ++i) turned[f * kRankRows + i0 + i] = some[i * d + f];
      }
      add_product(turned, kRankRows, rows, matrix.right, [&](int64_t i) { return target(begin + i); });
    });
  }

  // Sizes of the features, from some rows, and their inverses. Rows are divided by them, and the matrix
  // multiplied: large features would set the steps of the rows otherwise, and small ones those of the matrix.
  void feature_sizes(float* size) const {
    constexpr int64_t kRows = 256;
    const int64_t d = p_.dim, rows = p_.rows(), count = std::min(rows, kRows);
    std::vector<double> squares(static_cast<size_t>(d)), row(static_cast<size_t>(d));
    double total = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      x_.load(i * rows / count, row.data());
      for (size_t f = 0; f < row.size(); ++f) squares[f] += row[f] * row[f];
    }
    for (const double own : squares) total += own;
    const double least = 0.01 * total / static_cast<double>(d);
    for (int64_t f = 0; f < d; ++f) {
      const double square = std::max(squares[static_cast<size_t>(f)], least) / static_cast<double>(count);
      size[f] = square > 0.0 ? static_cast<float>(std::sqrt(square)) : 1.0f;
      size[d + f] = 1.0f / size[f];
    }
  }

  // The same, rank_ * X M, in 16-bit products, but for M's diagonal: it would set the steps of its columns.
  void short_rank_gradient(const RowSet& set, const double* saved, RankWorkspace& ws, float* accumulator,
                           int64_t first_row) const {
    const int64_t d = p_.dim, n = set.n;
    ShortMatrix& right = ws.short_right;
    Buffer<float> row_work(max_workers() * kShortPanel * d);
    const float* size = ws.short_size.data();
    if (ws.short_source != saved) {
      right.reserve(d, d, kShortPanel);
      feature_sizes(ws.short_size.reserve(2 * d));
      size = ws.short_size.data();
      for_each_task((d + kShortPanel - 1) / kShortPanel, 16 * d * d, [&](int64_t task, int64_t worker) {
        float* columns = row_work.data() + worker * kShortPanel * d;
        const int64_t first = task * kShortPanel, count = std::min(kShortPanel, d - first);
        for (int64_t i = 0; i < count; ++i) {
          float* own = columns + i * d;
          const double* column = saved + (first + i) * d;  // or row, of a symmetric matrix
          for (int64_t f = 0; f < d; ++f) own[f] = static_cast<float>(column[f]) * size[f];
          own[first + i] = 0.0f;
        }
        right.set_columns(first, count, columns, d);
        right.clear_columns(first + count, kShortPanel - count);
      });
      ws.short_source = saved;
    }
    Buffer<float> diagonal(d);
    for (int64_t f = 0; f < d; ++f) diagonal[f] = static_cast<float>(rank_ * saved[f * (d + 1)]);
    std::vector<ShortMatrix> lefts(static_cast<size_t>(max_workers()));
    for (ShortMatrix& left : lefts) left.reserve(d, kRankRows, kRankRows);
    for_each_task((n + kRankRows - 1) / kRankRows, n * d * d, [&](int64_t task, int64_t worker) {
      float* some = row_work.data() + worker * kShortPanel * d;
      ShortMatrix& left = lefts[static_cast<size_t>(worker)];
      const int64_t begin = task * kRankRows, rows = std::min(n - begin, kRankRows);
      std::array<float*, kRankRows> targets;
      for (int64_t i0 = 0; i0 < rows; i0 += kTurnedRows) {
        const int64_t count = std::min(rows - i0, kTurnedRows);
        for (int64_t i = 0; i < count; ++i) x_.load(set.index(begin + i0 + i), some + i * d);
        for (int64_t i = 0; i < count; ++i) {
          float* target = accumulator + (set.index(begin + i0 + i) - first_row) * padded(d);
          targets[static_cast<size_t>(i0 + i)] = target;
          add_products(1.0f, diagonal.data(), some + i * d, target, d);
          multiply(size + d, some + i * d, d);
        }
        left.set_columns(i0, count, some, d);
      }
      accumulate_product(left, rows, right, static_cast<float>(rank_), targets.data());
    });
  }

  // target(i) += rank_ * (A^T B)[i]. In float64 beside float32 accumulators the products are summed apart.
  template <typename C, typename Target>
  void add_product(const C* a, int64_t lda, int64_t m, const PanelMatrix<C>& b, const Target& target) const {
    const int64_t ld = b.width();
    std::vector<C*> rows(static_cast<size_t>(m));
    if constexpr (std::is_same_v<C, T>) {
      for (int64_t i = 0; i < m; ++i) rows[static_cast<size_t>(i)] = target(i);
      accumulate_product(a, lda, m, b, static_cast<C>(rank_), rows.data());
    } else {
      Buffer<C> product;
      product.reserve_zeroed(m * ld);
      for (int64_t i = 0; i < m; ++i) rows[static_cast<size_t>(i)] = product.data() + i * ld;
      accumulate_product(a, lda, m, b, static_cast<C>(rank_), rows.data());
      for (int64_t i = 0; i < m; ++i) {
        T* dst = target(i);
        for (int64_t f = 0; f < ld; ++f) dst[f] += static_cast<T>(product[i * ld + f]);
      }
    }
  }

  void rank_gradient_of(const RowSet& set, const double* saved, RankForm form, RankWorkspace& ws, T* accumulator,
                        int64_t first_row) const {
    DSE_STAGE("backward: rank");
    // A steep spectrum leaves small differences of large terms, which only float64 keeps; so do features (without
    // normalization) whose inverse squares leave the range of float32.
    const int64_t side = dim_side(p_);
    const bool in_range = fits_float32(saved, side);
    if (form.dominant > 0 && in_range && sizeof(T) == 4) {
      if (ws.rest_of != saved) {
        std::copy_n(saved, side * side, ws.rest.reserve(side * side));
        ws.dominant.take_out(ws.rest.data(), side, form.dominant);
        ws.rest_of = saved;
      }
      rank_gradient(set, ws.rest.data(), ws.narrow, accumulator, first_row);
      add_dominant(set, ws.dominant, accumulator, first_row);
    } else if (form.steep || !in_range || sizeof(T) == 8) {
      rank_gradient(set, saved, ws.wide, accumulator, first_row);
    } else if (form.short_products && !rows_side()) {
      if constexpr (sizeof(T) == 4) short_rank_gradient(set, saved, ws, accumulator, first_row);
    } else {
      rank_gradient(set, saved, ws.narrow, accumulator, first_row);
    }
  }

  // Adds rank_ * (the dominant part of M) x for the rows x of `set`.
  void add_dominant(const RowSet& set, const DominantPart& part, T* accumulator, int64_t first_row) const {
    const int64_t d = p_.dim;
    constexpr int64_t kRows = 32;
    const int64_t work_size = 2 * d + 2 * part.count;
    Buffer<double> work(max_workers() * work_size);
    for_each_task((set.n + kRows - 1) / kRows, 4 * set.n * d * part.count, [&](int64_t task, int64_t worker) {
      double* x = work.data() + worker * work_size;
      double* product = x + d;
      for (int64_t i = task * kRows; i < std::min(set.n, (task + 1) * kRows); ++i) {
        x_.load(set.index(i), x);
        part.multiply(x, product + d, product);
        T* target = accumulator + (set.index(i) - first_row) * padded(d);
        for (int64_t f = 0; f < d; ++f) target[f] += static_cast<T>(rank_ * product[f]);
      }
    });
  }

  void add_permuted_ranks() {
    const int64_t side = dim_side(p_);
    T* all = all_rows_.reserve_zeroed(p_.rows() * padded(p_.dim));
    if (rank_ == 0.0) return;
    std::vector<RankWorkspace> workspaces(static_cast<size_t>(max_workers()));
    // Every row stands at one position only: positions are independent.
    for_each_task(p_.positions, p_.rows() * p_.dim * side, [&](int64_t j, int64_t worker) {
      const RowSet set{&x_, int_ + index_at_.permutation() + j * p_.images, 0, p_.images, false};
      rank_gradient_of(set, saved_dim_ + j * side * side, RankForm::of(int_[index_at_.rank_form() + j]),
                       workspaces[static_cast<size_t>(worker)], all, 0);
    });
  }

  // Whether the result itself has room for the sums, which its rows are made of one by one.
  bool sums_in_place() const {
    return x_.element_size == static_cast<int64_t>(sizeof(T)) && padded(p_.dim) == p_.dim;
  }

  // By all threads: the pages may be new.
  void zero_rows(T* sum, int64_t n) const {
    DSE_STAGE("backward: distances, normalization");
    constexpr int64_t kRows = 128;
    const int64_t ld = padded(p_.dim);
    for_each_task((n + kRows - 1) / kRows, n * ld, [&](int64_t task, int64_t) {
      const int64_t begin = task * kRows;
      std::fill(sum + begin * ld, sum + std::min(n, begin + kRows) * ld, T(0));
    });
  }

  void group(int64_t g) {
    const int64_t begin = p_.group_begin(g), end = p_.group_end(g), n = end - begin, ld = padded(p_.dim);
    T* sum = nullptr;
    if (p_.variant == Variant::kEvaluation) {
      sum = all_rows_.data() + begin * ld;
    } else {
      sum = sums_in_place() ? reinterpret_cast<T*>(out_row(begin)) : group_rows_.reserve(n * ld);
      zero_rows(sum, n);
      if (rank_ != 0.0 && !rows_side()) {
        rank_gradient_of({&x_, nullptr, begin, n, false}, saved_dim_, RankForm::of(int_[index_at_.rank_form()]),
                         rank_work_, sum, begin);
      } else if (rank_ != 0.0) {
        add_rows_side_rank(begin, n, sum);
      }
    }
    add_radii(g, sum, begin);
    finish_rows(g, sum);
  }

  // Fewer rows than features in all: the gradient's matrix is M x M, of which this group takes its rows.
  void add_rows_side_rank(int64_t begin, int64_t n, T* sum) {
    const int64_t rows = p_.rows(), ld = padded(p_.dim);
    if (rank_rows_.data() == nullptr) {
      T* all = rank_rows_.reserve_zeroed(rows * ld);
      rank_gradient_of({&x_, nullptr, 0, rows, false}, saved_dim_, RankForm::of(int_[index_at_.rank_form()]),
                       rank_work_, all, 0);
    }
    const T* own = rank_rows_.data() + begin * ld;
    for (int64_t i = 0; i < n * ld; ++i) sum[i] += own[i];
  }

  void add_radii(int64_t g, T* sum, int64_t first_row) {
    DSE_STAGE("backward: clusters");
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
    DSE_STAGE("backward: distances, normalization");
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
        const T* partial = sum + (i - begin) * padded(d);
        const int64_t nearest = int_[index_at_.nearest() + i];
        const double distance = real_[rows_at_.distance() + i];
        const T* centroid = nullptr;
        double to_centroid = 0.0, to_mean = 0.0;
        if (nearest >= 0 && distance > 0.0) {
          // d(dist)/dx = (x - c) / dist; d(dist^2)/dx = 2 (x - c).
          to_centroid = p_.variant == Variant::kPaper
                            ? 2.0 * inter_ / static_cast<double>(index.size(global_labels_[i]))
                            : inter_ / (static_cast<double>(n) * distance);
          centroid = centroids_ + (g * k + nearest) * d;
        }
        if (spread != 0.0) {
          const double square = squared_distance(x, mean, d);
          to_mean = square > 0.0 ? spread / std::sqrt(square) : 0.0;
        }
        add_distances(partial, x, to_centroid, centroid, to_mean, spread != 0.0 ? mean : nullptr, spread,
                      mean_direction, grad, d);
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
    axpy_scale(-dot(x, grad, d), x, scale, grad, d);
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
  RankWorkspace rank_work_;
  Buffer<T> group_rows_, all_rows_, rank_rows_;  // rows of padded(d) elements
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
