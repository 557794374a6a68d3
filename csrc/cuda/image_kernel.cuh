// The fused image kernel: everything local to one image of N <= 256 positions, one block of threads an image.
//
// Row norms; the image's mean; the Gram matrix of the rows centred about it; k-means++ and Lloyd on that matrix
// (d^2(i, c) = G_ii - 2 mean_{j in c} G_ij + mean_{j, l in c} G_jl: the features are not looked at again); the
// Gram matrices of the clusters, from rows centred about the cluster's own mean (centring G instead would cancel
// for tight clusters); their eigendecompositions; nuclear norms, and W_c = G_c^(-1/2) (pseudo-inverse), with
// which W_c X_c is the gradient. Always the n_c x n_c matrix, also for n_c > d.
//
// Layout: features go through shared memory 16 columns at a time, as centred float64, and every warp holds up to
// kTiles 16 x 16 tiles of the lower triangle in registers, summed by float64 tensor cores; the next columns are
// fetched meanwhile. Four tiles a warp are what 128 registers hold: N = 196 takes two passes over the features,
// which the L2 cache should still have. The triangle of G (N = 196: 154 KB) stays in shared memory for k-means,
// then gives its place to the clusters' matrices, several of which are decomposed side by side (cuda/eigen.cuh).
// What does not fit lies in a workspace in global memory, one per resident block: blocks loop over images.
//
// Cost at (256, 196, 1024) bfloat16, estimated: 103 MB from memory (24 us at 4.3 TB/s) and five more passes from
// the L2 cache; 1024 * 256 * (196^2 + 3 * 65^2) multiply-adds, half of them by symmetry: 14 Gflop, 0.2 ms at
// 67 TFLOP/s; the QL chains, 0.2 ms an image and two rounds of images on 132 multiprocessors: with them 0.6 ms.
#pragma once

#include <algorithm>

#include "common/problem.h"
#include "common/rng.h"
#include "cuda/eigen.cuh"
#include "cuda/features.cuh"

