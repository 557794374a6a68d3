// Clusters of rows: who belongs to whom, nuclear norms ||H X_c||_* and the matrices W_c of their gradients.
//
// Rows are sorted by cluster (stable: a block a cluster scans the labels, so no block waits for another).
// Clusters form a work list, largest first, with the running number of tiles, and the blocks of the products go
// through the tiles of all clusters: sizes are known to the device alone, and a cluster of any size is shared by
// all multiprocessors. Every cluster is centred about its own mean as it is read, in float64: equal rows leave
// exact zeros. Gram matrices of the smaller side (n x n for n <= d, else d x d) are summed by float64 tensor
// cores in tiles of 32 x 32, which waste little of clusters of about 65 rows, and are decomposed by one block a
// cluster.
//
// Cost at 768 clusters of 65 x 1024: the means read 50 k rows once (bfloat16: 24 us at 4.3 TB/s); 768 * 6 tiles
// of 2 Mflop, 9.7 Gflop or 0.15 ms at 67 TFLOP/s, reading 0.6 GB from the second-level cache; the decompositions
// are chains of dependent rotations (eigen.cuh), 0.2 ms for one matrix and as many at a time as fit shared
// memory.
#pragma once

#include "common/problem.h"
#include "common/spectral.h"
#include "cuda/eigen.cuh"
#include "cuda/tiles.cuh"

namespace dse::cuda {

inline constexpr int kGramTile = 32;
inline constexpr int kGramThreads = 128;
inline constexpr int kListBlock = 256;
// Tile of the products with W: rows x features.
inline constexpr int kProductRows = 32;
inline constexpr int kProductFeatures = 64;

// Rows in groups of `group_rows` (the last may be smaller), each with clusters 0 .. k - 1. The arrays are indexed
// by all groups and rows; kernels look at groups group_begin .. group_begin + groups - 1.
struct Clusters {
  int64_t rows = 0, group_rows = 0, k = 0;
  int64_t group_begin = 0, groups = 0;
  const int64_t* labels = nullptr;  // one a row; rows with a label outside 0 .. k - 1 are in no cluster
  int64_t* offset = nullptr;        // all groups x (k + 1): cluster c has order[first + offset[c]] and on
  int64_t* order = nullptr;         // all rows
  int64_t* sizes = nullptr;         // all groups x k

  DSE_HOST_DEVICE int64_t items() const { return groups * k; }
  DSE_HOST_DEVICE int64_t first(int64_t g) const { return g * group_rows; }
  DSE_HOST_DEVICE int64_t count(int64_t g) const {
    return rows - g * group_rows < group_rows ? rows - g * group_rows : group_rows;
  }
};

// One cluster: `item` counts from the first cluster of group group_begin.
struct ClusterRef {
  int64_t g, c, n;
  int64_t begin;  // in `order`

