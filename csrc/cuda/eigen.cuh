// Eigendecompositions of small symmetric float64 matrices, one block of threads for a batch of up to eight, and
// the spectral functions that follow from them (common/spectral.h).
//
// Householder tridiagonalization in place, the orthogonal factor formed in place, then implicit QL. A QL sweep is
// a chain of dependent rotations (f^2 + g^2, a reciprocal square root, two products: estimated 120 cycles), so
// the chain, not arithmetic, should set the time: about 1.7 m^2 / 2 rotations, 0.2 ms for m = 65 on an H200 by
// that estimate, which has not been measured. Hence:
//   - every matrix of the batch has a warp of its own, one lane of which computes rotations: the chains of a
//     batch run at the same time;
//   - they go into a buffer, and while the next ones are computed the other warps apply them to the eigenvectors:
//     a thread owns one component of all vectors and carries the running one in a register, so that a rotation
//     costs one load and one store, without any exchange between threads;
//   - the buffers are swapped about m times in all; one barrier a swap.
// Vectors are rows, so neighbouring threads touch neighbouring words, in shared and in global memory alike.
// Operations: 4/3 m^3 for the tridiagonal form, 4/3 m^3 for the factor, 3 * 1.7 m^3 for the rotations and m^3 for
// W; at m = 65 that is 2.4 Mflop a matrix, 1 us at the vector units' rate: far below the chain.
//
// Matrices with a NaN end quickly and give NaN; a sweep count bounds all others.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/spectral.h"
#include "cuda/device.cuh"

namespace dse::cuda {

inline constexpr int kEigenBatch = 8;     // matrices of a batch
inline constexpr int kEigenRecords = 32;  // sweeps of one buffer
inline constexpr int kEigenSweeps = 80;   // for one eigenvalue; 2 is usual

// Leading dimension that keeps four neighbouring rows in different banks.
DSE_HOST_DEVICE constexpr int eigen_ld(int m) { return (m + 3) / 8 * 8 + 4; }

// Sweeps whose rotations lie one after the other in a buffer.
struct SweepList {
  int count;
  int finished;  // no sweep will follow
  int first[kEigenRecords];
  int last[kEigenRecords];
};

// Working memory of one matrix of side m, in doubles: diagonal, couplings, reflector factors, a vector, and two
// buffers of 2 m rotations.
DSE_HOST_DEVICE constexpr int eigen_even(int m) { return (m + 1) / 2 * 2; }
DSE_HOST_DEVICE constexpr int eigen_scratch(int m) { return 12 * eigen_even(m); }

// In shared memory. The caller fills count, m, ld, a and work (16-byte aligned), and synchronizes.
struct EigenBatch {
  int count;
  int m[kEigenBatch], ld[kEigenBatch];
  double* a[kEigenBatch];     // both triangles; on return row i is the eigenvector of eigenvalue i, if wanted
  double* work[kEigenBatch];  // eigen_scratch(m) doubles; on return the first m are the eigenvalues, unsorted
  double scale[kEigenBatch];  // internal from here on
  SweepList sweeps[2][kEigenBatch];

