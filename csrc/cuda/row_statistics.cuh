// Scales of the rows, their mean, their mean distance from it, the nearest other centroid of every row, and what
// the five components are made of.
//
// Every kernel streams the features once, as they lie in memory: at (256, 196, 1024) in bfloat16 103 MB, 24 us at
// 4.3 TB/s. Scales take one such pass, avg_norm and its gradient three (the mean, the deviations from it, their
// directions), the nearest centroids one and a second look at rows that are still in the second-level cache,
// beside 2.5 GFLOP of float64 tensor-core products (37 us). Sums run in two stages, over blocks of rows whose
// number depends on the problem alone.
#pragma once

#include "common/problem.h"
#include "cuda/tiles.cuh"

namespace dse::cuda {

inline constexpr int kRowThreads = 256;  // a warp a row
inline constexpr int kRowWarps = kRowThreads / kWarp;
inline constexpr int64_t kReductionBlocks = 512;

// Rows summed by one block of a reduction over n rows.
inline int64_t reduction_rows(int64_t n) {
  const int64_t rows = ceil_div(n, kReductionBlocks);
  return rows > 64 ? rows : 64;
}

static __global__ void fill_flags_kernel(int* flags, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + thread_id();
  if (i < count) flags[i] = 1;
}

// scale[i] = 1 / max(||z_i||, floor), or 1; flags of rows that are not finite become 0.
template <class S>
__global__ __launch_bounds__(kRowThreads) void row_scales_kernel(FeatureView<S> z, bool normalize, double* scale,
                                                                 int* finite, int64_t rows_per_flag) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowWarps + warp_id();
  if (i >= z.rows()) return;
  const int64_t d = z.dim;
  const RowReader<S> row{z.data + row_offset(z, i), z.stride_dim, 1.0};
  double squares = 0.0;
#pragma unroll 8
  for (int64_t f = lane_id(); f < d; f += kWarp) {
    const double value = row(f);
    squares += value * value;
  }
  squares = warp_sum(squares);
  double norm = sqrt(squares);
  bool good = true;
  if (!(squares > 1e-280 && squares < 1e280)) {  // the squares, not the row, leave float64's range
    double largest = 0.0, bad = 0.0;
    for (int64_t f = lane_id(); f < d; f += kWarp) {
      const double value = fabs(row(f));
      if (!(value <= 1.7976931348623157e308)) bad = 1.0;
      else if (value > largest) largest = value;
    }
    largest = warp_max(largest);
    good = warp_max(bad) == 0.0;
    norm = 0.0;
    if (good && largest > 0.0) {
      double total = 0.0;
      for (int64_t f = lane_id(); f < d; f += kWarp) {
        const double value = row(f) / largest;
        total += value * value;
      }
      norm = largest * sqrt(warp_sum(total));
      // Longer than any number: of use only where nobody asks for the scale.
      if (scale != nullptr && !(norm <= 1.7976931348623157e308)) good = false;
    }
  }
  if (lane_id() != 0) return;
  if (scale != nullptr) scale[i] = normalize ? 1.0 / (norm > kNormFloor ? norm : kNormFloor) : 1.0;
  if (!good) atomicAnd(finite + i / rows_per_flag, 0);
}

// Scales of all rows of z, which has none yet (`scale` may be null: flags only), and one flag for every
// `rows_per_flag` rows: 1 where all of them are finite, else 0.
template <class S>
void run_row_scales(const FeatureView<S>& z, bool normalize, double* scale, int* finite, int64_t rows_per_flag,
                    cudaStream_t stream) {
  const int64_t flags = ceil_div(z.rows(), rows_per_flag);
  launch(DSE_KERNEL(fill_flags_kernel), {grid_of(ceil_div(flags, kRowThreads)), kRowThreads, 0, stream}, finite,
         flags);
  launch(DSE_KERNEL(row_scales_kernel<S>), {grid_of(ceil_div(z.rows(), kRowWarps)), kRowThreads, 0, stream}, z,
         normalize, scale, finite, rows_per_flag);
}

