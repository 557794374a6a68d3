// torch.ops.dse_ext.cluster_nuclear_norms on the CPU.

#include <array>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/clusters.h"
#include "cpu/lazy_zeros.h"
#include "cpu/operators.h"
#include "cpu/row_statistics.h"
#include "cpu/validate.h"

namespace dse::cpu {
namespace {

using torch::headeronly::ScalarType;

std::vector<ClusterIndex> index_groups(const Tensor& labels, int64_t k) {
  const int64_t groups = labels.size(0), n = labels.size(1), s0 = labels.stride(0), s1 = labels.stride(1);
  const auto* data = static_cast<const int64_t*>(labels.const_data_ptr());
  std::vector<ClusterIndex> index(static_cast<size_t>(groups));
  std::vector<int64_t> own(static_cast<size_t>(n));
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < n; ++i) own[static_cast<size_t>(i)] = data[g * s0 + i * s1];
    index[static_cast<size_t>(g)].build(own.data(), n, k, g * n);
  }
  return index;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& labels, int64_t k, bool save) {
  const ScalarType real = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Features features = Features::of(x, "x");
  const int64_t groups = features.outer, n = features.inner, d = features.dim, kept = save ? groups : 0;
  const std::array<int64_t, 2> shape{groups, k};
  const std::array<int64_t, 2> form_shape{kept, k};
  Tensor norms = torch::stable::new_empty(x, {shape.data(), 2}, real);
  Tensor saved = lazy_zeros({kept, n, d}, real);
  Tensor form = torch::stable::new_empty(x, {form_shape.data(), 2}, ScalarType::Long);
  auto* norm_data = static_cast<T*>(norms.mutable_data_ptr());
  auto* form_data = static_cast<int64_t*>(form.mutable_data_ptr());

  const std::vector<ClusterIndex> index = index_groups(labels, k);
  std::vector<double> values(static_cast<size_t>(groups * k), std::numeric_limits<double>::quiet_NaN());
  std::vector<ClusterItem<T>> items;
  std::vector<double> scale(static_cast<size_t>(groups * n));
  const bool all_finite = row_scales(features, false, scale.data());
  for (int64_t g = 0; g < groups; ++g) {
    int64_t* forms = save ? form_data + g * k : nullptr;
    if (!all_finite && !group_is_finite(features, g)) {
      // -1 marks a group whose gradient is NaN.
      if (save) std::fill_n(forms, k, int64_t{-1});
      continue;
    }
    append_clusters<T>(index[static_cast<size_t>(g)], k, d,
                       save ? static_cast<T*>(saved.mutable_data_ptr()) + g * n * d : nullptr,
                       values.data() + g * k, forms, items);
  }
  nuclear_norms(features, items);
  for (int64_t i = 0; i < groups * k; ++i) norm_data[i] = static_cast<T>(values[static_cast<size_t>(i)]);
  return {norms, saved, form};
}

template <typename T>
Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& labels, const Tensor& saved,
                const Tensor& saved_form) {
  const Features features = Features::of(x, "x");
  const int64_t groups = features.outer, n = features.inner, d = features.dim, k = grad.size(1);
  const std::array<int64_t, 3> shape{groups, n, d};
  Tensor out = torch::stable::new_empty(x, {shape.data(), 3});
  auto* out_data = static_cast<char*>(out.mutable_data_ptr());
  const std::vector<ClusterIndex> index = index_groups(labels, k);
  const auto* slots = static_cast<const T*>(saved.const_data_ptr());
  const auto* forms = static_cast<const int64_t*>(saved_form.const_data_ptr());
  const auto* grad_data = static_cast<const char*>(grad.const_data_ptr());
  const DType grad_type = dtype_of(grad, "grad");
  const auto grad_bytes = static_cast<int64_t>(grad.element_size());
  std::vector<ClusterGradientWorkspace<T>> workspaces(static_cast<size_t>(max_workers()));
  Buffer<T> sum;
  Buffer<double> row(d);
  for (int64_t g = 0; g < groups; ++g) {
    const ClusterIndex& own = index[static_cast<size_t>(g)];
    T* rows = sum.reserve_zeroed(n * padded(d));
    if (forms[g * k] < 0) {
      std::fill_n(rows, n * padded(d), std::numeric_limits<T>::quiet_NaN());
    } else {
      for_each_task(k, n * n * d / k, [&](int64_t c, int64_t worker) {
        double weight = 0.0;
        load_run(grad_type, grad_data + grad_bytes * (g * grad.stride(0) + c * grad.stride(1)), 1, 1, 1.0,
                 &weight);
        add_cluster_gradient<T>(
            features,
            {own.rows(c), own.size(c), slots + (g * n + own.offset[static_cast<size_t>(c)]) * d,
             static_cast<SavedForm>(forms[g * k + c]), weight},
            g * n, rows, workspaces[static_cast<size_t>(worker)]);
      });
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t f = 0; f < d; ++f) row[f] = static_cast<double>(rows[i * padded(d) + f]);
      store_run(features.dtype, row.data(), d, out_data + (g * n + i) * d * features.element_size);
    }
  }
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cluster_nuclear_norms(const Tensor& x, const Tensor& labels, int64_t k,
                                                         bool save_for_backward) {
  require_features(x, "x", "(G, n, d)");
  require_at_least(k, 1, "k");
  dtype_of(x, "x");
  require_labels(labels, x.size(0), x.size(1), k, "labels");
  if (x.scalar_type() == ScalarType::Double) return forward<double>(x, labels, k, save_for_backward);
  return forward<float>(x, labels, k, save_for_backward);
}

Tensor cluster_nuclear_norms_backward(const Tensor& grad, const Tensor& x, const Tensor& labels,
                                      const Tensor& saved, const Tensor& saved_form) {
  require_features(x, "x", "(G, n, d)");
  require_cpu(grad, "grad");
  if (grad.dim() != 2 || grad.size(0) != x.size(0))
    reject("grad must have shape (G, k), got ", shape_of(grad), ".");
  require_labels(labels, x.size(0), x.size(1), grad.size(1), "labels");
  if (saved.numel() != x.numel() || saved_form.numel() != grad.numel()) {
    reject("saved and saved_form do not belong to these features.");
  }
  if (x.scalar_type() == ScalarType::Double) return backward<double>(grad, x, labels, saved, saved_form);
  return backward<float>(grad, x, labels, saved, saved_form);
}

}  // namespace dse::cpu
