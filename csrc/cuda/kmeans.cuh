// k-means++ and Lloyd iterations for many problems at once: one problem is a run of consecutive rows (an image,
// or the images of a group).
//
// The same draws, the same running sums of every centroid (rows in ascending order, only those that changed
// cluster), the same rules for ties, empty clusters and convergence as csrc/cpu/kmeans.cpp, so that float64 input
// gets the same labels. Points (x - shift) / scale are formed in float64 from the features as they are read,
// never stored.
//
// An iteration is two launches: `assign` (64 rows x 32 centroids a tile on the float64 tensor cores) and `update`
// (one block a cluster and slab of features: it lists the rows that came or left and adds them up, which after
// the first iteration is a small part of the rows). Sums of `update` need no partial sums and no order of blocks.
// Centroids, labels and the running minimum of k-means++ are held twice, so that a launch reads what the last one
// wrote. Whether a problem has converged is decided on the device, by every block of the next `assign` for
// itself: the number of launches depends on k and the number of iterations alone, and blocks of problems that are
// done return at once.
//
// Bytes and operations at (256, 196, 1024), bfloat16, 32 groups of 1568 rows, k = 24: every step of k-means++
// reads all features (103 MB, 24 us at 4.3 TB/s; 0.6 ms for 24), every assignment too (24 us, beside 2.5 GFLOP of
// tensor products, 37 us); an update reads them once in the first iteration and what changed later.
#pragma once

#include "common/rng.h"
#include "cuda/tiles.cuh"

namespace dse::cuda {

inline constexpr int64_t kSeedTiles = 1024;  // at most this many tiles a problem in k-means++
inline constexpr int kSeedFeatures = 1024;   // features of the newest centroid in shared memory
inline constexpr int kUpdateRows = 1024;     // rows that `update` looks through at a time
inline constexpr int64_t kShiftSample = 16;

// Resident blocks asked for; features of four or eight bytes, loaded in larger vectors, take more registers.
template <class S>
inline constexpr int kWideBlocks = sizeof(S) >= 4 ? 2 : 3 - kFewerBlocks;

template <class S>
struct KMeansArgs {
  FeatureView<S> x;
  bool unit_rows = false;     // the scales make every row's norm 1 (or leave it 0)
  int64_t rows = 0;           // of a problem; the last one may have fewer
  int64_t first_problem = 0;  // problems first_problem .. first_problem + problems - 1
  int64_t problems = 0;
  int64_t k = 0;  // of a problem with at least as many rows
  int64_t max_iters = 20;
  double tol = 1e-4;
  const int64_t* seed = nullptr;  // one number in device memory
  RngPurpose purpose = RngPurpose::kKMeansOp;
  const int* finite = nullptr;  // problem p is skipped where finite[p * finite_stride] is 0
  int64_t finite_stride = 0;
  int64_t* labels = nullptr;    // one for every row of x; 0 in skipped problems
  double* centroids = nullptr;  // of all problems, k x d each: infinite beyond a smaller problem's rows, NaN in
                                // skipped ones; may be null
  double* inertia = nullptr;    // of all problems: sum of squared distances; may be null
};

// Working memory, of the problems of one call.
struct KMeansState {
  double* shift;         // problems x d
  double* scale;         // problems
  double* extent;        // problems x tiles: partial results of a reduction
  int* stop;             // problems: 0 runs, t > 0 converged before assignment t, -1 is skipped
  double* centroids[2];  // problems x k x d
  double* sums;          // problems x k x d
  double* steps;         // problems x k x slabs: squared shift of the centroids
  int* labels[2];        // problems x rows
  double* nearest[2];    // problems x rows: squared distance from the nearest centroid so far
  double* totals[2];     // problems x tiles: its sum
  int64_t tile_rows;     // of k-means++
  int64_t tiles;
  int64_t slabs;
};

// Rows of one tile of k-means++.
inline int64_t seed_tile_rows(int64_t rows) {
  return ceil_div(ceil_div(rows, kSeedTiles), kTileRows) * kTileRows;
}

// Lays the working memory out from `base` on; returns its size in bytes.
inline int64_t kmeans_layout(int64_t problems, int64_t rows, int64_t dim, int64_t k, void* base,
                             KMeansState* state) {
  int64_t used = 0;
  const auto take = [&](int64_t count, int64_t bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(used);
    used += ceil_div(count * bytes, 256) * 256;
    return reinterpret_cast<void*>(at);
  };
  const auto doubles = [&](int64_t count) { return static_cast<double*>(take(count, sizeof(double))); };
  KMeansState s;
  s.tile_rows = seed_tile_rows(rows);
  s.tiles = ceil_div(rows, s.tile_rows);
  s.slabs = ceil_div(dim, kListSlab);
  s.shift = doubles(problems * dim);
  s.scale = doubles(problems);
  s.extent = doubles(problems * ceil_div(rows, kTileRows));
  s.stop = static_cast<int*>(take(problems, sizeof(int)));
  s.sums = doubles(problems * k * dim);
  s.steps = doubles(problems * k * s.slabs);
  for (int i = 0; i < 2; ++i) {
    s.centroids[i] = doubles(problems * k * dim);
    s.labels[i] = static_cast<int*>(take(problems * rows, sizeof(int)));
    s.nearest[i] = doubles(problems * rows);
    s.totals[i] = doubles(problems * s.tiles);
  }
  if (state != nullptr) *state = s;
  return used;
}

inline int64_t kmeans_workspace(int64_t problems, int64_t rows, int64_t dim, int64_t k) {
  return kmeans_layout(problems, rows, dim, k, nullptr, nullptr);
}

// One problem: p counts within the call.
template <class S>
struct KMeansProblem {
  int64_t p, first, n, k;