// partial[block][f] = sum of weight[i] * (x[i][f] - origin[f]) over the block's rows. Without an origin row 0
// serves: equal rows then add exact zeros.
template <class S>
__global__ __launch_bounds__(kListThreads, 4) void column_sums_kernel(FeatureView<S> x, const double* origin,
                                                                      const double* weight,
                                                                      int64_t rows_per_block, double* partial) {
  __shared__ RowList list;
  const int64_t slabs = ceil_div(x.dim, kListSlab);
  const int64_t block = blockIdx.x / slabs, slab_begin = blockIdx.x % slabs * kListSlab;
  const int64_t begin = block * rows_per_block;
  const int64_t end = begin + rows_per_block < x.rows() ? begin + rows_per_block : x.rows();
  double center[kListFeatures] = {}, sum[kListFeatures] = {};
  const RowReader<S> row0 = row_reader(x, 0);
  for (int j = 0; j < kListFeatures; ++j) {
    const int64_t f = list_feature(slab_begin, j);
    if (f < x.dim) center[j] = origin != nullptr ? origin[f] : row0(f);
  }
  for (int64_t base = begin; base < end; base += kListRows) {
    const int count = static_cast<int>(end - base < kListRows ? end - base : kListRows);
    for (int e = thread_id(); e < count; e += kListThreads) {
      list.set(e, x, base + e, weight != nullptr ? weight[base + e] : 1.0);
    }
    block_sync();
    for_each_listed(x, list, count, slab_begin,
                    [&](int j, double value, double w) { sum[j] += w * (value - center[j]); });
    block_sync();
  }
  for (int j = 0; j < kListFeatures; ++j) {
    const int64_t f = list_feature(slab_begin, j);
    if (f < x.dim) partial[block * x.dim + f] = sum[j];
  }
}

// Sum over the blocks of partial[block][f] for the 32 features of this block of threads; complete in warp 0,
// whose lane l holds feature 32 * blockIdx.x + l.
__device__ __forceinline__ double reduce_columns(const double* partial, int64_t blocks, int64_t d,
                                                 double* scratch) {
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kWarp + lane_id();
  double sum = 0.0;
  if (f < d) {
#pragma unroll 8
    for (int64_t b = warp_id(); b < blocks; b += kRowWarps) sum += partial[b * d + f];
  }
  scratch[thread_id()] = sum;
  block_sync();
  sum = 0.0;
  if (warp_id() == 0) {
    for (int w = 0; w < kRowWarps; ++w) sum += scratch[w * kWarp + lane_id()];
  }
  return sum;
}

template <class S>
__global__ __launch_bounds__(kRowThreads) void column_means_kernel(FeatureView<S> x, const double* partial,
                                                                   int64_t blocks, double* mean) {
  __shared__ double scratch[kRowThreads];
  const double sum = reduce_columns(partial, blocks, x.dim, scratch);
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kWarp + lane_id();
  if (warp_id() == 0 && f < x.dim) mean[f] = row_reader(x, 0)(f) + sum / static_cast<double>(x.rows());
}

// Distances of the rows from their mean: inverse[i] = 1 / distance (0 where it is 0; may be null), and of the
// block's rows the sum of the distances and the largest squared norm.
template <class S>
__global__ __launch_bounds__(kRowThreads) void deviations_kernel(FeatureView<S> x, const double* mean,
                                                                 int64_t rows_per_block, double* inverse,
                                                                 double* totals, double* largest) {
  __shared__ double scratch[33];
  const int64_t begin = blockIdx.x * rows_per_block;
  const int64_t end = begin + rows_per_block < x.rows() ? begin + rows_per_block : x.rows();
  double total = 0.0, most = 0.0;
  for (int64_t i = begin + warp_id(); i < end; i += kRowWarps) {
    const RowReader<S> row = row_reader(x, i);
    double square = 0.0, length = 0.0;
#pragma unroll 8
    for (int64_t f = lane_id(); f < x.dim; f += kWarp) {
      const double value = row(f), step = value - mean[f];
      square += step * step;
      length += value * value;
    }
    const double norm = sqrt(warp_sum(square));
    length = warp_sum(length);
    total += norm;
    most = length > most ? length : most;
    if (inverse != nullptr && lane_id() == 0) inverse[i] = norm > 0.0 ? 1.0 / norm : 0.0;
  }
  total = block_sum(lane_id() == 0 ? total : 0.0, scratch);
  most = block_max(most, scratch);
  if (thread_id() == 0) {
    totals[blockIdx.x] = total;
    largest[blockIdx.x] = most;
  }
}