  __device__ __forceinline__ ClusterRef(const Clusters& p, int64_t item) {
    g = p.group_begin + item / p.k;
    c = item % p.k;
    const int64_t* offset = p.offset + g * (p.k + 1) + c;
    n = offset[1] - offset[0];
    begin = p.first(g) + offset[0];
  }
};

// Cluster c of group g: counts the rows of lower clusters, then lists its own in their order.
static __global__ __launch_bounds__(kListBlock) void cluster_index_kernel(Clusters p) {
  __shared__ int scan[33];
  const int64_t g = p.group_begin + blockIdx.x / p.k, c = blockIdx.x % p.k;
  const int64_t first = p.first(g), n = p.count(g);
  const int64_t* labels = p.labels + first;
  int lower = 0, own = 0, before = 0, size = 0;
  for (int64_t i = thread_id(); i < n; i += kListBlock) {
    const int64_t label = labels[i];
    lower += label >= 0 && label < c ? 1 : 0;
    own += label == c ? 1 : 0;
  }
  block_exclusive_scan(lower, scan, &before);
  block_exclusive_scan(own, scan, &size);
  if (thread_id() == 0) {
    p.offset[g * (p.k + 1) + c] = before;
    if (c + 1 == p.k) p.offset[g * (p.k + 1) + p.k] = before + size;
    p.sizes[g * p.k + c] = size;
  }
  int64_t place = first + before;
  for (int64_t base = 0; base < n; base += kListBlock) {
    const int64_t i = base + thread_id();
    const int member = i < n && labels[i] == c ? 1 : 0;
    int total = 0;
    const int rank = block_exclusive_scan(member, scan, &total);
    if (member != 0) p.order[place + rank] = first + i;
    place += total;
  }
}

// offset, order and sizes from the labels.
inline void run_cluster_index(const Clusters& p, cudaStream_t stream) {
  launch(DSE_KERNEL(cluster_index_kernel), {grid_of(p.items()), kListBlock, 0, stream}, p);
}

// The clusters of a call in descending order of size (ties: the first one first), and the number of tiles of
// those before each: of the lower triangle of a Gram matrix, and of a product with W.
struct WorkList {
  int64_t* item = nullptr;           // items
  int64_t* gram_tiles = nullptr;     // items + 1
  int64_t* product_tiles = nullptr;  // items + 1
};

inline int64_t work_list_workspace(int64_t items) {
  return static_cast<int64_t>(sizeof(int64_t)) * (3 * items + 2);
}
inline WorkList work_list_at(int64_t items, void* workspace) {
  int64_t* base = static_cast<int64_t*>(workspace);
  return {base, base + items, base + 2 * items + 1};
}

// Side of the matrix of a cluster. `rows_side`: always its rows.
DSE_HOST_DEVICE inline int64_t cluster_side(int64_t n, int64_t d, bool rows_side) {
  return rows_side || n <= d ? n : d;
}

static __global__ __launch_bounds__(kListBlock) void rank_clusters_kernel(Clusters p, WorkList list) {
  __shared__ int64_t size[kListBlock];
  const int64_t items = p.items(), own = static_cast<int64_t>(blockIdx.x) * kListBlock + thread_id();
  const int64_t* sizes = p.sizes + p.group_begin * p.k;
  const int64_t n = own < items ? sizes[own] : 0;
  int64_t rank = 0;
  for (int64_t base = 0; base < items; base += kListBlock) {
    const int64_t count = items - base < kListBlock ? items - base : kListBlock;
    if (thread_id() < count) size[thread_id()] = sizes[base + thread_id()];
    block_sync();
    for (int64_t j = 0; j < count; ++j) rank += size[j] > n || (size[j] == n && base + j < own) ? 1 : 0;
    block_sync();
  }
  if (own < items) list.item[rank] = own;
}

static __global__ __launch_bounds__(kListBlock) void count_tiles_kernel(Clusters p, WorkList list, int64_t d,
                                                                        bool rows_side) {
  __shared__ int64_t scan[33];
  const int64_t items = p.items();
  int64_t gram_total = 0, product_total = 0;
  for (int64_t base = 0; base < items; base += kListBlock) {
    const int64_t i = base + thread_id();
    int64_t gram = 0, product = 0;
    if (i < items) {
      const int64_t n = p.sizes[p.group_begin * p.k + list.item[i]];
      if (n >= 2) {
        const int64_t side = (cluster_side(n, d, rows_side) + kGramTile - 1) / kGramTile;
        gram = side * (side + 1) / 2;
        product = (n + kProductRows - 1) / kProductRows * ((d + kProductFeatures - 1) / kProductFeatures);
      }
    }
    int64_t total = 0;
    const int64_t gram_before = block_exclusive_scan(gram, scan, &total);
    if (i < items) list.gram_tiles[i] = gram_total + gram_before;
    gram_total += total;
    const int64_t product_before = block_exclusive_scan(product, scan, &total);
    if (i < items) list.product_tiles[i] = product_total + product_before;
    product_total += total;
  }
  if (thread_id() == 0) {
    list.gram_tiles[items] = gram_total;
    list.product_tiles[items] = product_total;
  }
}

// After run_cluster_index.
inline void run_work_list(const Clusters& p, int64_t d, bool rows_side, const WorkList& list,
                          cudaStream_t stream) {
  launch(DSE_KERNEL(rank_clusters_kernel), {grid_of(ceil_div(p.items(), kListBlock)), kListBlock, 0, stream}, p,
         list);
  launch(DSE_KERNEL(count_tiles_kernel), {dim3(1), kListBlock, 0, stream}, p, list, d, rows_side);
}

// Mean of every cluster, relative to its first row, so that equal rows have exactly their own value as the mean;
// `absent` where there are no rows. `squares` (may be null) receives the sum of squares of the cluster's rows,
// one part a slab of features.
template <class S>
__global__ __launch_bounds__(kListThreads, 4) void cluster_means_kernel(FeatureView<S> x, Clusters p,
                                                                        double absent, double* means,
                                                                        double* squares) {
  __shared__ RowList list;
  __shared__ double scratch[33];
  const int64_t slabs = ceil_div(x.dim, kListSlab);
  const int64_t item = blockIdx.x / slabs, slab_begin = blockIdx.x % slabs * kListSlab;
  const ClusterRef own(p, item);
  double origin[kListFeatures] = {}, sum[kListFeatures] = {}, square = 0.0;
  if (own.n > 0) {
    const RowReader<S> row0 = row_reader(x, p.order[own.begin]);
    for (int j = 0; j < kListFeatures; ++j) {
      const int64_t f = list_feature(slab_begin, j);
      if (f < x.dim) origin[j] = row0(f);
    }
  }
  for (int64_t base = 0; base < own.n; base += kListRows) {
    const int count = static_cast<int>(own.n - base < kListRows ? own.n - base : kListRows);
    for (int e = thread_id(); e < count; e += kListThreads) list.set(e, x, p.order[own.begin + base + e], 1.0);
    block_sync();
    for_each_listed(x, list, count, slab_begin, [&](int j, double value, double) {
      sum[j] += value - origin[j];
      square += value * value;
    });
    block_sync();
  }
  for (int j = 0; j < kListFeatures; ++j) {
    const int64_t f = list_feature(slab_begin, j);
    if (f >= x.dim) continue;
    means[item * x.dim + f] = own.n > 0 ? origin[j] + sum[j] / static_cast<double>(own.n) : absent;
  }
  if (squares == nullptr) return;
  square = block_sum(square, scratch);
  if (thread_id() == 0) squares[blockIdx.x] = square;
}

inline int64_t cluster_slabs(int64_t dim) { return ceil_div(dim, kListSlab); }

// means: items x d; squares: items x cluster_slabs(d), or null.
template <class S>
void run_cluster_means(const FeatureView<S>& x, const Clusters& p, double absent, double* means, double* squares,
                       cudaStream_t stream) {
  launch(DSE_KERNEL(cluster_means_kernel<S>),
         {grid_of(p.items() * cluster_slabs(x.dim)), kListThreads, 0, stream}, x, p, absent, means, squares);
}

// Where the matrices of clusters lie: that of a cluster whose rows begin at place o of group g at
// data + (first row of g + o) * width, without gaps. `data` begins with the rows of group group_begin.
struct ClusterSlots {
  double* data = nullptr;
  int64_t width = 0;       // min(group_rows, d), or group_rows where all matrices stand on the rows' side
  bool rows_side = false;  // all matrices are n x n