  __device__ __forceinline__ KMeansProblem(const KMeansArgs<S>& a, int64_t index) : p(index) {
    first = (a.first_problem + p) * a.rows;
    n = a.x.rows() - first < a.rows ? a.x.rows() - first : a.rows;
    k = a.k < n ? a.k : n;
  }
};

template <class S>
__device__ __forceinline__ RngStream stream_of(const KMeansArgs<S>& a, int64_t p) {
  return {static_cast<uint64_t>(*a.seed), a.purpose, static_cast<uint64_t>(a.first_problem + p)};
}

// shift: mean of a few rows from all over the problem, relative to the first row, so that equal rows have exactly
// their own value as the mean. One thread a feature.
template <class S>
__global__ __launch_bounds__(kTileThreads) void kmeans_shift_kernel(KMeansArgs<S> a, KMeansState s) {
  const int64_t parts = ceil_div(a.x.dim, kTileThreads);
  const KMeansProblem<S> q(a, blockIdx.x / parts);
  const int64_t f = blockIdx.x % parts * kTileThreads + thread_id();
  if (blockIdx.x % parts == 0 && thread_id() == 0) {
    const bool skip = a.finite[(a.first_problem + q.p) * a.finite_stride] == 0;
    s.stop[q.p] = skip ? -1 : 0;
    s.scale[q.p] = 1.0;
  }
  if (f >= a.x.dim) return;
  const int64_t sample = q.n < kShiftSample ? q.n : kShiftSample;
  const double origin = row_reader(a.x, q.first)(f);
  double sum = 0.0;
#pragma unroll 1
  for (int64_t i = 1; i < sample; ++i) sum += row_reader(a.x, q.first + i * q.n / sample)(f) - origin;
  s.shift[q.p * a.x.dim + f] = origin + sum / static_cast<double>(sample);
}

// Largest deviation from `shift` in a tile of rows.
template <class S>
__global__ __launch_bounds__(kTileThreads) void kmeans_extent_kernel(KMeansArgs<S> a, KMeansState s) {
  __shared__ double scratch[33];
  const int64_t tiles = ceil_div(a.rows, kTileRows), tile = blockIdx.x % tiles;
  const KMeansProblem<S> q(a, blockIdx.x / tiles);
  const double* shift = s.shift + q.p * a.x.dim;
  double most = 0.0;
  for (int r = warp_id(); r < kTileRows; r += kTileThreads / kWarp) {
    const int64_t i = tile * kTileRows + r;
    if (i >= q.n) break;
    const RowReader<S> row = row_reader(a.x, q.first + i);
#pragma unroll 4
    for (int64_t f = lane_id(); f < a.x.dim; f += kWarp) {
      const double size = fabs(row(f) - shift[f]);
      most = size > most ? size : most;
    }
  }
  most = block_max(most, scratch);
  if (thread_id() == 0) s.extent[blockIdx.x] = most;
}

// scale: the power of two below the largest deviation, by which division is exact.
template <class S>
__global__ __launch_bounds__(kTileThreads) void kmeans_scale_kernel(KMeansArgs<S> a, KMeansState s) {
  __shared__ double scratch[33];
  const int64_t tiles = ceil_div(a.rows, kTileRows);
  double most = 0.0;
  for (int64_t t = thread_id(); t < tiles; t += kTileThreads) {
    const double size = s.extent[blockIdx.x * tiles + t];
    most = size > most ? size : most;
  }
  most = block_max(most, scratch);
  if (thread_id() != 0) return;
  const double scale = most > 0.0 ? exp2(floor(log2(most))) : 1.0;
  s.scale[blockIdx.x] = scale > 0.0 ? scale : 2.2250738585072014e-308;
}

// What draws the next centroid of k-means++, in shared memory.
struct SeedShared {
  double totals[kSeedTiles];
  double distance[kTileThreads];
  double before, target;
  int64_t tile, chosen, last_positive;
};

// Row of the problem that becomes centroid c > 0: the first whose running sum of squared distances exceeds a
// uniform part of the total. Every thread returns it.
template <class S>
__device__ __forceinline__ int64_t draw_row(const KMeansArgs<S>& a, const KMeansState& s,
                                            const KMeansProblem<S>& q, int64_t c, SeedShared& shared) {
  const double* totals = s.totals[(c - 1) & 1] + q.p * s.tiles;
  const double* nearest = s.nearest[(c - 1) & 1] + q.p * a.rows;
  const int64_t tiles = ceil_div(q.n, s.tile_rows);
  for (int64_t t = thread_id(); t < tiles; t += kTileThreads) shared.totals[t] = totals[t];
  block_sync();
  if (thread_id() == 0) {
    const auto draw = static_cast<uint32_t>(c);
    double total = 0.0;
    for (int64_t t = 0; t < tiles; ++t) total += shared.totals[t];
    shared.tile = -1;
    shared.chosen = -1;
    shared.last_positive = -1;
    if (!(total > 0.0)) {
      shared.chosen = stream_of(a, q.p).below(draw, q.n);
    } else {
      shared.target = stream_of(a, q.p).uniform(draw) * total;
      double running = 0.0;
      for (int64_t t = 0; t < tiles; ++t) {
        if (!(shared.totals[t] > 0.0)) continue;
        shared.tile = t;  // rounding may put the target at the very end: the last tile with a distance then
        shared.before = running;
        running += shared.totals[t];
        if (running > shared.target) break;
      }
    }
  }
  block_sync();
  if (shared.tile < 0) return shared.chosen;
  const int64_t begin = shared.tile * s.tile_rows;
  const int64_t end = begin + s.tile_rows < q.n ? begin + s.tile_rows : q.n;
  for (int64_t base = begin; base < end; base += kTileThreads) {
    if (base + thread_id() < end) shared.distance[thread_id()] = nearest[base + thread_id()];
    block_sync();
    if (thread_id() == 0 && shared.chosen < 0) {
      double running = shared.before;
      for (int64_t i = base; i < end && i < base + kTileThreads; ++i) {
        const double distance = shared.distance[i - base];
        if (distance > 0.0) shared.last_positive = i;
        running += distance;
        if (running > shared.target) {
          shared.chosen = i;
          break;
        }
      }
      shared.before = running;
    }
    block_sync();
  }
  return shared.chosen >= 0 ? shared.chosen : shared.last_positive;
}

// Step c of k-means++: draws centroid c and brings every row's distance from the nearest centroid up to date.
template <class S>
__global__ __launch_bounds__(kTileThreads, kWideBlocks<S>) void kmeans_seed_kernel(KMeansArgs<S> a, KMeansState s,
                                                                                   int64_t c) {
  __shared__ SeedShared shared;
  __shared__ double centroid[kSeedFeatures];
  __shared__ double offset[kSeedFeatures];
  __shared__ RowList rows;
  constexpr int kOwn = kTileRows / (kTileThreads / kWarp);
  const int64_t tile = blockIdx.x % s.tiles, d = a.x.dim;
  const KMeansProblem<S> q(a, blockIdx.x / s.tiles);
  const bool last = c + 1 >= q.k;
  if (c >= q.k || s.stop[q.p] != 0 || tile * s.tile_rows >= q.n || (last && tile > 0)) return;
  const double inverse = 1.0 / s.scale[q.p];
  const double* shift = s.shift + q.p * d;
  const int64_t chosen = c == 0 ? stream_of(a, q.p).below(0, q.n) : draw_row(a, s, q, c, shared);
  const RowReader<S> newest = row_reader(a.x, q.first + chosen);
  if (tile == 0) {
    double* out = s.centroids[0] + (q.p * a.k + c) * d;
    for (int64_t f = thread_id(); f < d; f += kTileThreads) out[f] = __dmul_rn(newest(f) - shift[f], inverse);
  }
  if (last) return;

  const double* before = s.nearest[(c + 1) & 1] + q.p * a.rows;
  double* after = s.nearest[c & 1] + q.p * a.rows;
  const int64_t tile_end = (tile + 1) * s.tile_rows < q.n ? (tile + 1) * s.tile_rows : q.n;
  double total = 0.0;
  for (int64_t base = tile * s.tile_rows; base < tile_end; base += kTileRows) {
    double square[kOwn] = {};
    block_sync();
    if (thread_id() < kTileRows) {  // rows beyond the end are read as the first one, and left out below
      const int64_t i = base + thread_id() < tile_end ? base + thread_id() : base;
      rows.set(thread_id(), a.x, q.first + i, 1.0);
    }
    block_sync();
    for (int64_t f0 = 0; f0 < d; f0 += kSeedFeatures) {
      const int width = static_cast<int>(d - f0 < kSeedFeatures ? d - f0 : kSeedFeatures);
      if (f0 > 0 || base == tile * s.tile_rows || d > kSeedFeatures) {
        block_sync();
        for (int f = thread_id(); f < width; f += kTileThreads) {
          offset[f] = shift[f0 + f];
          centroid[f] = __dmul_rn(newest(f0 + f) - shift[f0 + f], inverse);
        }
        block_sync();
      }
      for (int f = lane_id(); f < width; f += kWarp) {
        S raw[kOwn];
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          raw[r] = a.x.data[rows.offset[warp_id() * kOwn + r] + (f0 + f) * a.x.stride_dim];
        }
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const double value = __dmul_rn(to_double(raw[r]), rows.scale[warp_id() * kOwn + r]);
          const double step = __dmul_rn(value - offset[f], inverse) - centroid[f];
          square[r] += step * step;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t i = base + warp_id() * kOwn + r;
      double distance = warp_sum(square[r]);
      if (i >= tile_end) continue;
      if (c > 0 && before[i] < distance) distance = before[i];
      if (lane_id() == 0) after[i] = distance;
      total += distance;
    }
  }
  block_sync();
  total = block_sum(lane_id() == 0 ? total : 0.0, shared.distance);
  if (thread_id() == 0) s.totals[c & 1][q.p * s.tiles + tile] = total;
}

// Assignment t of every row to its nearest centroid; the lowest index on ties.
template <class S>
__global__ __launch_bounds__(kTileThreads, kWideBlocks<S>) void kmeans_assign_kernel(KMeansArgs<S> a,
                                                                                     KMeansState s, int t) {
  __shared__ ScoreTile tile;
  __shared__ double scratch[33];
  const int64_t tiles = ceil_div(a.rows, kTileRows), begin = blockIdx.x % tiles * kTileRows;
  const KMeansProblem<S> q(a, blockIdx.x / tiles);
  const int stop = s.stop[q.p];
  if (begin >= q.n || (stop != 0 && stop < t)) return;
  const double scale = s.scale[q.p];
  if (t > 0) {
    double shift = 0.0;
    for (int64_t i = thread_id(); i < q.k * s.slabs; i += kTileThreads) shift += s.steps[q.p * a.k * s.slabs + i];
    shift = block_sum(shift, scratch);
    // The others may see the old value or the new one: both let them go on.
    if (sqrt(shift) * scale < a.tol && begin == 0 && thread_id() == 0) s.stop[q.p] = t;
  }
  const int64_t rows = q.n - begin < kTileRows ? q.n - begin : kTileRows;
  Candidate best;
  visit_scores(a.x, q.first + begin, rows, s.shift + q.p * a.x.dim, 1.0 / scale,
               s.centroids[t & 1] + q.p * a.k * a.x.dim, q.k, tile,
               [&](int64_t c, double value, double) { best.offer(value, c); });
  best.share();
  const int64_t own = warp_id() * 8 + lane_id() / 4;
  if (lane_id() % 4 == 0 && own < rows) {
    s.labels[t & 1][q.p * a.rows + begin + own] = static_cast<int>(best.index);
  }
}

struct UpdateShared {
  RowList list;
  int rows[kUpdateRows];  // those that came; ~row for those that left
  int scan[33];
  double scratch[33];
  double value[kListThreads];
  int index[kListThreads];
};

// Row that empty cluster c moves to. The first empty cluster takes the row that lies farthest from its own
// centroid (the first of several), the next one the next farthest. Rare: the block measures all rows by itself.
// Blocks that share the buffer of distances write the same values to it.
template <class S>
__device__ __forceinline__ int64_t farthest_row(const KMeansArgs<S>& a, const KMeansState& s, int64_t p,
                                                int64_t c, int t, UpdateShared& shared) {
  const KMeansProblem<S> q(a, p);
  const int64_t d = a.x.dim;
  const int* labels = s.labels[t & 1] + p * a.rows;
  double* distance = s.nearest[0] + p * a.rows;
  const double* centroids = s.centroids[t & 1] + p * a.k * d;
  const double* shift = s.shift + p * d;
  const double inverse = 1.0 / s.scale[p];
  // Empty clusters before this one.
  int64_t rank = 0;
  for (int64_t j = 0; j < c; ++j) {
    double found = 0.0;
    for (int64_t i = thread_id(); i < q.n; i += kListThreads) found = labels[i] == j ? 1.0 : found;
    if (block_max(found, shared.scratch) == 0.0) ++rank;
  }
  for (int64_t i = warp_id(); i < q.n; i += kListThreads / kWarp) {
    const RowReader<S> row = row_reader(a.x, q.first + i);
    const double* centroid = centroids + labels[i] * d;
    double square = 0.0;
    for (int64_t f = lane_id(); f < d; f += kWarp) {
      const double step = __dmul_rn(row(f) - shift[f], inverse) - centroid[f];
      square += step * step;
    }
    square = warp_sum(square);
    if (lane_id() == 0) distance[i] = square;
  }
  block_sync();
  double limit = 0.0;
  int64_t chosen = -1;
  for (int64_t round = 0; round <= rank; ++round) {
    double most = -1.0;
    int at = 0;
    for (int64_t i = thread_id(); i < q.n; i += kListThreads) {
      const double value = distance[i];
      const bool taken = chosen >= 0 && (value > limit || (value == limit && i <= chosen));
      if (taken || !(value > most)) continue;
      most = value;
      at = static_cast<int>(i);
    }
    shared.value[thread_id()] = most;
    shared.index[thread_id()] = at;
    block_sync();
    most = -1.0;
    for (int i = 0; i < kListThreads; ++i) {
      if (shared.value[i] > most || (shared.value[i] == most && shared.index[i] < at)) {
        most = shared.value[i];
        at = shared.index[i];
      }
    }
    limit = most;
    chosen = at;
    block_sync();
  }
  return chosen;
}

// Centroid c after assignment t, for one slab of features.
template <class S>
__global__ __launch_bounds__(kListThreads, 4) void kmeans_update_kernel(KMeansArgs<S> a, KMeansState s, int t) {
  __shared__ UpdateShared shared;
  constexpr int kShare = kUpdateRows / kListThreads;
  const int64_t per_problem = a.k * s.slabs;
  const KMeansProblem<S> q(a, blockIdx.x / per_problem);
  const int64_t c = blockIdx.x % per_problem / s.slabs, slab = blockIdx.x % s.slabs;
  if (c >= q.k || s.stop[q.p] != 0) return;
  const int64_t d = a.x.dim, at = (q.p * a.k + c) * d, slab_begin = slab * kListSlab;
  const int* now = s.labels[t & 1] + q.p * a.rows;
  const int* before = s.labels[(t + 1) & 1] + q.p * a.rows;
  const double inverse_scale = 1.0 / s.scale[q.p];
  double shift[kListFeatures] = {}, sum[kListFeatures] = {};
#pragma unroll
  for (int j = 0; j < kListFeatures; ++j) {
    const int64_t f = list_feature(slab_begin, j);
    if (f >= d) continue;
    shift[j] = s.shift[q.p * d + f];
    if (t > 0) sum[j] = s.sums[at + f];
  }
  int size = 0;
  for (int64_t base = 0; base < q.n; base += kUpdateRows) {
    int change[kShare], changes = 0;
#pragma unroll
    for (int r = 0; r < kShare; ++r) {
      const int64_t i = base + thread_id() * kShare + r;
      const bool in = i < q.n && now[i] == c;
      const bool was = t > 0 && i < q.n && before[i] == c;
      size += in ? 1 : 0;
      change[r] = in == was ? 0 : in ? 1 : -1;
      changes += in == was ? 0 : 1;
    }
    int total = 0;
    int place = block_exclusive_scan(changes, shared.scan, &total);
#pragma unroll
    for (int r = 0; r < kShare; ++r) {
      if (change[r] == 0) continue;
      const int i = thread_id() * kShare + r;
      shared.rows[place++] = change[r] > 0 ? i : ~i;
    }
    block_sync();
    for (int e0 = 0; e0 < total; e0 += kListRows) {
      const int count = total - e0 < kListRows ? total - e0 : kListRows;
      for (int e = thread_id(); e < count; e += kListThreads) {
        const int row = shared.rows[e0 + e];
        shared.list.set(e, a.x, q.first + base + (row >= 0 ? row : ~row), row >= 0 ? 1.0 : -1.0);
      }
      block_sync();
      for_each_listed(a.x, shared.list, count, slab_begin, [&](int j, double value, double sign) {
        sum[j] += sign * __dmul_rn(value - shift[j], inverse_scale);
      });
      block_sync();
    }
  }
  int members = 0;
  block_exclusive_scan(size, shared.scan, &members);
  RowReader<S> replacement;
  if (members == 0) replacement = row_reader(a.x, q.first + farthest_row(a, s, q.p, c, t, shared));
  const double inverse = members > 0 ? 1.0 / static_cast<double>(members) : 0.0;
  const double* old = s.centroids[t & 1] + at;
  double* fresh = s.centroids[(t + 1) & 1] + at;
  double moved = 0.0;
#pragma unroll
  for (int j = 0; j < kListFeatures; ++j) {
    const int64_t f = list_feature(slab_begin, j);
    if (f >= d) continue;
    const double value =
        members > 0 ? __dmul_rn(sum[j], inverse) : __dmul_rn(replacement(f) - shift[j], inverse_scale);
    const double step = value - old[f];
    moved += step * step;
    fresh[f] = value;
    s.sums[at + f] = sum[j];
  }
  moved = block_sum(moved, shared.scratch);
  if (thread_id() == 0) s.steps[q.p * per_problem + c * s.slabs + slab] = moved;
}

// Which of the two sets of labels and centroids is the last.
__device__ __forceinline__ int last_set(int stop, int64_t max_iters) {
  return static_cast<int>(stop > 0 ? stop : max_iters) & 1;
}

// Squared distances of a tile of rows from their centroids.
template <class S>
__global__ __launch_bounds__(kTileThreads) void kmeans_inertia_kernel(KMeansArgs<S> a, KMeansState s) {
  __shared__ double scratch[33];
  const int64_t tiles = ceil_div(a.rows, kTileRows), tile = blockIdx.x % tiles, d = a.x.dim;
  const KMeansProblem<S> q(a, blockIdx.x / tiles);
  const int stop = s.stop[q.p];
  if (stop < 0) return;
  const int set = last_set(stop, a.max_iters);
  const double* shift = s.shift + q.p * d;
  const double inverse = 1.0 / s.scale[q.p];
  double square = 0.0;
  for (int r = warp_id(); r < kTileRows; r += kTileThreads / kWarp) {
    const int64_t i = tile * kTileRows + r;
    if (i >= q.n) break;
    const RowReader<S> row = row_reader(a.x, q.first + i);
    const double* centroid = s.centroids[set] + (q.p * a.k + s.labels[set][q.p * a.rows + i]) * d;
#pragma unroll 4
    for (int64_t f = lane_id(); f < d; f += kWarp) {
      const double step = __dmul_rn(row(f) - shift[f], inverse) - centroid[f];
      square += step * step;
    }
  }
  square = block_sum(square, scratch);
  if (thread_id() == 0) s.extent[blockIdx.x] = square;
}

// Writes the results of one problem, spread over `parts` blocks.
template <class S>
__global__ __launch_bounds__(kTileThreads) void kmeans_finish_kernel(KMeansArgs<S> a, KMeansState s,
                                                                     int64_t parts) {
  __shared__ double scratch[33];
  const KMeansProblem<S> q(a, blockIdx.x / parts);
  const int64_t d = a.x.dim, part = blockIdx.x % parts, g = a.first_problem + q.p;
  const int stop = s.stop[q.p], set = last_set(stop, a.max_iters);
  const double scale = s.scale[q.p];
  for (int64_t i = part * kTileThreads + thread_id(); i < q.n; i += parts * kTileThreads) {
    a.labels[q.first + i] = stop < 0 ? 0 : s.labels[set][q.p * a.rows + i];
  }
  if (a.centroids != nullptr) {
    for (int64_t i = part * kTileThreads + thread_id(); i < a.k * d; i += parts * kTileThreads) {
      double value = static_cast<double>(INFINITY);
      if (i < q.k * d) {
        value = s.shift[q.p * d + i % d] + __dmul_rn(s.centroids[set][q.p * a.k * d + i], scale);
      }
      if (stop < 0) value = static_cast<double>(NAN);
      a.centroids[g * a.k * d + i] = value;
    }
  }
  if (a.inertia == nullptr || part != 0) return;
  const int64_t tiles = ceil_div(a.rows, kTileRows);
  double sum = 0.0;
  for (int64_t i = thread_id(); i < ceil_div(q.n, kTileRows); i += kTileThreads) sum += s.extent[q.p * tiles + i];
  sum = block_sum(sum, scratch);
  if (thread_id() == 0) a.inertia[g] = stop < 0 ? static_cast<double>(NAN) : sum * scale * scale;
}

// `workspace` has kmeans_workspace(...) bytes. 2 max_iters + k + 3 launches, two more for rows of any length, one
// more for the inertia.
template <class S>
void run_kmeans(const KMeansArgs<S>& a, void* workspace, cudaStream_t stream) {
  KMeansState s;
  kmeans_layout(a.problems, a.rows, a.x.dim, a.k, workspace, &s);
  const int64_t tiles = ceil_div(a.rows, kTileRows);
  const auto over = [&](int64_t blocks) { return Launch{grid_of(a.problems * blocks), kTileThreads, 0, stream}; };
  launch(DSE_KERNEL(kmeans_shift_kernel<S>), over(ceil_div(a.x.dim, kTileThreads)), a, s);
  if (!a.unit_rows) {
    launch(DSE_KERNEL(kmeans_extent_kernel<S>), over(tiles), a, s);
    launch(DSE_KERNEL(kmeans_scale_kernel<S>), over(1), a, s);
  }
  for (int64_t c = 0; c < a.k; ++c) launch(DSE_KERNEL(kmeans_seed_kernel<S>), over(s.tiles), a, s, c);
  for (int64_t t = 0; t < a.max_iters; ++t) {
    launch(DSE_KERNEL(kmeans_assign_kernel<S>), over(tiles), a, s, static_cast<int>(t));
    launch(DSE_KERNEL(kmeans_update_kernel<S>), {grid_of(a.problems * a.k * s.slabs), kListThreads, 0, stream}, a,
           s, static_cast<int>(t));
  }
  launch(DSE_KERNEL(kmeans_assign_kernel<S>), over(tiles), a, s, static_cast<int>(a.max_iters));
  if (a.inertia != nullptr) launch(DSE_KERNEL(kmeans_inertia_kernel<S>), over(tiles), a, s);
  const int64_t parts = ceil_div(a.k * a.x.dim > a.rows ? a.k * a.x.dim : a.rows, 8 * kTileThreads);
  launch(DSE_KERNEL(kmeans_finish_kernel<S>), over(parts), a, s, parts);
}

}  // namespace dse::cuda