namespace dse::cuda {

inline constexpr int kImageRows = 256;              // largest N
inline constexpr int kImageColumns = 16;            // features in shared memory at a time
inline constexpr int kImageLd = 20;                 // of which four neighbouring rows are in different banks
inline constexpr int kImageThreads = 512;           // largest block
inline constexpr int kImageStaticBytes = 23 << 10;  // upper bound of the kernel's static shared memory

// How the kernel is launched for one shape; made by plan_image.
struct ImagePlan {
  int threads = 0;
  int64_t blocks = 0;
  int area = 0;             // doubles of shared memory for matrices
  int chunk = 0;            // doubles for features, and for the vectors of the eigensolver
  int64_t block_space = 0;  // doubles of workspace a block
  int64_t workspace() const { return blocks * block_space; }
  size_t shared_bytes() const { return sizeof(double) * static_cast<size_t>(area + chunk); }
};

// shared_limit: what a block may have (sharedMemPerBlockOptin); multiprocessors: of the device.
inline ImagePlan plan_image(int64_t images, int64_t positions, int64_t dim, size_t shared_limit,
                            int multiprocessors) {
  ImagePlan plan;
  const auto n = static_cast<int>(positions);
  // A thread holds two groups of four features: 2 * threads >= 4 * rows.
  plan.threads = n <= 64 ? 128 : n <= 128 ? 256 : kImageThreads;
  plan.chunk = std::max({(n + 16) * kImageLd, 12 * n + 12 * kEigenBatch, 4 * plan.threads});
  const int square = n * eigen_ld(n);
  const int room = static_cast<int>((shared_limit - kImageStaticBytes) / sizeof(double)) - plan.chunk;
  plan.area = std::min(square, room) / 2 * 2;
  const auto block_bytes = static_cast<int64_t>(plan.shared_bytes() + kImageStaticBytes);
  const int64_t resident = std::max<int64_t>(
      1, std::min<int64_t>(kImageThreads / plan.threads, static_cast<int64_t>(shared_limit) / block_bytes));
  plan.blocks = std::min(images, resident * multiprocessors);
  plan.block_space = kEigenBatch * dim + (square > plan.area ? square : 0);
  return plan;
}

template <class S>
struct ImageArguments {
  FeatureView<S> x;        // as given: its row_scale is not used
  int local_clusters = 1;  // at most N
  bool normalize = true;
  const int64_t* seed = nullptr;  // device; not read where labels are given
  bool labels_given = false;
  int max_iters = 20;
  double tol = 1e-4;
  double* row_scale = nullptr;  // out: B N
  int* finite = nullptr;        // cleared where a norm is not finite
  int64_t* labels = nullptr;    // B N, contiguous: in or out
  int64_t* sizes = nullptr;     // out: B k, or null
  double* norms = nullptr;      // out: B k, ||H X_c||_*, 0 where n_c < 2
  int64_t* forms = nullptr;     // out: B k SavedForm, or null
  // out, or null: W of cluster c of image i at (i N + offset_c) N, n_c x n_c without gaps; offset_c rows of the
  // image are in clusters before c, and the rows of a cluster are in their order in the image.
  double* slots = nullptr;
  // out, for steep_clusters.cuh, or null: which clusters (B k) are steeper than steep_ratio; the rows of the
  // whole batch in the order of their clusters (B N), and where in an image each cluster begins (B (k + 1)).
  int* steep = nullptr;
  double steep_ratio = 0.0;
  int64_t* order = nullptr;
  int64_t* offset = nullptr;
  double* workspace = nullptr;  // plan.workspace() doubles
};

namespace image_detail {

template <class S>
struct alignas(sizeof(S) * 4 < 16 ? sizeof(S) * 4 : 16) Four {
  S value[4];
};

// Rows of every centroid: the mean of the rows order[offset[c]] .. order[offset[c + 1] - 1], or one row alone.
struct Lists {
  int order[kImageRows], offset[kImageRows + 1], single[kImageRows], label[kImageRows];
};

struct Shared {
  // Here rather than in registers, which the Gram matrices need.
  double* mean;
  double* matrix_space;
  int64_t image;
  double scale[kImageRows], norm[kImageRows];  // row scales; norms after scaling
  double spare[kImageRows + 33];
  Lists lists[2];
  EigenBatch batch;
  // Rows in the feature chunk: which row of the image, and which matrix of the batch (-1: none).
  int row[kImageRows], matrix[kImageRows];
  int rows;
  int first[kEigenBatch], cluster[kEigenBatch];  // of a matrix: first row in the chunk
  int matrix_of[kImageRows];                     // of a cluster
  int next;
  int null[kEigenBatch], good[kEigenBatch];
  double floor[kEigenBatch];
  double* coefficient[kEigenBatch];
  double* slot[kEigenBatch];
};
static_assert(sizeof(Shared) <= kImageStaticBytes);

__device__ __forceinline__ int triangle(int i, int j) {
  return i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i;
}

template <class S>
struct Image {
  const ImageArguments<S>& args;
  Shared& sh;
  int area_size;
  bool aligned;  // four features can be loaded at once

  __device__ __forceinline__ double* area() const { return reinterpret_cast<double*>(dynamic_shared()); }
  __device__ __forceinline__ double* chunk() const { return area() + area_size; }
  __device__ __forceinline__ int positions() const { return static_cast<int>(args.x.inner); }
  __device__ __forceinline__ int dim() const { return static_cast<int>(args.x.dim); }
  __device__ __forceinline__ const S* row(int i) const {
    return args.x.data + sh.image * args.x.stride_outer + i * args.x.stride_inner;
  }
  // Features f .. f + 3 of a row; beyond the last one, the last one again.
  __device__ __forceinline__ Four<S> load(const S* row, int f) const {
    if (aligned) return *reinterpret_cast<const Four<S>*>(row + f);
    Four<S> out;
    const int last = dim() - 1;
#pragma unroll
    for (int u = 0; u < 4; ++u) out.value[u] = row[(f + u < last ? f + u : last) * args.x.stride_dim];
    return out;
  }