// avg_norm, and the mean of the directions from the mean if asked for. A distance that is rounding of the rows'
// own length is none: both are 0 then.
static __global__ __launch_bounds__(kRowThreads) void average_norm_kernel(const double* totals,
                                                                          const double* largest, int64_t blocks,
                                                                          const double* partial, int64_t rows,
                                                                          int64_t d, double* average,
                                                                          double* mean_direction) {
  __shared__ double scratch[kRowThreads];
  constexpr double kEps = 2.220446049250313e-16;
  double total = 0.0, most = 0.0;
  for (int64_t b = thread_id(); b < blocks; b += kRowThreads) {
    total += totals[b];
    most = largest[b] > most ? largest[b] : most;
  }
  total = block_sum(total, scratch) / static_cast<double>(rows);
  most = block_max(most, scratch);
  // NaN stays NaN.
  if (total <= 8.0 * kEps * sqrt(most)) total = 0.0;
  if (blockIdx.x == 0 && thread_id() == 0) *average = total;
  if (mean_direction == nullptr) return;
  const double sum = reduce_columns(partial, blocks, d, scratch);
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kWarp + lane_id();
  if (warp_id() == 0 && f < d) mean_direction[f] = total == 0.0 ? 0.0 : sum / static_cast<double>(rows);
}

// Bytes of run_average_norm's workspace.
inline int64_t average_norm_workspace(int64_t rows, int64_t dim) {
  const int64_t blocks = ceil_div(rows, reduction_rows(rows));
  return static_cast<int64_t>(sizeof(double)) * (rows + blocks * (dim + 2));
}

// mean (d): mean of all rows; average (1): avg_norm; mean_direction (d): mean of (x - mean) / ||x - mean||, or
// null if no gradient is wanted. All scaled by x.row_scale.
template <class S>
void run_average_norm(const FeatureView<S>& x, double* mean, double* mean_direction, double* average,
                      void* workspace, cudaStream_t stream) {
  const int64_t n = x.rows(), d = x.dim, block_rows = reduction_rows(n), blocks = ceil_div(n, block_rows);
  const int64_t slabs = ceil_div(d, kListSlab);
  double* inverse = static_cast<double*>(workspace);
  double* partial = inverse + n;
  double* totals = partial + blocks * d;
  double* largest = totals + blocks;
  const double* none = nullptr;
  const Launch sums{grid_of(blocks * slabs), kListThreads, 0, stream};
  const Launch columns{grid_of(ceil_div(d, kWarp)), kRowThreads, 0, stream};
  launch(DSE_KERNEL(column_sums_kernel<S>), sums, x, none, none, block_rows, partial);
  launch(DSE_KERNEL(column_means_kernel<S>), columns, x, partial, blocks, mean);
  launch(DSE_KERNEL(deviations_kernel<S>), {grid_of(blocks), kRowThreads, 0, stream}, x, mean, block_rows,
         mean_direction != nullptr ? inverse : nullptr, totals, largest);
  if (mean_direction != nullptr) {
    launch(DSE_KERNEL(column_sums_kernel<S>), sums, x, mean, inverse, block_rows, partial);
    launch(DSE_KERNEL(average_norm_kernel), columns, totals, largest, blocks, partial, n, d, average,
           mean_direction);
  } else {
    launch(DSE_KERNEL(average_norm_kernel), {dim3(1), kRowThreads, 0, stream}, totals, largest, blocks, partial,
           n, d, average, mean_direction);
  }
}