  __device__ __forceinline__ double* at(const Clusters& p, const ClusterRef& c) const {
    return data + (c.begin - p.first(p.group_begin)) * width;
  }
};

struct GramTile {
  double left[kGramTile * kTilePitch];
  double right[kGramTile * kTilePitch];
  int64_t offset[2 * kGramTile];
  double scale[2 * kGramTile];
};

// Tiles of the Gram matrices of all centred clusters.
template <class S>
__global__ __launch_bounds__(kGramThreads,
                             sizeof(S) == 8 ? 4 : 5) void cluster_gram_kernel(FeatureView<S> x, Clusters p,
                                                                              WorkList list, const double* means,
                                                                              ClusterSlots slots) {
  __shared__ GramTile shared;
  constexpr int kOwn = kGramTile / (kGramThreads / kWarp);
  const int lane = lane_id(), warp = warp_id();
  const int64_t items = p.items(), total = list.gram_tiles[items], d = x.dim;
  for (int64_t tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const int64_t at = find_interval(list.gram_tiles, items, tile), item = list.item[at];
    const ClusterRef own(p, item);
    const bool rows_side = own.n <= d;
    const int64_t m = rows_side ? own.n : d, depth = rows_side ? d : own.n;
    int64_t column = tile - list.gram_tiles[at], row = 0;
    while (column > row) column -= ++row;
    const int64_t i0 = row * kGramTile, j0 = column * kGramTile;
    const bool diagonal = row == column;
    const int64_t* order = p.order + own.begin;
    const double* mean = means + item * d;
    if (rows_side && thread_id() < 2 * kGramTile) {
      const int64_t i = (thread_id() < kGramTile ? i0 : j0 - kGramTile) + thread_id();
      shared.offset[thread_id()] = i < own.n ? row_offset(x, order[i]) : -1;
      shared.scale[thread_id()] = i < own.n ? x.scale(order[i]) : 0.0;
    }
    block_sync();
    double acc[2][2][2] = {};
    const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 16;
    const bool busy = i0 + warp_row < m && j0 + warp_column < m;
    // Element r of this lane: a row and feature f + lane on the rows' side; a row of the chunk and a feature of
    // the tile on the other.
    S left[kOwn] = {}, right[kOwn] = {};
    double left_mean = 0.0, right_mean = 0.0;
    if (!rows_side) {
      left_mean = i0 + lane < d ? mean[i0 + lane] : 0.0;
      right_mean = j0 + lane < d ? mean[j0 + lane] : 0.0;
    }
    const auto fetch = [&](int64_t k0) {
      if (rows_side) {
        const int64_t f = k0 + lane;
        if (f >= d) return;
        left_mean = right_mean = mean[f];
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const int64_t a = shared.offset[warp * kOwn + r], b = shared.offset[kGramTile + warp * kOwn + r];
          if (a >= 0) left[r] = x.data[a + f * x.stride_dim];
          if (b >= 0 && !diagonal) right[r] = x.data[b + f * x.stride_dim];
        }
        return;
      }
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const int64_t k = k0 + warp * kOwn + r;
        if (k >= own.n) continue;
        const S* source = x.data + row_offset(x, order[k]);
        if (i0 + lane < d) left[r] = source[(i0 + lane) * x.stride_dim];
        if (j0 + lane < d) right[r] = source[(j0 + lane) * x.stride_dim];
      }
    };
    fetch(0);
    for (int64_t k0 = 0; k0 < depth; k0 += kTileFeatures) {
      if (rows_side) {
        const bool inside = k0 + lane < d;
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const int e = warp * kOwn + r;
          shared.left[e * kTilePitch + lane] =
              inside && shared.offset[e] >= 0 ? __dmul_rn(to_double(left[r]), shared.scale[e]) - left_mean : 0.0;
          if (diagonal) continue;
          shared.right[e * kTilePitch + lane] =
              inside && shared.offset[kGramTile + e] >= 0
                  ? __dmul_rn(to_double(right[r]), shared.scale[kGramTile + e]) - right_mean
                  : 0.0;
        }
      } else {
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const int e = warp * kOwn + r;
          const bool inside = k0 + e < own.n;
          const double scale = inside ? x.scale(order[k0 + e]) : 0.0;
          shared.left[lane * kTilePitch + e] =
              inside && i0 + lane < d ? __dmul_rn(to_double(left[r]), scale) - left_mean : 0.0;
          if (diagonal) continue;
          shared.right[lane * kTilePitch + e] =
              inside && j0 + lane < d ? __dmul_rn(to_double(right[r]), scale) - right_mean : 0.0;
        }
      }
      block_sync();
      if (k0 + kTileFeatures < depth) fetch(k0 + kTileFeatures);
      if (busy) {
        const double* a = shared.left + warp_row * kTilePitch + lane / 4 * kTilePitch + lane % 4;
        const double* b =
            (diagonal ? shared.left : shared.right) + warp_column * kTilePitch + lane / 4 * kTilePitch + lane % 4;
#pragma unroll
        for (int step = 0; step < kTileFeatures / 4; ++step) {
          const double a0 = a[step * 4], a1 = a[8 * kTilePitch + step * 4];
          const double b0 = b[step * 4], b1 = b[8 * kTilePitch + step * 4];
          mma_f64(acc[0][0], a0, b0);
          mma_f64(acc[0][1], a0, b1);
          mma_f64(acc[1][0], a1, b0);
          mma_f64(acc[1][1], a1, b1);
        }
      }
      block_sync();
    }
    double* out = slots.at(p, own);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const int64_t i = i0 + warp_row + 8 * u + lane / 4, j = j0 + warp_column + 8 * v + 2 * (lane % 4) + w;
          if (i >= m || j > i) continue;
          out[i * m + j] = acc[u][v][w];
          out[j * m + i] = acc[u][v][w];
        }
      }
    }
  }
}

