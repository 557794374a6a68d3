// Gradient of the components (docs/definitions.md): products with the clusters' matrices, then one pass that adds
// the rest and writes each row once.
//
// A float64 accumulator holds the rows of some groups (the host chooses how many: 8 d bytes a row); it arrives
// holding the effective rank's share X F, or zeros. Every cluster adds weight * W_c H X_c (H X_c W_c where W_c
// stands on the side of the features): tiles of 32 rows x 64 features, float64 tensor cores, centred rows formed
// as they are read. The clusters of one launch share no rows, so a tile adds to the accumulator without atomics.
// The last kernel has a warp a row: distance, avg_norm, then the Jacobian of the normalization
// (g - x <x, g>) / ||z||, whose inner product is summed from the parts in the same look at the row.
//
// Upstream gradients are numbers in device memory: weights are worked out there.
//
// Cost at (256, 196, 1024) bfloat16 with 65 rows a cluster: 2 * 50 k * 65 * 1024 multiply-adds for local and for
// global clusters each, 13 Gflop or 0.2 ms at 67 TFLOP/s, and 0.8 GB of accumulator each (0.19 ms at 4.3 TB/s);
// the last pass reads the accumulator and the features and writes the gradient, 0.6 GB (0.14 ms).
#pragma once

#include "common/problem.h"
#include "cuda/clusters.cuh"
#include "cuda/row_statistics.cuh"