// Centroids of one group of consecutive rows each; the last group may be smaller. A centroid that is not finite
// is absent.
template <class C>
struct NearestArgs {
  const C* centroids = nullptr;     // groups x k x d
  const int64_t* labels = nullptr;  // one a row: the centroid that does not count; null: all do
  int64_t group_rows = 0;
  int64_t k = 0;
  int64_t* nearest = nullptr;   // a row's nearest other centroid, -1 where the group has fewer than two
  double* distance = nullptr;   // its distance, or 0; may be null
  int64_t* assigned = nullptr;  // the same as a label: 0 in place of -1; may be null
};

template <class S, class C>
__global__ __launch_bounds__(kTileThreads) void nearest_centroid_kernel(FeatureView<S> x, NearestArgs<C> p) {
  __shared__ ScoreTile tile;
  const int64_t tiles = ceil_div(p.group_rows, kTileRows);
  const int64_t g = blockIdx.x / tiles;
  const int64_t group_end = (g + 1) * p.group_rows < x.rows() ? (g + 1) * p.group_rows : x.rows();
  const int64_t first = g * p.group_rows + blockIdx.x % tiles * kTileRows;
  if (first >= group_end) return;
  const int64_t rows = group_end - first < kTileRows ? group_end - first : kTileRows;
  const C* centroids = p.centroids + g * p.k * x.dim;
  const int lane = lane_id(), warp = warp_id();
  const int64_t own = warp * 8 + lane / 4;
  const int64_t label = p.labels != nullptr && own < rows ? p.labels[first + own] : -1;
  Candidate best;
  int present = 0;
  visit_scores(x, first, rows, nullptr, 1.0, centroids, p.k, tile,
               [&](int64_t c, double value, double half_norm) {
                 if (!(half_norm <= 1.7976931348623157e308)) return;
                 ++present;
                 if (c != label) best.offer(value, c);
               });
  best.share();
  present += shuffle_xor(present, 1);
  present += shuffle_xor(present, 2);
  for (int r = 0; r < 8; ++r) {
    int64_t c = shuffle_idx(best.index, 4 * r);
    if (warp * 8 + r >= rows) break;  // the same for all lanes
    if (present < 2) c = -1;
    const int64_t i = first + warp * 8 + r;
    double square = 0.0;
    if (c >= 0 && p.distance != nullptr) {
      const RowReader<S> row{x.data + tile.offset[warp * 8 + r], x.stride_dim, tile.scale[warp * 8 + r]};
      const C* centroid = centroids + c * x.dim;
#pragma unroll 4
      for (int64_t f = lane; f < x.dim; f += kWarp) {
        const double step = row(f) - static_cast<double>(centroid[f]);
        square += step * step;
      }
    }
    square = warp_sum(square);
    if (lane != 0) continue;
    if (p.nearest != nullptr) p.nearest[i] = c;
    if (p.distance != nullptr) p.distance[i] = sqrt(square);
    if (p.assigned != nullptr) p.assigned[i] = c >= 0 ? c : 0;
  }
}

template <class S, class C>
void run_nearest_centroid(const FeatureView<S>& x, const NearestArgs<C>& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(x.rows(), p.group_rows) * ceil_div(p.group_rows, kTileRows);
  launch(DSE_KERNEL(nearest_centroid_kernel<S, C>), {grid_of(blocks), kTileThreads, 0, stream}, x, p);
}

// Sum and number of the terms of m_inter in each group: the mean distance of its rows, or in the paper's variant
// the mean squared distance of every cluster (rows in `order`, see clusters.cuh).
static __global__ __launch_bounds__(kRowThreads) void inter_terms_kernel(
    const double* distance, const int64_t* nearest, int64_t rows, int64_t group_rows, int64_t k, Variant variant,
    const int64_t* offset, const int64_t* order, double* sums, int64_t* terms) {
  __shared__ double scratch[33];
  const int64_t g = blockIdx.x, first = g * group_rows;
  const int64_t n = rows - first < group_rows ? rows - first : group_rows;
  double sum = 0.0;
  if (nearest[first] < 0) {
    if (thread_id() == 0) {
      sums[g] = 0.0;
      terms[g] = 0;
    }
    return;
  }
  if (variant != Variant::kPaper) {
    for (int64_t i = thread_id(); i < n; i += kRowThreads) sum += distance[first + i];
    sum = block_sum(sum, scratch);
    if (thread_id() == 0) {
      sums[g] = sum / static_cast<double>(n);
      terms[g] = 1;
    }
    return;
  }
  double own = 0.0, clusters = 0.0;
  for (int64_t c = warp_id(); c < k; c += kRowWarps) {
    const int64_t begin = offset[g * (k + 1) + c], end = offset[g * (k + 1) + c + 1];
    if (begin == end) continue;
    double squares = 0.0;
    for (int64_t i = begin + lane_id(); i < end; i += kWarp) {
      const double value = distance[order[first + i]];
      squares += value * value;
    }
    own += warp_sum(squares) / static_cast<double>(end - begin);
    clusters += 1.0;
  }
  own = block_sum(lane_id() == 0 ? own : 0.0, scratch);
  clusters = block_sum(lane_id() == 0 ? clusters : 0.0, scratch);
  if (thread_id() == 0) {
    sums[g] = own;
    terms[g] = static_cast<int64_t>(clusters);
  }
}

