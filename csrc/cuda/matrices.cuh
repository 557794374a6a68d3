// Matrices of equally many rows of the features: the whole batch, every image, or the positions of permuted
// images. Lists of their rows, gathers, and effective ranks of small ones.
//
// A list of such matrices is a partition with one cluster a group (clusters.cuh), whose kernels give means and
// Gram matrices. Gathers move n d elements once and are bound by memory; an effective rank of side m <= 128 is
// one decomposition in shared memory (eigen.cuh), as many at a time as there are multiprocessors.
#pragma once

#include "common/rng.h"
#include "cuda/clusters.cuh"

namespace dse::cuda {

inline constexpr int kMatrixThreads = 256;

// One cluster a group, of all its n rows. order: fills it with the rows in their order (null: it is there).
static __global__ __launch_bounds__(kMatrixThreads) void whole_groups_kernel(int64_t groups, int64_t n,
                                                                             int64_t* offset, int64_t* sizes,
                                                                             int64_t* order) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMatrixThreads + thread_id();
  if (i < groups) {
    offset[2 * i] = 0;
    offset[2 * i + 1] = n;
    sizes[i] = n;
  }
  if (order != nullptr && i < groups * n) order[i] = i;
}

inline void run_whole_groups(int64_t groups, int64_t n, int64_t* offset, int64_t* sizes, int64_t* order,
                             cudaStream_t stream) {
  launch(DSE_KERNEL(whole_groups_kernel),
         {grid_of(ceil_div(groups * n, kMatrixThreads)), kMatrixThreads, 0, stream}, groups, n, offset, sizes,
         order);
}

// rows[j * B + b] = the row of image b that stands at position j after a random permutation of its positions
// (Fisher and Yates). A thread an image: neighbouring images are neighbouring words.
static __global__ __launch_bounds__(kMatrixThreads) void permute_positions_kernel(const int64_t* seed,
                                                                                  int64_t images,
                                                                                  int64_t positions,
                                                                                  int64_t* rows) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kMatrixThreads + thread_id();
  if (b >= images) return;
  const RngStream rng{static_cast<uint64_t>(*seed), RngPurpose::kPermutation, static_cast<uint64_t>(b)};
  for (int64_t j = 0; j < positions; ++j) rows[j * images + b] = b * positions + j;
  for (int64_t j = positions - 1; j > 0; --j) {
    const int64_t other = rng.below(static_cast<uint32_t>(j), j + 1);
    const int64_t kept = rows[j * images + b];
    rows[j * images + b] = rows[other * images + b];
    rows[other * images + b] = kept;
  }
}

inline void run_permute_positions(const int64_t* seed, int64_t images, int64_t positions, int64_t* rows,
                                  cudaStream_t stream) {
  launch(DSE_KERNEL(permute_positions_kernel),
         {grid_of(ceil_div(images, kMatrixThreads)), kMatrixThreads, 0, stream}, seed, images, positions, rows);
}

// out row i = row order[i] of x, less the mean of the group of `group_rows` rows that it belongs to. order: null
// for row begin + i; means: null for none. One block a row.
template <class S>
__global__ __launch_bounds__(kMatrixThreads) void gather_rows_kernel(FeatureView<S> x, const int64_t* order,
                                                                     int64_t begin, const double* means,
                                                                     int64_t group_rows, double* out) {
  const int64_t i = blockIdx.x, d = x.dim;
  const RowReader<S> row = row_reader(x, order != nullptr ? order[i] : begin + i);
  const double* mean = means != nullptr ? means + i / group_rows * d : nullptr;
  for (int64_t f = thread_id(); f < d; f += kMatrixThreads) {
    out[i * d + f] = row(f) - (mean != nullptr ? mean[f] : 0.0);
  }
}

template <class S>
void run_gather_rows(const FeatureView<S>& x, const int64_t* order, int64_t begin, int64_t count,
                     const double* means, int64_t group_rows, double* out, cudaStream_t stream) {
  launch(DSE_KERNEL(gather_rows_kernel<S>), {grid_of(count), kMatrixThreads, 0, stream}, x, order, begin, means,
         group_rows, out);
}

// out = weight of the group * rows, in the type of the features; NaN in groups of form `bad`.
template <class S>
__global__ __launch_bounds__(kMatrixThreads) void store_weighted_kernel(const double* rows, int64_t count,
                                                                        int64_t group_elements,
                                                                        const double* weights,
                                                                        const int64_t* forms, int64_t bad,
                                                                        S* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMatrixThreads + thread_id();
  if (i >= count) return;
  const int64_t g = i / group_elements;
  out[i] = from_double<S>(forms[g] == bad ? static_cast<double>(NAN) : weights[g] * rows[i]);
}