// Where a cluster's matrix is decomposed.
struct EigenPlan {
  int64_t shared_side = 72;  // up to this side in shared memory, one matrix a block
  int threads = 128;         // of a block, at most 256
  int64_t large_blocks = 8;  // blocks for matrices that fit neither there nor into the spare part of their slot
  int64_t large_shared = 25600;  // doubles of shared memory of such a block
};

// Vectors and numbers that a decomposition needs beside the matrix, in doubles.
DSE_HOST_DEVICE inline int64_t eigen_vectors(int64_t m) {
  return eigen_scratch(static_cast<int>(m)) + 2 * eigen_even(static_cast<int>(m)) + 34;
}
DSE_HOST_DEVICE inline int64_t eigen_square(int64_t m) { return m * eigen_ld(static_cast<int>(m)); }

// Doubles of shared memory of a block that decomposes matrices up to shared_side.
inline int64_t eigen_shared(const EigenPlan& plan) {
  return eigen_square(plan.shared_side) + eigen_vectors(plan.shared_side);
}

// Bytes of workspace: one matrix of the largest side, with its vectors, for every large block.
inline int64_t eigen_workspace(const EigenPlan& plan, int64_t largest_side) {
  return static_cast<int64_t>(sizeof(double)) * plan.large_blocks *
         (eigen_square(largest_side) + eigen_vectors(largest_side));
}