  // Norms without overflow or underflow of the squares, and scales; a warp a row.
  __device__ void measure_rows() const {
    const int n = positions(), d = dim(), lane = lane_id();
    for (int i = warp_id(); i < n; i += block_warps()) {
      const S* from = row(i);
      double squares = 0.0;
      for (int f = 4 * lane; f < d; f += 4 * kWarp) {
        const Four<S> four = load(from, f);
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const double value = f + u < d ? to_double(four.value[u]) : 0.0;
          squares += value * value;
        }
      }
      squares = warp_sum(squares);
      double norm = sqrt(squares);
      if (!(squares > 1e-280 && squares < 1e280)) {
        double largest = 0.0;
        bool bad = false;
        for (int f = lane; f < d; f += kWarp) {
          const double value = fabs(to_double(from[f * args.x.stride_dim]));
          bad = bad || !(value <= DBL_MAX);
          largest = fmax(largest, value);
        }
        largest = warp_max(largest);
        bad = __any_sync(kAllLanes, bad ? 1 : 0) != 0;
        double total = 0.0;
        if (largest > 0.0 && !bad) {
          for (int f = lane; f < d; f += kWarp) {
            const double ratio = to_double(from[f * args.x.stride_dim]) / largest;
            total += ratio * ratio;
          }
        }
        total = warp_sum(total);
        norm = bad ? NAN : largest * sqrt(total);
      }
      if (lane != 0) continue;
      const double scale = args.normalize ? 1.0 / (norm < kNormFloor ? kNormFloor : norm) : 1.0;
      if (!(norm <= DBL_MAX)) atomicAnd(args.finite, 0);
      sh.scale[i] = scale;
      sh.norm[i] = norm * scale;
      args.row_scale[sh.image * n + i] = scale;
    }
    block_sync();
  }

  // mean[q * d + f], relative to a matrix's first row, so that equal rows have exactly their own value as mean.
  __device__ void column_means() const {
    const int d = dim(), quads = (d + 3) / 4, items = sh.batch.count * quads;
    const int share = block_threads() / items;
    const int parts = share < 1 ? 1 : share > 16 ? 16 : share;
    for (int t = thread_id(); t < items * parts; t += block_threads()) {
      const int part = t / items, item = t % items, q = item / quads, f = item % quads * 4;
      const int first = sh.first[q], n = sh.batch.m[q], origin_row = sh.row[first];
      const Four<S> origin = load(row(origin_row), f);
      const double origin_scale = sh.scale[origin_row];
      double sum[4] = {};
      for (int r = part; r < n; r += parts) {
        const int i = sh.row[first + r];
        const Four<S> four = load(row(i), f);
        const double scale = sh.scale[i];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          sum[u] += to_double(four.value[u]) * scale - to_double(origin.value[u]) * origin_scale;
        }
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (parts > 1) chunk()[t * 4 + u] = sum[u];
        else if (f + u < d) sh.mean[q * d + f + u] = to_double(origin.value[u]) * origin_scale + sum[u] / n;
      }
    }
    block_sync();
    if (parts == 1) return;
    for (int t = thread_id(); t < items * 4; t += block_threads()) {
      const int item = t / 4, q = item / quads, f = item % quads * 4 + t % 4;
      double sum = 0.0;
      for (int part = 0; part < parts; ++part) sum += chunk()[part * items * 4 + t];
      const int origin = sh.row[sh.first[q]];
      if (f < d) {
        sh.mean[q * d + f] =
            to_double(row(origin)[f * args.x.stride_dim]) * sh.scale[origin] + sum / sh.batch.m[q];
      }
    }
    block_sync();
  }