namespace dse::cuda {

// What the terms of the components weigh in the sum, in an array in device memory.
enum GradientWeight : int {
  kInterWeight = 0,   // a term of m_inter
  kImageWeight = 1,   // an image of m_intra_image
  kBatchWeight = 2,   // a cluster of m_intra_batch
  kRankWeight = 3,    // an effective rank
  kSpreadWeight = 4,  // a row of avg_norm
  kGradientWeights = 5
};

template <class G>
struct GradientWeightArgs {
  const G* upstream = nullptr;  // 5 numbers, `stride` apart, in the order of the components
  int64_t stride = 1;
  const double* components = nullptr;  // the 5 components of the forward pass
  Variant variant = Variant::kRegularizer;
  int64_t rows = 0, dim = 0, images = 0, local_clusters = 0;
  int64_t groups = 0, group_rows = 0, global_clusters = 0;
  double rank_divisor = 1.0;              // as in ComponentArgs
  const int64_t* local_sizes = nullptr;   // images x local_clusters
  const int64_t* global_sizes = nullptr;  // groups x global_clusters
  const int64_t* nearest = nullptr;       // rows
  double* weights = nullptr;              // out: kGradientWeights
  double* local_weights = nullptr;        // out: of a local cluster's nuclear norm
  double* global_weights = nullptr;       // out: of a global cluster's
};

// Clusters of at least `least` rows.
__device__ __forceinline__ int64_t count_clusters(const int64_t* sizes, int64_t k, int64_t least) {
  int64_t terms = 0;
  for (int64_t c = 0; c < k; ++c) terms += sizes[c] >= least ? 1 : 0;
  return terms;
}

template <class G>
__global__ __launch_bounds__(kRowThreads) void gradient_weights_kernel(GradientWeightArgs<G> p) {
  __shared__ double scratch[33];
  double images = 0.0, clusters = 0.0, terms = 0.0;
  for (int64_t b = thread_id(); b < p.images; b += kRowThreads) {
    images += count_clusters(p.local_sizes + b * p.local_clusters, p.local_clusters, 2) > 0 ? 1.0 : 0.0;
  }
  for (int64_t g = thread_id(); g < p.groups; g += kRowThreads) {
    const int64_t* sizes = p.global_sizes + g * p.global_clusters;
    clusters += static_cast<double>(count_clusters(sizes, p.global_clusters, 2));
    if (p.nearest[g * p.group_rows] < 0) continue;
    terms +=
        p.variant == Variant::kPaper ? static_cast<double>(count_clusters(sizes, p.global_clusters, 1)) : 1.0;
  }
  images = block_sum(images, scratch);
  clusters = block_sum(clusters, scratch);
  terms = block_sum(terms, scratch);
  if (thread_id() != 0) return;
  double up[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) up[i] = static_cast<double>(p.upstream[i * p.stride]);
  const double average = p.components[4];
  double inter = up[0], image = up[1], batch = up[2], spread = up[4];
  if (divides_by_avg_norm(p.variant)) {
    const double inverse = average > 0.0 ? 1.0 / average : 0.0;
    spread -= (up[0] * p.components[0] + up[1] * p.components[1] + up[2] * p.components[2]) * inverse;
    inter *= inverse;
    image *= inverse;
    batch *= inverse;
  }
  if (average == 0.0) spread = 0.0;
  p.weights[kInterWeight] = terms > 0.0 ? inter / terms : inter;
  p.weights[kImageWeight] = images > 0.0 ? image / images : image;
  p.weights[kBatchWeight] = clusters > 0.0 ? batch / clusters : batch;
  p.weights[kRankWeight] = up[3] / p.rank_divisor;
  p.weights[kSpreadWeight] = spread / static_cast<double>(p.rows);
}

template <class G>
__global__ __launch_bounds__(kRowThreads) void cluster_weights_kernel(GradientWeightArgs<G> p) {
  const int64_t local = p.images * p.local_clusters, global = p.groups * p.global_clusters;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + thread_id();
  if (i < local) {
    const int64_t n = p.local_sizes[i];
    const int64_t terms =
        count_clusters(p.local_sizes + i / p.local_clusters * p.local_clusters, p.local_clusters, 2);
    p.local_weights[i] =
        n < 2 ? 0.0 : p.weights[kImageWeight] / static_cast<double>(terms) * radius_scale(p.variant, n, p.dim);
  } else if (i < local + global) {
    const int64_t n = p.global_sizes[i - local];
    p.global_weights[i - local] = n < 2 ? 0.0 : p.weights[kBatchWeight] * radius_scale(p.variant, n, p.dim);
  }
}

template <class G>
void run_gradient_weights(const GradientWeightArgs<G>& p, cudaStream_t stream) {
  launch(DSE_KERNEL(gradient_weights_kernel<G>), {dim3(1), kRowThreads, 0, stream}, p);
  const int64_t clusters = p.images * p.local_clusters + p.groups * p.global_clusters;
  launch(DSE_KERNEL(cluster_weights_kernel<G>),
         {grid_of(ceil_div(clusters, kRowThreads)), kRowThreads, 0, stream}, p);
}

// weight[g * k + c] = grad[g][c].
template <class G>
__global__ __launch_bounds__(kRowThreads) void read_weights_kernel(const G* grad, int64_t count, int64_t k,
                                                                   int64_t stride_group, int64_t stride_cluster,
                                                                   double* weight) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + thread_id();
  if (i < count) weight[i] = to_double(grad[i / k * stride_group + i % k * stride_cluster]);
}

// Upstream gradients of nuclear norms (groups x k, any strides) as the weights of run_cluster_gradient.
template <class G>
void run_read_weights(const G* grad, int64_t groups, int64_t k, int64_t stride_group, int64_t stride_cluster,
                      double* weight, cudaStream_t stream) {
  launch(DSE_KERNEL(read_weights_kernel<G>), {grid_of(ceil_div(groups * k, kRowThreads)), kRowThreads, 0, stream},
         grad, groups * k, k, stride_group, stride_cluster, weight);
}

inline constexpr int kProductThreads = 128;
inline constexpr int kProductDepth = 32;
inline constexpr int kLeftPitch = kProductDepth + 4;
inline constexpr int kRightPitch = kProductFeatures + 8;

struct ProductTile {
  double left[kProductRows * kLeftPitch];
  double right[kProductDepth * kRightPitch];
};

// Row `at` of a cluster, for the lanes of a warp: lane l finds out about row first + l % 8.
template <class S>
struct OctetRows {
  int64_t offset;
  double scale;

