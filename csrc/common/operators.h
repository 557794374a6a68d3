// The kernels that every backend has for the operators of common/schemas.h: their declarations, which the macro
// puts into the backend's namespace, and their registration.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#define DSE_DECLARE_OPERATORS                                                                                    \
  using torch::stable::Tensor;                                                                                   \
                                                                                                                 \
  using DseOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,  \
                                Tensor, Tensor, Tensor>;                                                         \
                                                                                                                 \
  DseOutputs dse_components(const Tensor& z, const Tensor& seed, std::string variant, int64_t local_clusters,    \
                            int64_t global_clusters, std::optional<int64_t> group_images, bool normalize,        \
                            int64_t max_kmeans_iters, double tol, std::optional<Tensor> local_labels,            \
                            std::optional<Tensor> global_labels, std::optional<Tensor> global_centroids,         \
                            bool save_for_backward);                                                             \
                                                                                                                 \
  Tensor dse_components_backward(const Tensor& grad_components, const Tensor& z, const Tensor& local_labels,     \
                                 const Tensor& global_labels, const Tensor& global_centroids,                    \
                                 const Tensor& saved_local, const Tensor& saved_global, const Tensor& saved_dim, \
                                 const Tensor& saved_rows, const Tensor& saved_index, std::string variant,       \
                                 int64_t local_clusters, int64_t group_images, bool normalize);                  \
                                                                                                                 \
  std::tuple<Tensor, Tensor, Tensor> kmeans_op(const Tensor& x, int64_t k, const Tensor& seed,                   \
                                               int64_t max_iters, double tol);                                   \
                                                                                                                 \
  std::tuple<Tensor, Tensor, Tensor> cluster_nuclear_norms(const Tensor& x, const Tensor& labels, int64_t k,     \
                                                           bool save_for_backward);                              \
  Tensor cluster_nuclear_norms_backward(const Tensor& grad, const Tensor& x, const Tensor& labels,               \
                                        const Tensor& saved, const Tensor& saved_form);                          \
                                                                                                                 \
  std::tuple<Tensor, Tensor, Tensor> effective_rank(const Tensor& x, bool center, bool save_for_backward);       \
  Tensor effective_rank_backward(const Tensor& grad, const Tensor& x, const Tensor& saved,                       \
                                 const Tensor& saved_form, bool center);

// Registers the kernels of namespace dse::backend; `library` as in STABLE_TORCH_LIBRARY_IMPL.
#define DSE_REGISTER_OPERATORS(library, backend)                                                            \
  library.impl("dse_components", TORCH_BOX(&dse::backend::dse_components));                                 \
  library.impl("dse_components_backward", TORCH_BOX(&dse::backend::dse_components_backward));               \
  library.impl("kmeans", TORCH_BOX(&dse::backend::kmeans_op));                                              \
  library.impl("cluster_nuclear_norms", TORCH_BOX(&dse::backend::cluster_nuclear_norms));                   \
  library.impl("cluster_nuclear_norms_backward", TORCH_BOX(&dse::backend::cluster_nuclear_norms_backward)); \
  library.impl("effective_rank", TORCH_BOX(&dse::backend::effective_rank));                                 \
  library.impl("effective_rank_backward", TORCH_BOX(&dse::backend::effective_rank_backward))