struct EigenArgs {
  Clusters clusters;
  WorkList list;
  int64_t dim = 0;
  ClusterSlots slots;               // in: Gram matrices; out: W, if wanted
  const double* squares = nullptr;  // items x slabs: for the noise floor
  int64_t slabs = 0;
  bool want_w = false;
  const int* finite = nullptr;  // groups with flag 0 get NaN and form -1; null: none
  double* norms = nullptr;      // all groups x k
  int64_t* forms = nullptr;     // all groups x k SavedForm, or null
  int* steep = nullptr;         // all groups x k, or null: flags of spectra for steep_clusters.cuh
  double steep_ratio = 0.0;
  int64_t shared = 0;  // doubles of dynamic shared memory
  int64_t shared_side = 0;
  double* workspace = nullptr;  // of large blocks
  int64_t block_space = 0;      // doubles
};

// Whether the block of its own that every cluster has can decompose this one.
__device__ __forceinline__ bool fits_block(const EigenArgs& p, int64_t n, int64_t m, int64_t shared,
                                           int64_t shared_side) {
  if (m <= shared_side) return true;
  return eigen_vectors(m) <= shared && (!p.want_w || 2 * m * m <= n * p.slots.width);
}

// Nuclear norm and W of one cluster. matrix: room for the eigenvectors, with leading dimension ld; it may be the
// Gram matrix itself.
__device__ __forceinline__ void decompose_cluster(const EigenArgs& p, int64_t item, const ClusterRef& own,
                                                  int64_t m64, double* matrix, int ld, double* vectors) {
  const int m = static_cast<int>(m64);
  double* gram = p.slots.at(p.clusters, own);
  double* values = vectors + eigen_scratch(m);
  double* scratch = values + eigen_even(m);
  double zeros = 0.0, repeated = 0.0;
  for (int64_t i = thread_id(); i < m; i += block_threads()) {
    const double square = gram[i * m + i];
    zeros += square == 0.0 ? 1.0 : 0.0;
    if (p.steep == nullptr || square == 0.0) continue;
    // Equal rows have equal products, to the last bit.
    bool again = false;
    for (int64_t j = 0; j < i && !again; ++j) again = gram[j * m + j] == square && gram[i * m + j] == square;
    repeated += again ? 1.0 : 0.0;
  }
  if (matrix != gram) {
    for (int i = warp_id(); i < m; i += block_warps()) {
      for (int j = lane_id(); j < m; j += kWarp) {
        matrix[static_cast<int64_t>(i) * ld + j] = gram[static_cast<int64_t>(i) * m + j];
      }
    }
  }
  block_sync();
  // Rows that sum to zero leave one singular value that vanishes; so does every row or feature that is all zero.
  const int null = static_cast<int>(block_sum(zeros, scratch)) + (own.n <= p.dim ? 1 : 0);
  double squares = 0.0;
  for (int64_t s = 0; s < p.slabs; ++s) squares += p.squares[item * p.slabs + s];
  const double floor = noise_floor(sqrt(squares / static_cast<double>(own.n)), own.n);
  block_eigen(matrix, m, ld, values, vectors, p.want_w);
  if (p.steep != nullptr) {
    // Repeated rows hide vanishing singular values, too, but they are no reason to look any closer.
    const int known = null + static_cast<int>(block_sum(repeated, scratch));
    const bool steep = block_is_steep(values, m, known, floor, p.steep_ratio, scratch);
    if (thread_id() == 0) p.steep[own.g * p.clusters.k + own.c] = steep ? 1 : 0;
  }
  const double norm = block_spectral(SpectralKind::kNuclearNorm, matrix, values, m, ld, null < m ? null : m,
                                     floor, p.want_w ? gram : nullptr, m, scratch);
  if (thread_id() == 0) {
    p.norms[own.g * p.clusters.k + own.c] = norm;
    if (p.forms != nullptr) {
      p.forms[own.g * p.clusters.k + own.c] =
          static_cast<int64_t>(p.want_w ? SavedForm::kGramSide : SavedForm::kNone);
    }
  }
  block_sync();
}