  __device__ __forceinline__ OctetRows(const FeatureView<S>& x, const int64_t* order, int64_t first, int64_t n) {
    const int64_t i = first + lane_id() % 8;
    offset = i < n ? row_offset(x, order[i]) : -1;
    scale = i < n ? x.scale(order[i]) : 0.0;
  }
  // Feature f of row r of the eight, centred; 0 outside of the cluster. All lanes of the warp call it.
  __device__ __forceinline__ double centred(const FeatureView<S>& x, int r, int64_t f, double mean) const {
    const int64_t from = shuffle_idx(offset, r);
    const double factor = shuffle_idx(scale, r);
    return from >= 0 && f < x.dim ? __dmul_rn(to_double(x.data[from + f * x.stride_dim]), factor) - mean : 0.0;
  }
};

template <class S>
__global__ __launch_bounds__(kProductThreads, 4 - 2 * kFewerBlocks) void cluster_gradient_kernel(
    FeatureView<S> x, Clusters p, WorkList list, const double* means, ClusterSlots slots, const double* weights,
    double* accumulator) {
  __shared__ ProductTile shared;
  constexpr int kOwn = 8;
  const int lane = lane_id(), warp = warp_id();
  const int64_t items = p.items(), total = list.product_tiles[items], d = x.dim;
  const int64_t across = ceil_div(d, kProductFeatures), first_row = p.first(p.group_begin);
  for (int64_t tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const int64_t at = find_interval(list.product_tiles, items, tile), item = list.item[at];
    const ClusterRef own(p, item);
    const double weight = weights[own.g * p.k + own.c];
    if (weight == 0.0) continue;
    const int64_t n = own.n;
    const bool rows_side = slots.rows_side || n <= d;
    const int64_t depth = rows_side ? n : d;
    const int64_t i0 = (tile - list.product_tiles[at]) / across * kProductRows;
    const int64_t f0 = (tile - list.product_tiles[at]) % across * kProductFeatures;
    const int64_t* order = p.order + own.begin;
    const double* mean = means + item * d;
    const double* matrix = slots.at(p, own);
    const double mean0 = f0 + lane < d ? mean[f0 + lane] : 0.0;
    const double mean1 = f0 + kWarp + lane < d ? mean[f0 + kWarp + lane] : 0.0;
    const OctetRows<S> tile_rows(x, order, i0 + warp * kOwn, n);
    const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 32;
    double acc[2][4][2] = {};
    for (int64_t k0 = 0; k0 < depth; k0 += kProductDepth) {
      const int64_t k = k0 + lane;
      if (rows_side) {
        const OctetRows<S> rows(x, order, k0 + warp * kOwn, n);
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const int e = warp * kOwn + r;
          const int64_t i = i0 + e;
          shared.left[e * kLeftPitch + lane] = i < n && k < n ? matrix[i * n + k] : 0.0;
          shared.right[e * kRightPitch + lane] = rows.centred(x, r, f0 + lane, mean0);
          shared.right[e * kRightPitch + kWarp + lane] = rows.centred(x, r, f0 + kWarp + lane, mean1);
        }
      } else {
        const double mean_k = k < d ? mean[k] : 0.0;
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const int e = warp * kOwn + r;
          const int64_t f = f0 + lane;
          shared.left[e * kLeftPitch + lane] = tile_rows.centred(x, r, k, mean_k);
          const double* source = matrix + (k0 + e) * d;
          shared.right[e * kRightPitch + lane] = k0 + e < d && f < d ? source[f] : 0.0;
          shared.right[e * kRightPitch + kWarp + lane] = k0 + e < d && f + kWarp < d ? source[f + kWarp] : 0.0;
        }
      }
      block_sync();
      const double* a = shared.left + (warp_row + lane / 4) * kLeftPitch + lane % 4;
      const double* b = shared.right + lane % 4 * kRightPitch + warp_column + lane / 4;
#pragma unroll
      for (int step = 0; step < kProductDepth / 4; ++step) {
        const double a0 = a[step * 4], a1 = a[8 * kLeftPitch + step * 4];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const double right = b[step * 4 * kRightPitch + 8 * v];
          mma_f64(acc[0][v], a0, right);
          mma_f64(acc[1][v], a1, right);
        }
      }
      block_sync();
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int64_t i = i0 + warp_row + 8 * u + lane / 4;
      if (i >= n) continue;
      double* out = accumulator + (order[i] - first_row) * d;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const int64_t f = f0 + warp_column + 8 * v + 2 * (lane % 4) + w;
          if (f < d) out[f] += weight * acc[u][v][w];
        }
      }
    }
  }
}