  // Gram matrices of the batch's rows, centred about their means: packed lower triangles, or squares.
  template <int kTiles>
  __device__ void gram(bool packed) const {
    constexpr int kGroups = 2;
    const int d = dim(), lane = lane_id(), warps = block_warps();
    int tiles = 0;
    for (int q = 0; q < sh.batch.count; ++q) {
      const int blocks = (sh.batch.m[q] + 15) / 16;
      tiles += blocks * (blocks + 1) / 2;
    }
    // What this thread brings from memory: four features of up to two rows.
    const int column = thread_id() % 4 * 4;
    Four<S> fetched[kGroups] = {};
    const auto fetch = [&](int f) {
#pragma unroll
      for (int u = 0; u < kGroups; ++u) {
        const int r = (thread_id() + u * block_threads()) / 4;
        if (r < sh.rows && f + column < d) fetched[u] = load(row(sh.row[r]), f + column);
      }
    };
    const auto store = [&](int f) {
#pragma unroll
      for (int u = 0; u < kGroups; ++u) {
        const int r = (thread_id() + u * block_threads()) / 4;
        if (r >= sh.rows || sh.matrix[r] < 0) continue;
        double* to = chunk() + r * kImageLd + column;
        const double* centre = sh.mean + sh.matrix[r] * d + f + column;
        const double scale = sh.scale[sh.row[r]];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          to[v] = f + column + v < d ? to_double(fetched[u].value[v]) * scale - centre[v] : 0.0;
        }
      }
    };
    for (int begin = 0; begin < tiles; begin += warps * kTiles) {
      int places[kTiles], held = 0;  // in the chunk: of the left rows, and of the right ones above them
      double sum[kTiles][2][2][2] = {};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int tile = begin + t * warps + warp_id();
        places[t] = 0;
        if (tile >= tiles) continue;
        int q, bi, bj;
        locate(tile, &q, &bi, &bj);
        const int origin = (sh.first[q] + lane / 4) * kImageLd + lane % 4;
        places[t] = origin + bi * 16 * kImageLd + ((origin + bj * 16 * kImageLd) << 16);
        held = t + 1;
      }
      fetch(0);
      for (int f0 = 0; f0 < d; f0 += kImageColumns) {
        block_sync();
        store(f0);
        block_sync();
        if (f0 + kImageColumns < d) fetch(f0 + kImageColumns);
#pragma unroll
        for (int step = 0; step < kImageColumns; step += 4) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            if (t >= held) continue;
            const double* left = chunk() + (places[t] & 0xffff) + step;
            const double* right = chunk() + (places[t] >> 16) + step;
            const double a[2] = {left[0], left[8 * kImageLd]}, b[2] = {right[0], right[8 * kImageLd]};
#pragma unroll
            for (int u = 0; u < 2; ++u) {
#pragma unroll
              for (int w = 0; w < 2; ++w) mma_f64(sum[t][u][w], a[u], b[w]);
            }
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int tile = begin + t * warps + warp_id();
        if (tile >= tiles) continue;
        int q, bi, bj;
        locate(tile, &q, &bi, &bj);
        double* out = sh.batch.a[q];
        const int ld = sh.batch.ld[q];
#pragma unroll
        for (int part = 0; part < 8; ++part) {
          const int u = part / 4, w = part / 2 % 2, x = part % 2;
          const int r = bi * 16 + u * 8 + lane / 4, c = bj * 16 + w * 8 + 2 * (lane % 4) + x;
          if (r >= sh.batch.m[q] || c > r) continue;
          const double value = sum[t][u][w][x];
          if (packed) {
            out[triangle(r, c)] = value;
          } else {
            out[r * ld + c] = value;
            out[c * ld + r] = value;
          }
        }
      }
    }
    block_sync();
  }

  // Tile -> matrix of the batch, block row, block column.
  __device__ __forceinline__ void locate(int tile, int* q, int* bi, int* bj) const {
    *q = 0;
    for (;; ++*q) {
      const int blocks = (sh.batch.m[*q] + 15) / 16, tiles = blocks * (blocks + 1) / 2;
      if (tile < tiles) break;
      tile -= tiles;
    }
    *bi = 0;
    while ((*bi + 1) * (*bi + 2) / 2 <= tile) ++*bi;
    *bj = tile - *bi * (*bi + 1) / 2;
  }

  // k-means++ (Arthur & Vassilvitskii 2007) by the first warp; a lane has eight consecutive rows.
  __device__ void seed_centroids(const double* g, int k, const RngStream& rng, int* single) const {
    constexpr int kOwn = kImageRows / kWarp;
    const int n = positions(), lane = lane_id();
    double nearest[kOwn];
#pragma unroll
    for (int u = 0; u < kOwn; ++u) nearest[u] = DBL_MAX;
    auto chosen = static_cast<int>(rng.below(0, n));
    for (int c = 0;; ++c) {
      if (lane == 0) single[c] = chosen;
      if (c + 1 == k) break;
      const double own = g[triangle(chosen, chosen)];
      double sum = 0.0;
#pragma unroll
      for (int u = 0; u < kOwn; ++u) {
        const int i = lane * kOwn + u;
        if (i >= n) {
          nearest[u] = 0.0;
          continue;
        }
        const double distance = fmax(g[triangle(i, i)] + own - 2.0 * g[triangle(i, chosen)], 0.0);
        nearest[u] = distance < nearest[u] ? distance : nearest[u];
        sum += nearest[u];
      }
      double before = sum;  // prefix sums over lanes
#pragma unroll
      for (int delta = 1; delta < kWarp; delta *= 2) {
        const double lower = shuffle_idx(before, lane - delta < 0 ? lane : lane - delta);
        if (lane >= delta) before += lower;
      }
      const double total = shuffle_idx(before, kWarp - 1);
      before = shuffle_idx(before, lane > 0 ? lane - 1 : 0);
      const auto draw = static_cast<uint32_t>(c + 1);
      if (!(total > 0.0)) {
        chosen = static_cast<int>(rng.below(draw, n));
        continue;
      }
      const double target = rng.uniform(draw) * total;
      double running = lane > 0 ? before : 0.0;
      int pick = kImageRows, last_positive = 0;
#pragma unroll
      for (int u = 0; u < kOwn; ++u) {
        const int i = lane * kOwn + u;
        running += nearest[u];
        if (nearest[u] > 0.0) last_positive = i;
        if (running > target && pick == kImageRows && i < n) pick = i;
      }
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const int other = shuffle_xor(pick, mask), other_last = shuffle_xor(last_positive, mask);
        pick = other < pick ? other : pick;
        last_positive = other_last > last_positive ? other_last : last_positive;
      }
      chosen = pick < n ? pick : last_positive;  // rounding put the target at the very end
    }
  }

  // Counting sort by label; keeps the order of rows within a cluster.
  __device__ void build_lists(Lists& lists, int k) const {
    const int n = positions();
    for (int i = thread_id(); i < n; i += block_threads()) {
      const int label = lists.label[i];
      int at = 0;
      for (int j = 0; j < n; ++j) at += lists.label[j] < label || (lists.label[j] == label && j < i) ? 1 : 0;
      lists.order[at] = i;
    }
    for (int c = thread_id(); c <= k; c += block_threads()) {
      int before = 0;
      for (int j = 0; j < n; ++j) before += lists.label[j] < c ? 1 : 0;
      lists.offset[c] = before;
      if (c < k) lists.single[c] = -1;
    }
    block_sync();
  }

  // <x_i, centroid c>
  static __device__ double product(const double* g, const Lists& lists, int c, int i) {
    const int alone = lists.single[c];
    if (alone >= 0) return g[triangle(i, alone)];
    const int begin = lists.offset[c], end = lists.offset[c + 1];
    double sum[4] = {};
    int p = begin;
    for (; p + 3 < end; p += 4) {
#pragma unroll
      for (int u = 0; u < 4; ++u) sum[u] += g[triangle(i, lists.order[p + u])];
    }
    for (; p < end; ++p) sum[0] += g[triangle(i, lists.order[p])];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) / (end - begin);
  }

  // Nearest centroid of every row (lowest index on ties) into label; squared distances less ||x||^2 into score.
  // `sorted`: some centroid is a mean, the lists hold all rows.
  __device__ void assign(const double* g, const Lists& lists, bool sorted, int k, int* label,
                         double* score) const {
    const int n = positions();
    double* half_norm = chunk() + n;
    double* own = half_norm + n;
    double* best = own + n;
    const int segments = block_threads() >= 2 * n ? 2 : 1;
    int* best_at = reinterpret_cast<int*>(best + segments * n);
    if (sorted) {
      for (int p = thread_id(); p < n; p += block_threads()) {
        const int i = lists.order[p], c = lists.label[i];
        own[p] = lists.single[c] >= 0 ? 0.0 : product(g, lists, c, i);
      }
      block_sync();
    }
    for (int c = warp_id(); c < k; c += block_warps()) {
      const int alone = lists.single[c];
      double sum = 0.0;
      if (alone < 0) {
        const int begin = lists.offset[c], end = lists.offset[c + 1];
        for (int p = begin + lane_id(); p < end; p += kWarp) sum += own[p];
        sum = warp_sum(sum) / (end - begin);
      } else {
        sum = g[triangle(alone, alone)];
      }
      if (lane_id() == 0) half_norm[c] = 0.5 * sum;
    }
    block_sync();
    for (int t = thread_id(); t < n * segments; t += block_threads()) {
      const int i = t % n;
      int at = k;
      double value = 0.0;
      for (int c = t / n; c < k; c += segments) {
        const double other = half_norm[c] - product(g, lists, c, i);
        if (at == k || other < value) {
          value = other;
          at = c;
        }
      }
      best[t] = value;
      best_at[t] = at;
    }
    block_sync();
    for (int i = thread_id(); i < n; i += block_threads()) {
      int at = best_at[i];
      double value = best[i];
      if (segments == 2 && best_at[n + i] < k) {
        const double other = best[n + i];
        if (other < value || (other == value && best_at[n + i] < at)) {
          value = other;
          at = best_at[n + i];
        }
      }
      label[i] = at;
      score[i] = 2.0 * value;
    }
    block_sync();
  }

  // Empty clusters, in their order, move to the rows farthest from their own centroids (the first one on ties);
  // a row that one took is out of the others' reach. The first warp.
  __device__ void replace_empty(const double* g, Lists& lists, int k, double* score) const {
    const int n = positions(), lane = lane_id();
    bool measured = false;
    for (int c = 0; c < k; ++c) {
      if (lists.offset[c + 1] > lists.offset[c]) continue;
      if (!measured) {
        for (int i = lane; i < n; i += kWarp) score[i] = fmax(score[i] + g[triangle(i, i)], 0.0);
        measured = true;
        warp_sync();
      }
      int at = n;
      double farthest = -2.0;
      for (int i = lane; i < n; i += kWarp) {
        if (!(score[i] > farthest)) continue;
        farthest = score[i];
        at = i;
      }
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const double other = shuffle_xor(farthest, mask);
        const int other_at = shuffle_xor(at, mask);
        if (other > farthest || (other == farthest && other_at < at)) {
          farthest = other;
          at = other_at;
        }
      }
      at = at < n ? at : 0;
      warp_sync();
      if (lane == 0) {
        lists.single[c] = at;
        score[at] = -1.0;
      }
      warp_sync();
    }
  }

  // Squared Frobenius norm of the centroids' shift, sum_c delta^T G delta with delta the difference of the two
  // sets of weights: terms vanish where a cluster keeps its rows, so nothing large cancels.
  __device__ double squared_shift(const double* g, const Lists& now, const Lists& before, bool sorted,
                                  int k) const {
    const int n = positions();
    double part = 0.0;
    for (int t = thread_id(); t < 2 * (n + k); t += block_threads()) {
      const bool old = t >= n + k;
      const Lists& lists = old ? before : now;
      const int at = old ? t - n - k : t;
      if (old && at < n && !sorted) continue;
      int c, i;
      if (at < n) {
        i = lists.order[at];
        c = lists.label[i];
        if (lists.single[c] >= 0) continue;
      } else {
        c = at - n;
        i = lists.single[c];
        if (i < 0) continue;
      }
      const double step = product(g, now, c, i) - product(g, before, c, i);
      const double share = at < n ? step / (lists.offset[c + 1] - lists.offset[c]) : step;
      part += old ? -share : share;
    }
    return block_sum(part, sh.spare);
  }

  // Labels of the k-means into sh.lists[0].label.
  __device__ void kmeans(const double* g, int k) const {
    const int n = positions();
    const RngStream rng{static_cast<uint64_t>(*args.seed), RngPurpose::kLocalKMeans,
                        static_cast<uint64_t>(sh.image)};
    double* score = chunk();
    int now = 0;  // the lists of the centroids
    if (warp_id() == 0) seed_centroids(g, k, rng, sh.lists[now].single);
    block_sync();
    bool sorted = false;
    for (int iteration = 0; iteration < args.max_iters; ++iteration) {
      Lists& next = sh.lists[now ^ 1];
      assign(g, sh.lists[now], sorted, k, next.label, score);
      build_lists(next, k);
      if (warp_id() == 0) replace_empty(g, next, k, score);
      block_sync();
      const double shift = squared_shift(g, next, sh.lists[now], sorted, k);
      now ^= 1;
      sorted = true;
      if (sqrt(fmax(shift, 0.0)) < args.tol) break;
    }
    Lists& last = sh.lists[now ^ 1];
    assign(g, sh.lists[now], sorted, k, last.label, score);
    if (now == 0) {
      for (int i = thread_id(); i < n; i += block_threads()) sh.lists[0].label[i] = last.label[i];
      block_sync();
    }
  }

  __device__ void describe_all_rows(double* g) const {
    const int n = positions();
    for (int i = thread_id(); i < n; i += block_threads()) {
      sh.row[i] = i;
      sh.matrix[i] = 0;
    }
    if (thread_id() == 0) {
      sh.rows = n;
      sh.first[0] = 0;
      sh.batch.count = 1;
      sh.batch.m[0] = n;
      sh.batch.ld[0] = n;
      sh.batch.a[0] = g;
    }
    block_sync();
  }

  // The next clusters whose matrices fit into shared memory together; one that does not fit at all goes alone.
  __device__ void next_batch(int k) const {
    const Lists& lists = sh.lists[0];
    const int n = positions();
    block_sync();
    if (thread_id() == 0) {
      const int limit = block_warps() < kEigenBatch ? block_warps() : kEigenBatch;
      EigenBatch& b = sh.batch;
      int used = 0, work = 0, c = sh.next;
      b.count = 0;
      sh.rows = 0;
      for (; c < k && b.count < limit; ++c) {
        const int begin = lists.offset[c], m = lists.offset[c + 1] - begin, size = m * eigen_ld(m);
        const int64_t out = sh.image * k + c;
        const bool fits = size <= area_size;
        if (m >= 2 && b.count > 0 && used + size > area_size) break;
        if (args.sizes != nullptr) args.sizes[out] = m;
        if (args.forms != nullptr) {
          const bool kept = m >= 2 && args.slots != nullptr;
          args.forms[out] = static_cast<int64_t>(kept ? SavedForm::kGramSide : SavedForm::kNone);
        }
        sh.matrix_of[c] = -1;
        if (m < 2) {
          args.norms[out] = 0.0;
          if (args.steep != nullptr) args.steep[out] = 0;
          continue;
        }
        const int q = b.count++;
        if (q == 0) sh.next = begin;
        sh.matrix_of[c] = q;
        sh.cluster[q] = c;
        sh.first[q] = begin - sh.next;
        sh.rows = sh.first[q] + m;
        b.m[q] = m;
        b.ld[q] = eigen_ld(m);
        b.a[q] = fits ? area() + used : sh.matrix_space;
        b.work[q] = chunk() + work;
        sh.slot[q] = args.slots != nullptr ? args.slots + (sh.image * n + begin) * n : nullptr;
        sh.coefficient[q] = b.work[q];
        used = fits ? used + size : area_size;
        work += eigen_scratch(m);
      }
      // The rows' list below needs the first row's place; the loop, where to go on.
      sh.null[0] = c;
    }
    block_sync();
    const int begin = sh.next, resume = sh.null[0];
    for (int r = thread_id(); r < sh.rows; r += block_threads()) {
      const int i = lists.order[begin + r];
      sh.row[r] = i;
      sh.matrix[r] = sh.matrix_of[lists.label[i]];
    }
    block_sync();
    if (thread_id() == 0) sh.next = resume;
  }

  // What is known of the spectra beforehand; a warp a matrix.
  __device__ void inspect_batch() const {
    const EigenBatch& b = sh.batch;
    for (int q = warp_id(); q < b.count; q += block_warps()) {
      const int m = b.m[q];
      const double* a = b.a[q];
      const int ld = b.ld[q];
      double trace = 0.0, squares = 0.0;
      int repeated = 0;
      bool zero = false;
      for (int i = lane_id(); i < m; i += kWarp) {
        const double value = a[i * ld + i], norm = sh.norm[sh.row[sh.first[q] + i]];
        trace += value;
        squares += norm * norm;
        zero = zero || value == 0.0;
        // Equal rows have equal products, to the last bit.
        bool again = false;
        for (int j = 0; j < i && !again; ++j) again = a[j * ld + j] == value && a[i * ld + j] == value;
        repeated += again ? 1 : 0;
      }
      trace = warp_sum(trace);
      squares = warp_sum(squares);
      repeated = static_cast<int>(warp_sum(static_cast<double>(repeated)));
      zero = __any_sync(kAllLanes, zero ? 1 : 0) != 0;
      if (lane_id() != 0) continue;
      // The rows sum to zero; repeated rows (masked tokens, for one) and a zero row hide one more each; beyond d
      // rows nothing is left.
      int known = repeated + (zero ? 2 : 1);
      known = known > m - dim() ? known : m - dim();
      sh.null[q] = known < m ? known : m;
      sh.good[q] = fabs(trace) <= DBL_MAX ? 1 : 0;
      sh.floor[q] = noise_floor(sqrt(squares / m), m);
    }
    block_sync();
  }

  template <int kTiles>
  __device__ void run() const {
    const int n = positions(), k = args.local_clusters;
    measure_rows();
    if (args.labels_given) {
      for (int i = thread_id(); i < n; i += block_threads()) {
        const int64_t label = args.labels[sh.image * n + i];
        // Out of range is an error that is reported elsewhere; here it must not reach beyond the arrays.
        sh.lists[0].label[i] = label < 0 ? 0 : label < k ? static_cast<int>(label) : k - 1;
      }
    } else {
      double* g = n * (n + 1) / 2 <= area_size ? area() : sh.matrix_space;
      describe_all_rows(g);
      column_means();
      gram<kTiles>(true);
      kmeans(g, k);
      for (int i = thread_id(); i < n; i += block_threads()) args.labels[sh.image * n + i] = sh.lists[0].label[i];
    }
    block_sync();
    build_lists(sh.lists[0], k);
    if (args.steep != nullptr) {
      const Lists& lists = sh.lists[0];
      for (int i = thread_id(); i < n; i += block_threads()) {
        args.order[sh.image * n + i] = sh.image * n + lists.order[i];
      }
      for (int c = thread_id(); c <= k; c += block_threads())
        args.offset[sh.image * (k + 1) + c] = lists.offset[c];
    }
    if (thread_id() == 0) sh.next = 0;
    for (;;) {
      next_batch(k);
      if (sh.batch.count == 0) break;
      column_means();
      gram<kTiles>(false);
      inspect_batch();
      block_eigen(sh.batch, args.slots != nullptr);
      for (int q = 0; q < sh.batch.count; ++q) {
        double* values = sh.batch.diagonal(q);
        if (args.steep != nullptr) {
          const bool steep =
              block_is_steep(values, sh.batch.m[q], sh.null[q], sh.floor[q], args.steep_ratio, sh.spare);
          if (thread_id() == 0) args.steep[sh.image * k + sh.cluster[q]] = steep ? 1 : 0;
        }
        double value = block_spectral_weights(SpectralKind::kNuclearNorm, values, sh.batch.m[q], sh.null[q],
                                              sh.floor[q], sh.spare);
        if (sh.good[q] == 0) {
          for (int i = thread_id(); i < sh.batch.m[q]; i += block_threads()) values[i] = NAN;
          value = NAN;
        }
        if (thread_id() == 0) args.norms[sh.image * k + sh.cluster[q]] = value;
      }
      block_sync();
      if (args.slots != nullptr) block_projectors(sh.batch, sh.coefficient, sh.slot, sh.batch.m);
    }
  }
};