// One block a cluster.
static __global__ __launch_bounds__(256, 1) void cluster_eigen_kernel(EigenArgs p) {
  const int64_t item = p.list.item[blockIdx.x];
  const ClusterRef own(p.clusters, item);
  const bool poisoned = p.finite != nullptr && p.finite[own.g] == 0;
  if (poisoned || own.n < 2) {
    if (thread_id() != 0) return;
    p.norms[own.g * p.clusters.k + own.c] = poisoned ? static_cast<double>(NAN) : 0.0;
    if (p.forms != nullptr) p.forms[own.g * p.clusters.k + own.c] = poisoned ? -1 : 0;
    if (p.steep != nullptr) p.steep[own.g * p.clusters.k + own.c] = 0;
    return;
  }
  const int64_t m = cluster_side(own.n, p.dim, false);
  if (!fits_block(p, own.n, m, p.shared, p.shared_side)) return;
  auto* shared = reinterpret_cast<double*>(dynamic_shared());
  const bool inside = m <= p.shared_side;
  double* gram = p.slots.at(p.clusters, own);
  decompose_cluster(p, item, own, m,
                    inside     ? shared
                    : p.want_w ? gram + m * m
                               : gram,
                    inside ? eigen_ld(static_cast<int>(m)) : static_cast<int>(m),
                    inside ? shared + eigen_square(m) : shared);
}

// The few clusters that are too large for a block of their own: the first ones of the list.
static __global__ __launch_bounds__(512, 1) void large_cluster_eigen_kernel(EigenArgs p, int64_t small_shared) {
  double* space = p.workspace + blockIdx.x * p.block_space;
  auto* shared = reinterpret_cast<double*>(dynamic_shared());
  int64_t found = 0;
  for (int64_t i = 0; i < p.clusters.items(); ++i) {
    const int64_t item = p.list.item[i];
    const ClusterRef own(p.clusters, item);
    if (own.n < 2) return;
    const int64_t m = cluster_side(own.n, p.dim, false);
    if (m <= p.shared_side) return;  // as are all that follow
    if ((p.finite != nullptr && p.finite[own.g] == 0) || fits_block(p, own.n, m, small_shared, p.shared_side)) {
      continue;
    }
    if (found++ % gridDim.x != blockIdx.x) continue;
    const bool in_shared = eigen_vectors(m) <= p.shared;
    decompose_cluster(p, item, own, m, space, eigen_ld(static_cast<int>(m)),
                      in_shared ? shared : space + eigen_square(m));
  }
}