template <class S>
struct ClusterGradientArgs {
  FeatureView<S> x;
  Clusters clusters;                // indexed (run_cluster_index)
  ClusterSlots slots;               // W of the rows of these groups
  const double* weights = nullptr;  // all groups x k
  double* accumulator = nullptr;    // (rows of these groups) x d
  int64_t blocks = 2112;            // at most; they loop over tiles
};

// Bytes of run_cluster_gradient's workspace.
inline int64_t cluster_gradient_workspace(int64_t items, int64_t dim) {
  return ceil_div(work_list_workspace(items), 256) * 256 + static_cast<int64_t>(sizeof(double)) * items * dim;
}

// accumulator += weight * gradient of every cluster's nuclear norm with respect to its rows.
template <class S>
void run_cluster_gradient(const ClusterGradientArgs<S>& a, void* workspace, cudaStream_t stream) {
  const Clusters& p = a.clusters;
  const int64_t items = p.items(), d = a.x.dim;
  auto* bytes = static_cast<unsigned char*>(workspace);
  const WorkList list = work_list_at(items, bytes);
  auto* means = reinterpret_cast<double*>(bytes + ceil_div(work_list_workspace(items), 256) * 256);
  run_work_list(p, d, a.slots.rows_side, list, stream);
  run_cluster_means(a.x, p, 0.0, means, nullptr, stream);
  const int64_t bound = (items + ceil_div(p.groups * p.group_rows, kProductRows)) * ceil_div(d, kProductFeatures);
  launch(DSE_KERNEL(cluster_gradient_kernel<S>),
         {grid_of(bound < a.blocks ? bound : a.blocks), kProductThreads, 0, stream}, a.x, p, list, means, a.slots,
         a.weights, a.accumulator);
}

template <class S, class C>
struct FinishArgs {
  FeatureView<S> x;  // with scales
  Variant variant = Variant::kRegularizer;
  bool normalize = true;
  int64_t row_begin = 0, row_end = 0;      // rows of the accumulator; begins with a group
  int64_t group_rows = 0, k = 0;           // global clusters
  const int64_t* labels = nullptr;         // of all rows
  const int64_t* sizes = nullptr;          // groups x k; read in the paper's variant only
  const C* centroids = nullptr;            // groups x k x d
  const int64_t* nearest = nullptr;        // of all rows
  const double* distance = nullptr;        // of all rows
  const double* mean = nullptr;            // d
  const double* mean_direction = nullptr;  // d
  const double* weights = nullptr;         // run_gradient_weights
  const double* accumulator = nullptr;
  const int64_t* finite = nullptr;  // 0: everything is NaN
  S* out = nullptr;                 // all rows x d, contiguous
};