template <class S, int kTiles>
__global__ void __launch_bounds__(kImageThreads, 1)
    image_kernel(ImageArguments<S> args, int area_size, int64_t block_space) {
  __shared__ Shared sh;
  const FeatureView<S>& x = args.x;
  constexpr auto kAlign = static_cast<int64_t>(alignof(Four<S>));
  const bool aligned = x.stride_dim == 1 && x.dim % 4 == 0 && x.stride_outer % 4 == 0 &&
                       x.stride_inner % 4 == 0 && reinterpret_cast<uintptr_t>(x.data) % kAlign == 0;
  if (thread_id() == 0) {
    sh.mean = args.workspace + static_cast<int64_t>(blockIdx.x) * block_space;
    sh.matrix_space = sh.mean + kEigenBatch * x.dim;
    sh.image = blockIdx.x;
  }
  block_sync();
  const Image<S> image{args, sh, area_size, aligned};
  while (sh.image < x.outer) {
    image.template run<kTiles>();
    block_sync();
    if (thread_id() == 0) sh.image += gridDim.x;
    block_sync();
  }
}

}  // namespace image_detail

// Runs the kernel; N <= kImageRows, `plan` from plan_image for the same shape.
template <class S, int kTiles = (sizeof(S) > 4 ? 3 : 4)>
void run_image_kernel(const ImageArguments<S>& args, const ImagePlan& plan, cudaStream_t stream) {
  launch(DSE_KERNEL(image_detail::image_kernel<S, kTiles>),
         {dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(plan.threads)),
          plan.shared_bytes(), stream},
         args, plan.area, plan.block_space);
}

}  // namespace dse::cuda