// Effective ranks of Gram matrices.
struct GramRanks {
  int64_t n = 0, dim = 0;  // of every matrix
  bool center = false;
  double* grams = nullptr;  // m x m, one every gram_stride elements; m = min(n, dim)
  int64_t gram_stride = 0;
  const double* squares = nullptr;  // slabs numbers a matrix: its rows' squares before centring; null: the trace
  int64_t slabs = 0;
  const int* finite = nullptr;  // flag of matrix p: finite[p * finite_stride]
  int64_t finite_stride = 0;
  double* values = nullptr;
  double* w = nullptr;   // m x m a matrix, or null
  int* steep = nullptr;  // out, or null: flags of spectra that a Gram matrix does not hold (steep.cuh)
  double steep_ratio = 0.0;
};

// What is known of the spectrum of matrix p, the same in all threads: eigenvalues that vanish by construction,
// and the level below which singular values are rounding. False where it is not finite.
__device__ __forceinline__ bool inspect_gram(const GramRanks& r, int64_t p, double* scratch, int* null,
                                             double* floor) {
  const int64_t m = r.n < r.dim ? r.n : r.dim;
  double* gram = r.grams + p * r.gram_stride;
  double squares = 0.0;
  if (r.squares != nullptr) {
    for (int64_t s = 0; s < r.slabs; ++s) squares += r.squares[p * r.slabs + s];
    // One row has no tiles of products: its square is the matrix.
    if (r.n == 1 && thread_id() == 0) gram[0] = r.center ? 0.0 : squares;
    block_sync();
  }
  double trace = 0.0, zeros = 0.0;
  for (int64_t i = thread_id(); i < m; i += block_threads()) {
    trace += gram[i * m + i];
    zeros += gram[i * m + i] == 0.0 ? 1.0 : 0.0;
  }
  trace = block_sum(trace, scratch);
  zeros = block_sum(zeros, scratch);
  if (r.squares == nullptr) squares = trace;
  const int known = static_cast<int>(zeros) + (r.center && r.n <= r.dim ? 1 : 0);
  *null = known < m ? known : static_cast<int>(m);
  *floor = noise_floor(sqrt(squares / static_cast<double>(r.n)), r.n);
  return trace - trace == 0.0;
}

// One block a matrix of side m <= 128.
static __global__ __launch_bounds__(kMatrixThreads, 1) void small_rank_kernel(GramRanks r) {
  __shared__ double sums[33];
  const int64_t p = blockIdx.x;
  const int m = static_cast<int>(r.n < r.dim ? r.n : r.dim), ld = eigen_ld(m);
  double* matrix = reinterpret_cast<double*>(dynamic_shared());
  double* vectors = matrix + eigen_square(m);
  double* values = vectors + eigen_scratch(m);
  double* scratch = values + eigen_even(m);
  double* w = r.w != nullptr ? r.w + p * m * m : nullptr;
  const bool poisoned = r.finite[p * r.finite_stride] == 0;
  int null = 0;
  double floor = 0.0;
  const bool good = inspect_gram(r, p, sums, &null, &floor);
  if (poisoned || !good) {
    if (thread_id() == 0) {
      r.values[p] = static_cast<double>(NAN);
      if (r.steep != nullptr) r.steep[p] = 0;
    }
    if (w == nullptr) return;
    for (int i = thread_id(); i < m * m; i += kMatrixThreads) w[i] = poisoned ? 0.0 : static_cast<double>(NAN);
    return;
  }
  const double* gram = r.grams + p * r.gram_stride;
  for (int i = thread_id(); i < m * m; i += kMatrixThreads) matrix[i / m * ld + i % m] = gram[i];
  block_sync();
  block_eigen(matrix, m, ld, values, vectors, w != nullptr);
  if (r.steep != nullptr) {
    const bool steep = block_is_steep(values, m, null, floor, r.steep_ratio, sums);
    if (thread_id() == 0) r.steep[p] = steep ? 1 : 0;
  }
  const double value =
      block_spectral(SpectralKind::kEffectiveRank, matrix, values, m, ld, null, floor, w, m, scratch);
  if (thread_id() == 0) r.values[p] = value;
}

