// Instantiates every kernel for every dtype, for the compiler's resource report (test_resources.py).
#include "cuda/backward.cuh"
#include "cuda/image_kernel.cuh"
#include "cuda/kmeans.cuh"
#include "cuda/matrices.cuh"
#include "cuda/matrix_functions.cuh"
#include "cuda/row_statistics.cuh"

namespace dse::cuda {

#define DSE_FOR(S, C)                                                                                       \
  template void run_image_kernel<S>(const ImageArguments<S>&, const ImagePlan&, cudaStream_t);              \
  template void run_kmeans<S>(const KMeansArgs<S>&, void*, cudaStream_t);                                   \
  template void run_row_scales<S>(const FeatureView<S>&, bool, double*, int*, int64_t, cudaStream_t);       \
  template void run_average_norm<S>(const FeatureView<S>&, double*, double*, double*, void*, cudaStream_t); \
  template void run_nearest_centroid<S, C>(const FeatureView<S>&, const NearestArgs<C>&, cudaStream_t);     \
  template void run_cluster_norms<S>(const ClusterNormArgs<S>&, void*, cudaStream_t);                       \
  template void run_cluster_gradient<S>(const ClusterGradientArgs<S>&, void*, cudaStream_t);                \
  template void run_finish_rows<S, C>(const FinishArgs<S, C>&, cudaStream_t);                               \
  template void run_store_rows<S>(const double*, int64_t, int64_t, int64_t, const int64_t*, int64_t, S*,    \
                                  cudaStream_t);                                                            \
  template void run_second_moment<S>(const FeatureView<S>&, int64_t, int64_t, const double*, int, void*,    \
                                     double*, cudaStream_t);                                                \
  template void run_gather_rows<S>(const FeatureView<S>&, const int64_t*, int64_t, int64_t, const double*,  \
                                   int64_t, double*, cudaStream_t);

DSE_FOR(double, double)
DSE_FOR(float, float)
DSE_FOR(__nv_bfloat16, float)
DSE_FOR(__half, float)

template void run_components<float>(const ComponentArgs&, const ComponentOutputs<float>&, cudaStream_t);
template void run_components<double>(const ComponentArgs&, const ComponentOutputs<double>&, cudaStream_t);
template void run_gradient_weights<float>(const GradientWeightArgs<float>&, cudaStream_t);
template void run_gradient_weights<double>(const GradientWeightArgs<double>&, cudaStream_t);

// Not templates: a use is what makes the compiler emit them.
void use(const Clusters& clusters, const double* matrix, void* workspace, double* value, cudaStream_t stream) {
  run_cluster_index(clusters, stream);
  GramRanks ranks;
  run_small_ranks(ranks, 1, stream);
  run_prepare_eigen(ranks, 1, value, nullptr, stream);
  run_eigen_ranks(ranks, 1, value, nullptr, stream);
  run_scale_columns(matrix, matrix, 1, 1, value, stream);
  run_permute_positions(clusters.labels, 1, 1, clusters.order, stream);
  run_effective_rank(matrix, 8, workspace, 8, value, value, stream);
}

}  // namespace dse::cuda