template <class S, class C>
__global__ __launch_bounds__(kRowThreads) void finish_rows_kernel(FinishArgs<S, C> p) {
  const int64_t i = p.row_begin + static_cast<int64_t>(blockIdx.x) * kRowWarps + warp_id();
  if (i >= p.row_end) return;
  const int64_t d = p.x.dim;
  S* out = p.out + i * d;
  const double scale = p.x.scale(i);
  const bool finite = *p.finite != 0;
  // A row below the floor has no direction: it is a dead token, and gets no gradient (rather than 1e12 times the
  // upstream one, which no optimizer survives).
  const bool dead = p.normalize && scale >= 1.0 / kNormFloor;
  if (!finite || dead) {
    const S value = from_double<S>(finite ? 0.0 : static_cast<double>(NAN));
    for (int64_t f = lane_id(); f < d; f += kWarp) out[f] = value;
    return;
  }
  const int64_t g = i / p.group_rows;
  const int64_t n = p.x.rows() - g * p.group_rows < p.group_rows ? p.x.rows() - g * p.group_rows : p.group_rows;
  const int64_t nearest = p.nearest[i];
  const double distance = p.distance[i], spread = p.weights[kSpreadWeight];
  const bool has_centroid = nearest >= 0 && distance > 0.0;
  double pull = 0.0;
  if (has_centroid) {
    // d(dist)/dx = (x - c) / dist; d(dist^2)/dx = 2 (x - c).
    pull = p.variant == Variant::kPaper
               ? 2.0 * p.weights[kInterWeight] / static_cast<double>(p.sizes[g * p.k + p.labels[i]])
               : p.weights[kInterWeight] / (static_cast<double>(n) * distance);
  }
  const C* centroid = p.centroids + (g * p.k + (has_centroid ? nearest : 0)) * d;
  const RowReader<S> row = row_reader(p.x, i);
  const double* part = p.accumulator + (i - p.row_begin) * d;
  double with_part = 0.0, with_centroid = 0.0, with_mean = 0.0, with_direction = 0.0, square = 0.0;
#pragma unroll 2
  for (int64_t f = lane_id(); f < d; f += kWarp) {
    const double x = row(f), from_mean = x - p.mean[f];
    with_part += x * part[f];
    if (has_centroid) with_centroid += x * (x - static_cast<double>(centroid[f]));
    with_mean += x * from_mean;
    with_direction += x * p.mean_direction[f];
    square += from_mean * from_mean;
  }
  square = warp_sum(square);
  const double away = spread != 0.0 && square > 0.0 ? spread / sqrt(square) : 0.0;
  double along = warp_sum(with_part) + pull * warp_sum(with_centroid);
  along += away * warp_sum(with_mean) - spread * warp_sum(with_direction);
  if (!p.normalize) along = 0.0;
  const double factor = p.normalize ? scale : 1.0;
#pragma unroll 2
  for (int64_t f = lane_id(); f < d; f += kWarp) {
    const double x = row(f);
    double grad = part[f];
    if (has_centroid) grad += pull * (x - static_cast<double>(centroid[f]));
    grad += away * (x - p.mean[f]) - spread * p.mean_direction[f];
    out[f] = from_double<S>((grad - along * x) * factor);
  }
}

// Rows row_begin .. row_end - 1 of the gradient.
template <class S, class C>
void run_finish_rows(const FinishArgs<S, C>& p, cudaStream_t stream) {
  launch(DSE_KERNEL(finish_rows_kernel<S, C>),
         {grid_of(ceil_div(p.row_end - p.row_begin, kRowWarps)), kRowThreads, 0, stream}, p);
}

// out = accumulator in the type of the features; NaN in groups whose clusters have form -1.
template <class S>
__global__ __launch_bounds__(kRowThreads) void store_rows_kernel(const double* accumulator, int64_t count,
                                                                 int64_t group_elements, const int64_t* forms,
                                                                 int64_t k, S* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + thread_id();
  if (i >= count) return;
  out[i] = from_double<S>(forms[i / group_elements * k] < 0 ? static_cast<double>(NAN) : accumulator[i]);
}

// The gradient of the nuclear norms of `groups` groups of group_rows rows; all arrays begin with the first of
// them.
template <class S>
void run_store_rows(const double* accumulator, int64_t groups, int64_t group_rows, int64_t dim,
                    const int64_t* forms, int64_t k, S* out, cudaStream_t stream) {
  const int64_t elements = group_rows * dim, count = groups * elements;
  launch(DSE_KERNEL(store_rows_kernel<S>), {grid_of(ceil_div(count, kRowThreads)), kRowThreads, 0, stream},
         accumulator, count, elements, forms, k, out);
}

}  // namespace dse::cuda