inline void run_small_ranks(const GramRanks& r, int64_t count, cudaStream_t stream) {
  const int64_t m = r.n < r.dim ? r.n : r.dim;
  const auto bytes = static_cast<size_t>(eigen_square(m) + eigen_vectors(m)) * sizeof(double);
  launch(DSE_KERNEL(small_rank_kernel), {grid_of(count), kMatrixThreads, bytes, stream}, r);
}

// For a decomposition by the library: copies the matrices, with the identity in place of those that it would
// refuse, and notes what is known of them. One block a matrix.
struct KnownSpectrum {
  double floor;
  int null;
  int good;
};
static __global__ __launch_bounds__(kMatrixThreads) void prepare_eigen_kernel(GramRanks r, double* out,
                                                                              KnownSpectrum* known) {
  __shared__ double sums[33];
  const int64_t p = blockIdx.x, m = r.n < r.dim ? r.n : r.dim;
  int null = 0;
  double floor = 0.0;
  const bool finite = inspect_gram(r, p, sums, &null, &floor);
  const bool good = finite && r.finite[p * r.finite_stride] != 0;
  const double* gram = r.grams + p * r.gram_stride;
  double* to = out + p * m * m;
  for (int64_t i = warp_id(); i < m; i += kMatrixThreads / kWarp) {
    for (int64_t j = lane_id(); j < m; j += kWarp) to[i * m + j] = good ? gram[i * m + j] : i == j ? 1.0 : 0.0;
  }
  if (thread_id() == 0) known[p] = {floor, null, good ? 1 : 0};
}

inline void run_prepare_eigen(const GramRanks& r, int64_t count, double* out, KnownSpectrum* known,
                              cudaStream_t stream) {
  launch(DSE_KERNEL(prepare_eigen_kernel), {grid_of(count), kMatrixThreads, 0, stream}, r, out, known);
}

// eigenvalues (in: of matrix p; out: w_i / sigma_i) and the effective rank. One block a matrix; m + 33 doubles of
// dynamic shared memory.
static __global__ __launch_bounds__(kMatrixThreads, 1) void eigen_ranks_kernel(GramRanks r, double* eigenvalues,
                                                                               const KnownSpectrum* known) {
  const int64_t p = blockIdx.x;
  const int m = static_cast<int>(r.n < r.dim ? r.n : r.dim);
  double* own = eigenvalues + p * m;
  const bool good = known[p].good != 0;
  if (r.steep != nullptr) {
    auto* sums = reinterpret_cast<double*>(dynamic_shared());
    const bool steep = good && block_is_steep(own, m, known[p].null, known[p].floor, r.steep_ratio, sums);
    if (thread_id() == 0) r.steep[p] = steep ? 1 : 0;
  }
  const double value = block_spectral_weights(SpectralKind::kEffectiveRank, own, m, known[p].null, known[p].floor,
                                              reinterpret_cast<double*>(dynamic_shared()));
  if (thread_id() == 0) r.values[p] = good ? value : static_cast<double>(NAN);
  if (good) return;
  for (int i = thread_id(); i < m; i += kMatrixThreads) own[i] = static_cast<double>(NAN);
}

inline void run_eigen_ranks(const GramRanks& r, int64_t count, double* eigenvalues, const KnownSpectrum* known,
                            cudaStream_t stream) {
  const int64_t m = r.n < r.dim ? r.n : r.dim;
  launch(DSE_KERNEL(eigen_ranks_kernel),
         {grid_of(count), kMatrixThreads, static_cast<size_t>(m + 33) * sizeof(double), stream}, r, eigenvalues,
         known);
}

// out[p][i][j] = vectors[p][i][j] * coefficient[p][j]
static __global__ __launch_bounds__(kMatrixThreads) void scale_columns_kernel(const double* vectors,
                                                                              const double* coefficient,
                                                                              int64_t count, int64_t m,
                                                                              double* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMatrixThreads + thread_id();
  if (i < count * m * m) out[i] = vectors[i] * coefficient[i / (m * m) * m + i % m];
}

inline void run_scale_columns(const double* vectors, const double* coefficient, int64_t count, int64_t m,
                              double* out, cudaStream_t stream) {
  launch(DSE_KERNEL(scale_columns_kernel),
         {grid_of(ceil_div(count * m * m, kMatrixThreads)), kMatrixThreads, 0, stream}, vectors, coefficient,
         count, m, out);
}

}  // namespace dse::cuda