inline void run_inter_terms(const double* distance, const int64_t* nearest, int64_t rows, int64_t group_rows,
                            int64_t k, Variant variant, const int64_t* offset, const int64_t* order, double* sums,
                            int64_t* terms, cudaStream_t stream) {
  launch(DSE_KERNEL(inter_terms_kernel), {grid_of(ceil_div(rows, group_rows)), kRowThreads, 0, stream}, distance,
         nearest, rows, group_rows, k, variant, offset, order, sums, terms);
}

// What the five components are made of.
struct ComponentArgs {
  Variant variant = Variant::kRegularizer;
  int64_t dim = 0, images = 0, groups = 0, local_clusters = 0, global_clusters = 0;
  const double* local_norms = nullptr;   // images x local_clusters: nuclear norms, not scaled
  const int64_t* local_sizes = nullptr;  // and the clusters' rows
  const double* global_norms = nullptr;  // groups x global_clusters
  const int64_t* global_sizes = nullptr;
  const double* inter_sums = nullptr;    // groups
  const int64_t* inter_terms = nullptr;  // groups
  const double* average = nullptr;       // avg_norm
  const double* ranks = nullptr;         // m_dim = sum of rank_count effective ranks / rank_divisor
  int64_t rank_count = 1;
  double rank_divisor = 1.0;
  const int* finite = nullptr;      // 0: all components are NaN
  double* saved = nullptr;          // the components as float64; may be null
  int64_t* saved_finite = nullptr;  // the flag again; may be null
};

template <class C>
struct ComponentOutputs {
  C* value[5];  // m_inter, m_intra_image, m_intra_batch, m_dim, avg_norm
};

// Sum of a group's scaled radii, and how many there are.
__device__ __forceinline__ void add_radii(const double* norms, const int64_t* sizes, int64_t k, int64_t d,
                                          Variant variant, double* sum, double* count) {
  for (int64_t c = 0; c < k; ++c) {
    if (sizes[c] < 2) continue;
    *sum += norms[c] * radius_scale(variant, sizes[c], d);
    *count += 1.0;
  }
}

