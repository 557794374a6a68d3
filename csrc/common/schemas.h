// Every operator's schema. Kernels are registered per backend (cpu/registration.cpp, cuda/registration.cu);
// fake kernels and autograd formulas live in Python (dse_ext/ops.py).
//
// `seed` is an int64 tensor of one element on the input's device, so that a captured CUDA graph can be
// replayed with fresh randomness. Without labels the numbers of clusters are capped by the numbers of rows; given
// centroids bring their own k. `save_for_backward=False` leaves the saved_* outputs empty; a backward pass
// then recomputes them.
#pragma once

#include <torch/csrc/stable/library.h>

namespace dse {

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "dse_components(Tensor z, Tensor seed, str variant=\"regularizer\", int local_clusters=3, "
      "int global_clusters=24, int? group_images=None, bool normalize=True, int max_kmeans_iters=20, "
      "float tol=0.0001, Tensor? local_labels=None, Tensor? global_labels=None, "
      "Tensor? global_centroids=None, bool save_for_backward=True) -> "
      "(Tensor m_inter, Tensor m_intra_image, Tensor m_intra_batch, Tensor m_dim, Tensor avg_norm, "
      "Tensor local_labels, Tensor global_labels, Tensor global_centroids, "
      "Tensor saved_local, Tensor saved_global, Tensor saved_dim, Tensor saved_rows, Tensor saved_index)");
  m.def(
      "dse_components_backward(Tensor grad_components, Tensor z, Tensor local_labels, Tensor global_labels, "
      "Tensor global_centroids, Tensor saved_local, Tensor saved_global, Tensor saved_dim, "
      "Tensor saved_rows, Tensor saved_index, str variant, int local_clusters, int group_images, "
      "bool normalize) -> Tensor");
  m.def(
      "kmeans(Tensor x, int k, Tensor seed, int max_iters=20, float tol=0.0001) -> "
      "(Tensor centroids, Tensor labels, Tensor inertia)");
  m.def(
      "cluster_nuclear_norms(Tensor x, Tensor labels, int k, bool save_for_backward=True) -> "
      "(Tensor norms, Tensor saved, Tensor saved_form)");
  m.def(
      "cluster_nuclear_norms_backward(Tensor grad, Tensor x, Tensor labels, Tensor saved, "
      "Tensor saved_form) -> Tensor");
  m.def(
      "effective_rank(Tensor x, bool center=False, bool save_for_backward=True) -> "
      "(Tensor erank, Tensor saved, Tensor saved_form)");
  m.def(
      "effective_rank_backward(Tensor grad, Tensor x, Tensor saved, Tensor saved_form, bool center) -> "
      "Tensor");
}

}  // namespace dse