  __device__ __forceinline__ double* diagonal(int q) const { return work[q]; }
  __device__ __forceinline__ double* off(int q) const { return work[q] + eigen_even(m[q]); }
  __device__ __forceinline__ double* beta(int q) const { return work[q] + 2 * eigen_even(m[q]); }
  __device__ __forceinline__ double* vector(int q) const { return work[q] + 3 * eigen_even(m[q]); }
  __device__ __forceinline__ double2* rotations(int buffer, int q) const {
    return reinterpret_cast<double2*>(work[q] + (4 + 4 * buffer) * eigen_even(m[q]));
  }
};

namespace eigen_detail {

// Calls body(q, i, valid) for the rows lo .. m_q - 1 of every matrix: eight rows a warp, four lanes a row. All
// lanes of a warp call it together and for the same matrix; `valid` is false in the padding.
template <class Body>
__device__ __forceinline__ void for_each_row(const EigenBatch& b, int lo, const Body& body) {
  int unit = warp_id();
  for (int q = 0; q < b.count; ++q) {
    const int rows = b.m[q] - lo;
    if (rows <= 0) continue;
    const int units = (rows + 7) / 8;
    for (; unit < units; unit += block_warps()) {
      const int i = lo + unit * 8 + lane_id() / 4;
      body(q, i, i < b.m[q]);
    }
    unit -= units;
  }
}

// Powers of two bring the entries near 1: squares neither overflow nor vanish.
__device__ inline void scale_batch(EigenBatch& b) {
  for (int q = warp_id(); q < b.count; q += block_warps()) {
    double largest = 0.0;
    for (int i = lane_id(); i < b.m[q]; i += kWarp) largest = fmax(largest, fabs(b.a[q][i * b.ld[q] + i]));
    largest = warp_max(largest);
    if (lane_id() == 0) b.scale[q] = largest > 0.0 && largest <= DBL_MAX ? ldexp(1.0, -ilogb(largest)) : 1.0;
  }
  block_sync();
  for_each_row(b, 0, [&](int q, int i, bool valid) {
    double* row = b.a[q] + i * b.ld[q];
    if (!valid) return;
    for (int j = lane_id() & 3; j < b.m[q]; j += 4) row[j] *= b.scale[q];
  });
  block_sync();
}

// A = Q T Q^T. Reflector v_k is left in row k, columns k + 1 and on, its factor in beta.
__device__ inline void tridiagonalize(EigenBatch& b) {
  int largest = 0;
  for (int q = 0; q < b.count; ++q) largest = b.m[q] > largest ? b.m[q] : largest;
  const int lane = lane_id(), part = lane & 3;
  for (int k = 0; k + 2 < largest; ++k) {
    for (int q = warp_id(); q < b.count; q += block_warps()) {
      const int m = b.m[q];
      if (k + 2 >= m) continue;
      double* v = b.a[q] + k * b.ld[q];
      double tail = 0.0;
      for (int j = k + 2 + lane; j < m; j += kWarp) tail += v[j] * v[j];
      tail = warp_sum(tail);
      if (lane == 0) {
        const double head = v[k + 1], norm = sqrt(head * head + tail);
        // The sign that adds, so that nothing cancels.
        const double alpha = head > 0.0 ? -norm : norm;
        const bool reflects = tail > 0.0;
        const double first = reflects ? head - alpha : 0.0;
        v[k + 1] = first;
        b.off(q)[k] = reflects ? alpha : head;
        b.beta(q)[k] = reflects ? 2.0 / (first * first + tail) : 0.0;
      }
    }
    block_sync();
    for_each_row(b, k + 1, [&](int q, int i, bool valid) {
      const int m = b.m[q];
      if (k + 2 >= m) return;
      const double* v = b.a[q] + k * b.ld[q];
      const double* row = b.a[q] + (valid ? i : k) * b.ld[q];
      double dot = 0.0;
      for (int j = k + 1 + part; j < m; j += 4) dot += row[j] * v[j];
      dot += shuffle_xor(dot, 1);
      dot += shuffle_xor(dot, 2);
      if (valid && part == 0) b.vector(q)[i] = b.beta(q)[k] * dot;
    });
    block_sync();
    int known = -1;
    double half = 0.0;
    for_each_row(b, k + 1, [&](int q, int i, bool valid) {
      const int m = b.m[q];
      const double factor = k + 2 < m ? b.beta(q)[k] : 0.0;
      if (factor == 0.0) return;
      const double* v = b.a[q] + k * b.ld[q];
      const double* p = b.vector(q);
      if (known != q) {  // every warp for itself: cheaper than one more barrier
        double dot = 0.0;
        for (int j = k + 1 + lane; j < m; j += kWarp) dot += p[j] * v[j];
        half = 0.5 * factor * warp_sum(dot);
        known = q;
      }
      if (!valid) return;
      double* row = b.a[q] + i * b.ld[q];
      const double vi = v[i], wi = p[i] - half * vi;
      for (int j = k + 1 + part; j < m; j += 4) row[j] -= vi * (p[j] - half * v[j]) + wi * v[j];
    });
    block_sync();
  }
  for (int q = 0; q < b.count; ++q) {
    const int m = b.m[q], ld = b.ld[q];
    for (int i = thread_id(); i < m; i += block_threads()) {
      b.diagonal(q)[i] = b.a[q][i * ld + i];
      if (i + 1 == m) b.off(q)[i] = 0.0;
      if (i + 2 == m) b.off(q)[i] = b.a[q][(m - 1) * ld + m - 2];
    }
  }
  block_sync();
}

// a = Q^T. Step k needs v_k, in row k, and leaves rows and columns k + 1 and on: the rows above are still free.
__device__ inline void form_rows(EigenBatch& b) {
  int largest = 0;
  for (int q = 0; q < b.count; ++q) {
    const int m = b.m[q], lo = m > 2 ? m - 2 : 0;
    largest = m > largest ? m : largest;
    if (thread_id() < (m - lo) * (m - lo)) {
      const int i = lo + thread_id() / (m - lo), j = lo + thread_id() % (m - lo);
      b.a[q][i * b.ld[q] + j] = i == j ? 1.0 : 0.0;
    }
  }
  block_sync();
  const int part = lane_id() & 3;
  for (int k = largest - 3; k >= 0; --k) {
    for_each_row(b, k + 1, [&](int q, int i, bool valid) {
      const int m = b.m[q];
      if (k + 2 >= m) return;
      const double* v = b.a[q] + k * b.ld[q];
      double* row = b.a[q] + i * b.ld[q];
      const bool fresh = i == k + 1;  // so far a row of the identity
      double dot = fresh && part == 0 ? v[i] : 0.0;
      if (valid && !fresh) {
        for (int j = k + 2 + part; j < m; j += 4) dot += row[j] * v[j];
      }
      dot += shuffle_xor(dot, 1);
      dot += shuffle_xor(dot, 2);
      if (!valid) return;
      dot *= b.beta(q)[k];
      if (part == 0) row[k + 1] = (fresh ? 1.0 : 0.0) - dot * v[k + 1];
      for (int j = k + 2 + part; j < m; j += 4) row[j] = (fresh ? 0.0 : row[j]) - dot * v[j];
    });
    block_sync();
  }
  for (int q = 0; q < b.count; ++q) {
    if (b.m[q] < 3) continue;
    for (int i = thread_id(); i < b.m[q]; i += block_threads()) {
      b.a[q][i * b.ld[q]] = i == 0 ? 1.0 : 0.0;
      b.a[q][i] = i == 0 ? 1.0 : 0.0;
    }
  }
  block_sync();
}

// One QL sweep over rows l .. end of the tridiagonal matrix, by one lane; rotation i is left in
// rotation[end - 1 - i] (if not null). Returns the index of the last rotation that was made, the sweep's lowest.
__device__ inline int ql_sweep(double* d, double* e, int l, int end, double2* rotation) {
  double g = (d[l + 1] - d[l]) / (2.0 * e[l]);
  double r = sqrt(g * g + 1.0);
  g = d[end] - d[l] + e[l] / (g + (g < 0.0 ? -r : r));
  double s = 1.0, c = 1.0, p = 0.0;
  double above = d[end], next_d = d[end - 1], next_e = e[end - 1];
  for (int i = end - 1; i >= l; --i) {
    const double di = next_d, ei = next_e;
    if (i > l) {  // fetched ahead of the chain
      next_d = d[i - 1];
      next_e = e[i - 1];
    }
    const double f = s * ei, b = c * ei;
    const double square = f * f + g * g;
    if (!(square >= 1e-290)) {  // nothing left to chase, or NaN: the matrix falls apart here
      d[i + 1] = above - p;
      e[i + 1] = square < 1e-290 ? 0.0 : square;
      e[end] = 0.0;
      return i + 1;
    }
    const double inverse = rsqrt(square);
    e[i + 1] = square * inverse;
    s = f * inverse;
    c = g * inverse;
    if (rotation != nullptr) rotation[end - 1 - i] = make_double2(c, s);
    const double base = above - p;
    const double t = (di - base) * s + 2.0 * c * b;
    p = s * t;
    d[i + 1] = base + p;
    g = c * t - b;
    above = di;
  }
  d[l] = above - p;
  e[l] = g;
  e[end] = 0.0;
  return l;
}

// Couplings up to this are rounding. The entries are near 1 (scale_batch), and the tridiagonal form is exact to
// some epsilons of the largest only: what is smaller than half of one couples noise. A matrix of low rank leaves
// a large block of such noise, on which a test against its own diagonal alone finds eigenvalues one sweep at a
// time, up to m sweeps for the first.
__device__ __forceinline__ double coupling_floor(double above, double below) {
  return DBL_EPSILON * fmax(0.5, fabs(above) + fabs(below));
}

// Where the search for eigenvalues of one matrix stands; the same in all lanes of its warp.
struct Progress {
  int at = 0, tries = 0;
};

// One warp: sweeps of matrix q until the buffer is full or all eigenvalues are found.
__device__ inline void ql_fill(EigenBatch& b, int q, int buffer, bool want_vectors, Progress& progress) {
  const int m = b.m[q], capacity = 2 * eigen_even(m), lane = lane_id();
  double* d = b.diagonal(q);
  double* e = b.off(q);
  SweepList& list = b.sweeps[buffer][q];
  double2* rotation = b.rotations(buffer, q);
  int used = 0, count = 0;
  while (progress.at < m) {
    // First index from which the matrix is decoupled.
    int end = m;
    for (int base = progress.at; end == m; base += kWarp) {
      const int i = base + lane;
      const bool decoupled = i + 1 >= m || !(fabs(e[i]) > coupling_floor(d[i], d[i + 1]));
      const unsigned found = __ballot_sync(kAllLanes, decoupled ? 1 : 0);
      if (found == 0) continue;
      if (base == progress.at && (found & 1u) != 0) {
        const int done = found == kAllLanes ? kWarp : __ffs(static_cast<int>(~found)) - 1;
        progress.at += done;
        progress.tries = 0;
        break;
      }
      end = base + __ffs(static_cast<int>(found)) - 1;
    }
    if (end == m) continue;
    if (want_vectors && (used + end - progress.at > capacity || count == kEigenRecords)) break;
    if (++progress.tries > kEigenSweeps) {  // never seen; no plausible number may come out of it
      if (lane < m) d[lane] = NAN;
      progress.at = m;
      break;
    }
    int first = 0;
    if (lane == 0) {
      first = ql_sweep(d, e, progress.at, end, want_vectors ? rotation + used : nullptr);
      if (want_vectors) {
        list.first[count] = first;
        list.last[count] = end - 1;
      }
    }
    warp_sync();
    used += end - shuffle_idx(first, 0);
    ++count;
  }
  if (lane == 0) {
    list.count = want_vectors ? count : 0;
    list.finished = progress.at >= m ? 1 : 0;
  }
  warp_sync();
}

// Applies a buffer's rotations to the rows; thread `index` of `threads`.
__device__ inline void ql_apply(const EigenBatch& b, int buffer, int index, int threads) {
  for (int q = 0; q < b.count; ++q) {
    const int m = b.m[q], ld = b.ld[q];
    const SweepList& list = b.sweeps[buffer][q];
    for (; index < m; index += threads) {
      double* z = b.a[q] + index;
      const double2* rotation = b.rotations(buffer, q);
      for (int sweep = 0; sweep < list.count; ++sweep) {
        const int first = list.first[sweep], last = list.last[sweep];
        double carry = z[(last + 1) * ld], next = z[last * ld];
        for (int i = last; i >= first; --i) {
          const double low = next;
          const double2 turn = rotation[last - i];
          if (i > first) next = z[(i - 1) * ld];
          z[(i + 1) * ld] = turn.y * low + turn.x * carry;
          carry = turn.x * low - turn.y * carry;
        }
        if (first <= last) z[first * ld] = carry;
        rotation += last - first + 1;
      }
    }
    index -= m;
  }
}

__device__ inline void ql_iterate(EigenBatch& b, bool want_vectors) {
  const int warp = warp_id();
  // Warps that do not compute rotations apply them; where there are no others, all do.
  const int first_free = b.count < block_warps() ? b.count : 0;
  Progress progress;
  for (int stage = 0;; ++stage) {
    const int buffer = stage & 1;
    if (warp < b.count) ql_fill(b, warp, buffer, want_vectors, progress);
    if (stage > 0 && warp >= first_free) {
      ql_apply(b, buffer ^ 1, thread_id() - first_free * kWarp, block_threads() - first_free * kWarp);
    }
    block_sync();
    bool more = false;
    for (int q = 0; q < b.count; ++q) {
      const SweepList& list = b.sweeps[buffer][q];
      more = more || list.count > 0 || list.finished == 0;
    }
    if (!more) break;
  }
}

}  // namespace eigen_detail

// Decomposes all matrices of a batch; at least as many warps as matrices. Synchronizes the block on return.
__device__ inline void block_eigen(EigenBatch& b, bool want_vectors) {
  eigen_detail::scale_batch(b);
  eigen_detail::tridiagonalize(b);
  if (want_vectors) eigen_detail::form_rows(b);
  eigen_detail::ql_iterate(b, want_vectors);
  for (int q = 0; q < b.count; ++q) {
    const double inverse = 1.0 / b.scale[q];
    for (int i = thread_id(); i < b.m[q]; i += block_threads()) b.diagonal(q)[i] *= inverse;
  }
  block_sync();
}

// One matrix: a (m x m, leading dimension ld, both triangles, shared or global memory) receives the eigenvectors
// as rows, `values` the m eigenvalues in the rows' order (unsorted). `scratch` holds eigen_scratch(m) doubles,
// 16-byte aligned, best in shared memory.
__device__ inline void block_eigen(double* a, int m, int ld, double* values, double* scratch, bool want_vectors) {
  __shared__ EigenBatch batch;
  if (thread_id() == 0) {
    batch.count = 1;
    batch.m[0] = m;
    batch.ld[0] = ld;
    batch.a[0] = a;
    batch.work[0] = scratch;
  }
  block_sync();
  block_eigen(batch, want_vectors);
  for (int i = thread_id(); i < m; i += block_threads()) values[i] = batch.diagonal(0)[i];
  block_sync();
}

// Below this, singular values are rounding of the rows themselves: `magnitude` is the rows' root mean square norm
// before centring, n their number.
__device__ __forceinline__ double noise_floor(double magnitude, int64_t n) {
  return 4.0 * DBL_EPSILON * magnitude * sqrt(static_cast<double>(n));
}

// Whether some eigenvalue of a Gram matrix, of the m (any order) less the `null` that vanish by construction, is
// below `ratio` of the largest, so that the matrix itself has to be looked at (steep.cuh). Not so where nothing
// is above the rounding of the rows, or anything is not finite. sums: 33 doubles in shared memory.
__device__ inline bool block_is_steep(const double* values, int m, int null, double floor, double ratio,
                                      double* sums) {
  double largest = 0.0;
  for (int i = thread_id(); i < m; i += block_threads()) largest = values[i] > largest ? values[i] : largest;
  largest = block_max(largest, sums);
  double below = 0.0;
  for (int i = thread_id(); i < m; i += block_threads()) {
    below += values[i] - values[i] != 0.0 ? -DBL_MAX : values[i] < ratio * largest ? 1.0 : 0.0;
  }
  below = block_sum(below, sums);
  return largest > floor * floor && below > static_cast<double>(null);
}

// Value of a spectral function from the m eigenvalues of a Gram matrix (any order), of which the smallest `null`
// are known to be zero. On return values[i] holds w_i / sigma_i, 0 where sigma_i is. Shared `scratch`: m + 33
// doubles, free for reuse on return. All threads receive the value.
__device__ inline double block_spectral_weights(SpectralKind kind, double* values, int m, int null, double floor,
                                                double* scratch) {
  double* sigma = scratch;
  double* sums = scratch + m;
  double part = 0.0;
  for (int i = thread_id(); i < m; i += block_threads()) {
    const double value = values[i];
    int smaller = 0;
    for (int j = 0; j < m; ++j) smaller += values[j] < value || (values[j] == value && j < i) ? 1 : 0;
    // NaN stays NaN.
    double s = smaller < null ? 0.0 : sqrt(value < 0.0 ? 0.0 : value);
    s = s <= floor ? 0.0 : s;
    sigma[i] = value == value ? s : value;
    part += sigma[i];
  }
  const double sum = block_sum(part, sums);
  if (kind == SpectralKind::kNuclearNorm) {
    for (int i = thread_id(); i < m; i += block_threads()) values[i] = sigma[i] == 0.0 ? 0.0 : 1.0 / sigma[i];
    block_sync();
    return sum;
  }
  if (!(sum > 0.0)) {  // no direction at all, or NaN
    for (int i = thread_id(); i < m; i += block_threads()) values[i] = sum == 0.0 ? 0.0 : sum;
    block_sync();
    return sum == 0.0 ? 0.0 : sum;
  }
  part = 0.0;
  for (int i = thread_id(); i < m; i += block_threads()) {
    const double p = sigma[i] / sum;
    if (p > 0.0) part -= p * log(p);
  }
  const double entropy = block_sum(part, sums), value = exp(entropy);
  for (int i = thread_id(); i < m; i += block_threads()) {
    const double p = sigma[i] / sum;
    values[i] = p > 0.0 ? -(value / sum) * (log(p) + entropy) / sigma[i] : 0.0;
  }
  block_sync();
  return value;
}

// out (m x m, leading dimension ldo) = sum_i coefficient[i] v_i v_i^T for every matrix of a batch, the vectors
// being the rows of a; skipped where out[q] is null. Tiles of 16 x 16, one a warp, by float64 tensor cores.
__device__ inline void block_projectors(const EigenBatch& b, double* const* coefficient, double* const* out,
                                        const int* ldo) {
  const int lane = lane_id(), row = lane >> 2, step = lane & 3;
  int tile = warp_id();
  for (int q = 0; q < b.count; ++q) {
    const int m = b.m[q], ld = b.ld[q], blocks = (m + 15) / 16, tiles = blocks * (blocks + 1) / 2;
    const double* v = b.a[q];
    for (; tile < tiles; tile += block_warps()) {
      if (out[q] == nullptr) continue;
      int bi = 0;
      while ((bi + 1) * (bi + 2) / 2 <= tile) ++bi;
      const int r0 = bi * 16 + row, c0 = (tile - bi * (bi + 1) / 2) * 16 + row;
      double sum[2][2][2] = {};
      for (int i0 = 0; i0 < m; i0 += 4) {
        const int i = i0 + step;
        const bool inside = i < m;
        const double factor = inside ? coefficient[q][i] : 0.0;
        const double* vi = v + i * ld;
        double left[2], right[2];
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          left[u] = inside && r0 + 8 * u < m ? vi[r0 + 8 * u] * factor : 0.0;
          right[u] = inside && c0 + 8 * u < m ? vi[c0 + 8 * u] : 0.0;
        }
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
          for (int w = 0; w < 2; ++w) mma_f64(sum[u][w], left[u], right[w]);
        }
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            const int r = r0 + 8 * u, c = c0 - row + 8 * w + 2 * step + x;
            if (r >= m || c > r) continue;
            out[q][static_cast<int64_t>(r) * ldo[q] + c] = sum[u][w][x];
            out[q][static_cast<int64_t>(c) * ldo[q] + r] = sum[u][w][x];
          }
        }
      }
    }
    tile -= tiles;
  }
}

// One matrix, after block_eigen: value of the spectral function; where `w` is not null it receives
// W = sum_i (w_i / sigma_i) v_i v_i^T (leading dimension ldw, global memory). `scratch` as above.
__device__ inline double block_spectral(SpectralKind kind, double* vectors, double* values, int m, int ld,
                                        int null, double floor, double* w, int ldw, double* scratch) {
  __shared__ EigenBatch batch;
  __shared__ double* coefficient;
  __shared__ double* out;
  __shared__ int stride;
  const double value = block_spectral_weights(kind, values, m, null, floor, scratch);
  if (w == nullptr) return value;
  if (thread_id() == 0) {
    batch.count = 1;
    batch.m[0] = m;
    batch.ld[0] = ld;
    batch.a[0] = vectors;
    coefficient = values;
    out = w;
    stride = ldw;
  }
  block_sync();
  block_projectors(batch, &coefficient, &out, &stride);
  block_sync();
  return value;
}

}  // namespace dse::cuda