template <class C>
__global__ __launch_bounds__(kRowThreads, 1) void components_kernel(ComponentArgs p, ComponentOutputs<C> out) {
  __shared__ double scratch[33];
  const auto mean = [&](double sum, double count) {
    sum = block_sum(sum, scratch);
    count = block_sum(count, scratch);
    return count > 0.0 ? sum / count : 0.0;
  };
  double sum = 0.0, count = 0.0;
  for (int64_t g = thread_id(); g < p.groups; g += kRowThreads) {
    sum += p.inter_sums[g];
    count += static_cast<double>(p.inter_terms[g]);
  }
  double inter = mean(sum, count);
  sum = count = 0.0;
  for (int64_t b = thread_id(); b < p.images; b += kRowThreads) {
    double own = 0.0, clusters = 0.0;
    add_radii(p.local_norms + b * p.local_clusters, p.local_sizes + b * p.local_clusters, p.local_clusters, p.dim,
              p.variant, &own, &clusters);
    if (clusters == 0.0) continue;
    sum += own / clusters;
    count += 1.0;
  }
  double image = mean(sum, count);
  sum = count = 0.0;
  for (int64_t g = thread_id(); g < p.groups; g += kRowThreads) {
    add_radii(p.global_norms + g * p.global_clusters, p.global_sizes + g * p.global_clusters, p.global_clusters,
              p.dim, p.variant, &sum, &count);
  }
  double batch = mean(sum, count);
  sum = 0.0;
  for (int64_t i = thread_id(); i < p.rank_count; i += kRowThreads) sum += p.ranks[i];
  const double rank = block_sum(sum, scratch) / p.rank_divisor;
  if (thread_id() != 0) return;
  const double average = *p.average;
  if (divides_by_avg_norm(p.variant)) {
    // All rows equal: nothing to measure the radii by, and nothing to measure.
    inter = average > 0.0 ? inter / average : 0.0;
    image = average > 0.0 ? image / average : 0.0;
    batch = average > 0.0 ? batch / average : 0.0;
  }
  const bool finite = *p.finite != 0;
  const double nan = static_cast<double>(NAN);
  const double value[5] = {inter, image, batch, rank, average};
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const double result = finite ? value[i] : nan;
    if (p.saved != nullptr) p.saved[i] = result;
    *out.value[i] = static_cast<C>(result);
  }
  if (p.saved_finite != nullptr) *p.saved_finite = finite ? 1 : 0;
}

template <class C>
void run_components(const ComponentArgs& p, const ComponentOutputs<C>& out, cudaStream_t stream) {
  launch(DSE_KERNEL(components_kernel<C>), {dim3(1), kRowThreads, 0, stream}, p, out);
}

// Float64 centroids in the operator's type, NaN where the features are not finite.
template <class C>
__global__ __launch_bounds__(kRowThreads) void store_centroids_kernel(const double* from, int64_t count,
                                                                      const int* finite, int64_t per_flag,
                                                                      C* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + thread_id();
  if (i < count) to[i] = static_cast<C>(finite[i / per_flag] != 0 ? from[i] : static_cast<double>(NAN));
}

// One flag for every `per_flag` elements.
template <class C>
void run_store_centroids(const double* from, int64_t count, const int* finite, int64_t per_flag, C* to,
                         cudaStream_t stream) {
  launch(DSE_KERNEL(store_centroids_kernel<C>), {grid_of(ceil_div(count, kRowThreads)), kRowThreads, 0, stream},
         from, count, finite, per_flag, to);
}

// Given centroids (groups x k x d, any strides) in the operator's type. A last group with fewer rows than
// centroids may be padded with zeros: those are absent, which is written as infinite.
template <class D, class C>
__global__ __launch_bounds__(kRowThreads) void load_centroids_kernel(FeatureView<D> given,
                                                                     int64_t last_group_rows, int64_t group_rows,
                                                                     const int* finite, C* to) {
  __shared__ double scratch[33];
  const int64_t d = given.dim, g = blockIdx.x / given.inner, c = blockIdx.x % given.inner;
  const RowReader<D> row = row_reader(given, blockIdx.x);
  double squares = 0.0;
  for (int64_t f = thread_id(); f < d; f += kRowThreads) squares += row(f) * row(f);
  squares = block_sum(squares, scratch);
  const int64_t rows = g + 1 == given.outer ? last_group_rows : group_rows;
  const bool padding = c >= rows && rows < group_rows && squares == 0.0;
  for (int64_t f = thread_id(); f < d; f += kRowThreads) {
    double value = padding ? static_cast<double>(INFINITY) : row(f);
    if (*finite == 0) value = static_cast<double>(NAN);
    to[blockIdx.x * d + f] = static_cast<C>(value);
  }
}

template <class D, class C>
void run_load_centroids(const FeatureView<D>& given, int64_t last_group_rows, int64_t group_rows,
                        const int* finite, C* to, cudaStream_t stream) {
  launch(DSE_KERNEL(load_centroids_kernel<D, C>), {grid_of(given.rows()), kRowThreads, 0, stream}, given,
         last_group_rows, group_rows, finite, to);
}

}  // namespace dse::cuda
