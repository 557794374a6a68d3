// torch.ops.dse_ext.effective_rank on the CPU. Leading axes are flattened to one: (P, n, d).

#include <array>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/arguments.h"
#include "cpu/aten.h"
#include "cpu/dense.h"
#include "cpu/operators.h"
#include "cpu/row_statistics.h"
#include "cpu/streamed_rank.h"

namespace dse::cpu {
namespace {

using torch::headeronly::ScalarType;

// What saved_form says of a matrix.
enum class SavedRank : int64_t { kPlain = 0, kSteep = 1, kNotFinite = 2 };

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, bool center, bool save) {
  const ScalarType real = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Features features = Features::of(x, "x");
  const int64_t count = features.outer, n = features.inner, side = std::min(n, features.dim);
  const int64_t kept = save ? count : 0;
  const std::array<int64_t, 3> saved_shape{kept, side, side};
  Tensor ranks = torch::stable::new_empty(x, {&count, 1}, real);
  Tensor saved = torch::stable::new_empty(x, {saved_shape.data(), 3}, ScalarType::Double);
  Tensor form = torch::stable::new_empty(x, {&kept, 1}, ScalarType::Long);
  auto* rank_data = static_cast<T*>(ranks.mutable_data_ptr());
  auto* matrices = save ? static_cast<double*>(saved.mutable_data_ptr()) : nullptr;
  auto* forms = save ? static_cast<int64_t*>(form.mutable_data_ptr()) : nullptr;
  std::vector<StreamedRank> workers(static_cast<size_t>(max_workers()));
  const int64_t work = count * n * features.dim * side;
  for_each_problem(count, work, [&](int64_t p, int64_t worker) {
    if (!group_is_finite(features, p)) {
      rank_data[p] = std::numeric_limits<T>::quiet_NaN();
      if (save) {
        forms[p] = static_cast<int64_t>(SavedRank::kNotFinite);
        std::fill_n(matrices + p * side * side, side * side, 0.0);
      }
      return;
    }
    RankForm rank_form;
    rank_data[p] = static_cast<T>(
        workers[static_cast<size_t>(worker)].run({&features, nullptr, p * n, n, center}, sizeof(T) == 8,
                                                 save ? matrices + p * side * side : nullptr, &rank_form));
    if (save) forms[p] = static_cast<int64_t>(rank_form.steep ? SavedRank::kSteep : SavedRank::kPlain);
  });
  return {ranks, saved, form};
}

// out = weight * M (H X) for n <= d, else weight * (H X) M.
template <typename C>
void product(const Features& x, int64_t p, bool center, const double* saved, double weight, char* out) {
  const int64_t n = x.inner, d = x.dim, side = std::min(n, d);
  Buffer<double> rows(n * d);
  gather_rows({&x, nullptr, p * n, n, center}, rows.data(), d);
  Buffer<C> left(n * d), result(n * d), matrix(side * side);
  for (int64_t i = 0; i < n * d; ++i) left[i] = static_cast<C>(rows[i]);
  for (int64_t i = 0; i < side * side; ++i) matrix[i] = static_cast<C>(saved[i]);
  if (n <= d) {
    matmul(result.data(), {matrix.data(), n, n, n, 1}, {left.data(), n, d, d, 1}, result.data(), d);
  } else {
    matmul(result.data(), {left.data(), n, d, d, 1}, {matrix.data(), d, d, d, 1}, result.data(), d);
  }
  for (int64_t i = 0; i < n * d; ++i) rows[i] = static_cast<double>(result[i]) * weight;
  store_run(x.dtype, rows.data(), n * d, out);
}

template <typename T>
Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& saved, const Tensor& saved_form, bool center) {
  const Features features = Features::of(x, "x");
  const int64_t count = features.outer, n = features.inner, d = features.dim, side = std::min(n, d);
  const std::array<int64_t, 3> shape{count, n, d};
  Tensor out = torch::stable::new_empty(x, {shape.data(), 3});
  auto* out_data = static_cast<char*>(out.mutable_data_ptr());
  const auto* matrices = static_cast<const double*>(saved.const_data_ptr());
  const auto* forms = static_cast<const int64_t*>(saved_form.const_data_ptr());
  const DType grad_type = dtype_of(grad, "grad");
  const auto* grad_data = static_cast<const char*>(grad.const_data_ptr());
  for (int64_t p = 0; p < count; ++p) {
    char* own = out_data + p * n * d * features.element_size;
    const auto form = static_cast<SavedRank>(forms[p]);
    if (form == SavedRank::kNotFinite) {
      const std::vector<double> nan(static_cast<size_t>(n * d), std::numeric_limits<double>::quiet_NaN());
      store_run(features.dtype, nan.data(), n * d, own);
      continue;
    }
    double weight = 0.0;
    load_run(grad_type, grad_data + p * grad.stride(0) * static_cast<int64_t>(grad.element_size()), 1, 1, 1.0,
             &weight);
    if (sizeof(T) == 8 || form == SavedRank::kSteep || !fits_float32(matrices + p * side * side, side)) {
      product<double>(features, p, center, matrices + p * side * side, weight, own);
    } else {
      product<float>(features, p, center, matrices + p * side * side, weight, own);
    }
  }
  return out;
}

Tensor as_matrices(const Tensor& x) {
  require_cpu(x, "x");
  dtype_of(x, "x");
  return flatten_matrices(x);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> effective_rank(const Tensor& x, bool center, bool save_for_backward) {
  const Tensor matrices = as_matrices(x);
  auto [ranks, saved, form] = x.scalar_type() == ScalarType::Double
                                  ? forward<double>(matrices, center, save_for_backward)
                                  : forward<float>(matrices, center, save_for_backward);
  const std::vector<int64_t> leading = leading_shape(x, x.dim() - 2);
  return {torch::stable::view(ranks, {leading.data(), leading.size()}), saved, form};
}

Tensor effective_rank_backward(const Tensor& grad, const Tensor& x, const Tensor& saved, const Tensor& saved_form,
                               bool center) {
  const Tensor matrices = as_matrices(x);
  require_cpu(grad, "grad");
  const int64_t count = matrices.size(0), side = std::min(matrices.size(1), matrices.size(2));
  if (grad.numel() != count)
    reject("grad must have one entry a matrix (", count, "), got shape ", shape_of(grad), ".");
  if (saved.numel() != count * side * side || saved_form.numel() != count) {
    reject("saved and saved_form do not belong to these features.");
  }
  const Tensor flat = torch::stable::reshape(grad, {&count, 1});
  const Tensor out = x.scalar_type() == ScalarType::Double
                         ? backward<double>(flat, matrices, saved, saved_form, center)
                         : backward<float>(flat, matrices, saved, saved_form, center);
  const std::vector<int64_t> shape = leading_shape(x, x.dim());
  return torch::stable::view(out, {shape.data(), shape.size()});
}

}  // namespace dse::cpu