// Nuclear norms, and what their gradients need, of the clusters of groups group_begin .. + groups - 1.
template <class S>
struct ClusterNormArgs {
  FeatureView<S> x;
  Clusters clusters;   // indexed (run_cluster_index)
  ClusterSlots slots;  // (rows of these groups) x min(group_rows, d); needed as working memory without W too
  bool want_w = false;
  const int* finite = nullptr;  // one flag a group of all, or null
  double* norms = nullptr;      // all groups x k
  int64_t* forms = nullptr;     // all groups x k, or null
  int* steep = nullptr;         // all groups x k, or null: flags of spectra steeper than steep_ratio
  double steep_ratio = 0.0;
  int64_t gram_blocks = 2112;  // at most; blocks of the Gram kernel loop over tiles
  EigenPlan eigen;
};

// Bytes of run_cluster_norms' workspace.
inline int64_t cluster_norms_workspace(int64_t items, int64_t group_rows, int64_t dim, const EigenPlan& plan) {
  const int64_t list = ceil_div(work_list_workspace(items), 256) * 256;
  const int64_t side = group_rows < dim ? group_rows : dim;
  return list + ceil_div(static_cast<int64_t>(sizeof(double)) * items * (dim + cluster_slabs(dim)), 256) * 256 +
         eigen_workspace(plan, side);
}

template <class S>
void run_cluster_norms(const ClusterNormArgs<S>& a, void* workspace, cudaStream_t stream) {
  const Clusters& p = a.clusters;
  const int64_t items = p.items(), d = a.x.dim, slabs = cluster_slabs(d);
  const int64_t side = p.group_rows < d ? p.group_rows : d;
  auto* bytes = static_cast<unsigned char*>(workspace);
  const WorkList list = work_list_at(items, bytes);
  bytes += ceil_div(work_list_workspace(items), 256) * 256;
  auto* means = reinterpret_cast<double*>(bytes);
  double* squares = means + items * d;
  bytes += ceil_div(static_cast<int64_t>(sizeof(double)) * items * (d + slabs), 256) * 256;
  run_work_list(p, d, false, list, stream);
  run_cluster_means(a.x, p, 0.0, means, squares, stream);
  // No partition has more tiles than these.
  const int64_t largest = ceil_div(side, kGramTile);
  const int64_t bound = items + ceil_div(p.groups * p.group_rows, side) * largest * (largest + 1) / 2;
  launch(DSE_KERNEL(cluster_gram_kernel<S>),
         {grid_of(bound < a.gram_blocks ? bound : a.gram_blocks), kGramThreads, 0, stream}, a.x, p, list, means,
         a.slots);
  EigenArgs e;
  e.clusters = p;
  e.list = list;
  e.dim = d;
  e.slots = a.slots;
  e.squares = squares;
  e.slabs = slabs;
  e.want_w = a.want_w;
  e.finite = a.finite;
  e.norms = a.norms;
  e.forms = a.forms;
  e.steep = a.steep;
  e.steep_ratio = a.steep_ratio;
  e.shared_side = side < a.eigen.shared_side ? side : a.eigen.shared_side;
  EigenPlan plan = a.eigen;
  plan.shared_side = e.shared_side;
  e.shared = eigen_shared(plan);
  e.workspace = reinterpret_cast<double*>(bytes);
  e.block_space = eigen_square(side) + eigen_vectors(side);
  const auto threads = static_cast<unsigned>(plan.threads);
  const int64_t small_shared = e.shared;
  if (side > e.shared_side) {
    e.shared = plan.large_shared;
    launch(DSE_KERNEL(large_cluster_eigen_kernel),
           {grid_of(plan.large_blocks), 512, sizeof(double) * static_cast<size_t>(e.shared), stream}, e,
           small_shared);
    e.shared = small_shared;
  }
  launch(DSE_KERNEL(cluster_eigen_kernel),
         {grid_of(items), threads, sizeof(double) * static_cast<size_t>(e.shared), stream}, e);
}

}  // namespace dse::cuda
