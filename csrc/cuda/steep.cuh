// Singular values far below the largest one, for one block of threads: what a float64 Gram matrix does not hold.
//
// The eigenvalues of A A^T come with errors of about 1e-16 of the largest one, so singular values below 1e-8 of
// the largest are noise, and with them their vectors, in which the gradients of spectral functions are largest.
// The matrix itself has them down to 1e-16. They are found in three steps, all of them products and rotations:
//   1. V, the eigenvectors of the Gram matrix (eigen.cuh): orthogonal to the last bit, and correct for the large
//      singular values; the rest of the space is separated from those, but arbitrary within itself;
//   2. Y = V A, and the Gram matrix of Y. Its entries are exact relative to the norms of the two rows that they
//      belong to, whereas those of A A^T are so relative to the largest row: another eight digits of the small
//      singular values;
//   3. Jacobi rotations of that matrix until its entries are small relative to the same norms. On such a graded
//      matrix they keep the relative accuracy of every eigenvalue (Demmel & Veselic, "Jacobi's method is more
//      accurate than QR", SIAM J. Matrix Anal. Appl. 13, 1992).
// W = V^T diag(w / sigma) V of the rotated V then has errors of about 1e-16 of its largest entry, and its product
// with A in float64 errors of 1e-16 times the condition number, which is what any backward stable decomposition
// of A would leave.
//
// Y is not kept: tiles of its Gram matrix form what they need of it as they go, 64 x 64 entries from 32 columns
// of Y at a time. That is m / 32 times the work of a product that reads Y, and takes no memory.
#pragma once

#include "cuda/eigen.cuh"
#include "cuda/tiles.cuh"

namespace dse::cuda {

inline constexpr int kSteepThreads = 256;  // of every block that calls what follows: 16 x 16
inline constexpr int kSteepTile = 64;
inline constexpr int kSteepChunk = 32;
inline constexpr int kSteepPitch = kSteepChunk + 1;
inline constexpr int kJacobiSweeps = 40;  // 6 to 10 are usual
// Entries up to this, relative to the norms of their rows, are small: their squares are below rounding.
inline constexpr double kJacobiTolerance = 0x1p-46;

// Smallest eigenvalue ratio at which a float64 Gram matrix gives singular vectors accurate to about 1e-6
// (results in float32) and 1e-9 (in float64); as on the CPU (csrc/cpu/singular_values.h).
template <class S>
constexpr double steep_ratio() {
  return sizeof(S) == 8 ? 1e-6 : 1e-9;
}

// The matrix A behind a Gram matrix A A^T, its rows centred about `mean` (may be null): the n listed rows, or the
// features of these, whichever are to be the rows of A.
template <class S>
struct SteepMatrix {
  FeatureView<S> x;
  const int64_t* order = nullptr;
  const double* mean = nullptr;
  int64_t n = 0;
  bool rows_side = false;

  __device__ __forceinline__ int64_t side() const { return rows_side ? n : x.dim; }
  __device__ __forceinline__ int64_t length() const { return rows_side ? x.dim : n; }
  // Zero outside.
  __device__ __forceinline__ double at(int64_t i, int64_t k) const {
    if (i >= side() || k >= length()) return 0.0;
    const int64_t f = rows_side ? k : i;
    return row_reader(x, order[rows_side ? i : k])(f) - (mean != nullptr ? mean[f] : 0.0);
  }
};

struct SteepTile {
  double left[kSteepTile * kSteepPitch];
  double right[kSteepTile * kSteepPitch];
  double rows[kSteepChunk * kSteepPitch];
};

// acc += the tile at (64 bi, 64 bj) of Y Y^T, Y = V A, over columns begin .. end - 1; v: m x m with leading
// dimension ldv, or null for the identity. This thread has entries (t / 16 + 16 i, t % 16 + 16 j).
template <class S>
__device__ __forceinline__ void rotated_tile(const SteepMatrix<S>& a, const double* v, int64_t ldv, int64_t bi,
                                             int64_t bj, int64_t begin, int64_t end, SteepTile& t,
                                             double (&acc)[4][4]) {
  const int ty = thread_id() / 16, tx = thread_id() % 16;
  const int64_t m = a.side();
  for (int64_t k0 = begin; k0 < end; k0 += kSteepChunk) {
    if (v == nullptr) {
      for (int e = thread_id(); e < kSteepTile * kSteepChunk; e += kSteepThreads) {
        const int r = e / kSteepChunk, c = e % kSteepChunk;
        const bool inside = k0 + c < end;
        t.left[r * kSteepPitch + c] = inside ? a.at(bi * kSteepTile + r, k0 + c) : 0.0;
        t.right[r * kSteepPitch + c] = inside ? a.at(bj * kSteepTile + r, k0 + c) : 0.0;
      }
    } else {
      double left[4][2] = {}, right[4][2] = {};
      for (int64_t j0 = 0; j0 < m; j0 += kSteepChunk) {
        for (int e = thread_id(); e < kSteepTile * kSteepChunk; e += kSteepThreads) {
          const int r = e / kSteepChunk, c = e % kSteepChunk;
          const int64_t row_i = bi * kSteepTile + r, row_j = bj * kSteepTile + r, j = j0 + c;
          t.left[r * kSteepPitch + c] = row_i < m && j < m ? v[row_i * ldv + j] : 0.0;
          t.right[r * kSteepPitch + c] = row_j < m && j < m ? v[row_j * ldv + j] : 0.0;
        }
        for (int e = thread_id(); e < kSteepChunk * kSteepChunk; e += kSteepThreads) {
          const int r = e / kSteepChunk, c = e % kSteepChunk;
          t.rows[r * kSteepPitch + c] = k0 + c < end ? a.at(j0 + r, k0 + c) : 0.0;
        }
        block_sync();
#pragma unroll 4
        for (int c = 0; c < kSteepChunk; ++c) {
          const double value[2] = {t.rows[c * kSteepPitch + tx], t.rows[c * kSteepPitch + tx + 16]};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const double from_i = t.left[(ty + 16 * i) * kSteepPitch + c];
            const double from_j = t.right[(ty + 16 * i) * kSteepPitch + c];
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              left[i][q] += from_i * value[q];
              right[i][q] += from_j * value[q];
            }
          }
        }
        block_sync();
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          t.left[(ty + 16 * i) * kSteepPitch + tx + 16 * q] = left[i][q];
          t.right[(ty + 16 * i) * kSteepPitch + tx + 16 * q] = right[i][q];
        }
      }
    }
    block_sync();
#pragma unroll 4
    for (int c = 0; c < kSteepChunk; ++c) {
      double from_j[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) from_j[j] = t.right[(tx + 16 * j) * kSteepPitch + c];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const double from_i = t.left[(ty + 16 * i) * kSteepPitch + c];
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] += from_i * from_j[j];
      }
    }
    block_sync();
  }
}

// g (m x m, both triangles) = Y Y^T, as above.
template <class S>
__device__ __forceinline__ void block_rotated_gram(const SteepMatrix<S>& a, const double* v, int64_t ldv,
                                                   double* g, int64_t ldg, SteepTile& t) {
  const int64_t m = a.side(), tiles = ceil_div(m, kSteepTile);
  for (int64_t bi = 0; bi < tiles; ++bi) {
    for (int64_t bj = bi; bj < tiles; ++bj) {
      double acc[4][4] = {};
      rotated_tile(a, v, ldv, bi, bj, 0, a.length(), t, acc);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t r = bi * kSteepTile + thread_id() / 16 + 16 * i;
          const int64_t c = bj * kSteepTile + thread_id() % 16 + 16 * j;
          if (r >= m || c >= m || c < r) continue;
          g[r * ldg + c] = acc[i][j];
          g[c * ldg + r] = acc[i][j];
        }
      }
    }
  }
  block_sync();
}

// Doubles of block_jacobi's working memory.
DSE_HOST_DEVICE constexpr int jacobi_scratch(int m) { return 2 * (m + 1); }

// Two-sided Jacobi rotations of a graded Gram matrix g (m x m, both triangles), all pairs of a round at a time,
// with the rows of v rotated alike: g becomes diagonal. Rows whose square is at most `dead` are rounding: they
// are parted from the others, but not from each other.
__device__ inline void block_jacobi(double* g, int64_t ldg, double* v, int64_t ldv, int m, double dead,
                                    double2* scratch) {
  const int players = (m + 1) / 2 * 2, pairs = players / 2, lane = lane_id();
  double2* turn = scratch;            // cosine and sine of a pair; sine 0: it rests
  double2* square = scratch + pairs;  // its two diagonal entries afterwards
  // Round robin: player players - 1 stays, the others move on by one a round.
  const auto pair_at = [&](int round, int at, int* p, int* q) {
    const int around = players - 1;
    const int first = at == 0 ? around : (round + at) % around;
    const int second = at == 0 ? round : (round - at + around) % around;
    *p = first < second ? first : second;
    *q = first < second ? second : first;
  };
  for (int sweep = 0; sweep < kJacobiSweeps; ++sweep) {
    bool rotated = false;
    for (int round = 0; round + 1 < players; ++round) {
      bool turns = false;
      for (int at = thread_id(); at < pairs; at += block_threads()) {
        int p, q;
        pair_at(round, at, &p, &q);
        turn[at] = make_double2(1.0, 0.0);
        if (q >= m) continue;
        const double pp = g[p * ldg + p], qq = g[q * ldg + q], pq = g[p * ldg + q];
        // False for a square that rounding made negative, too.
        const bool coupled = fabs(pq) > kJacobiTolerance * sqrt(pp) * sqrt(qq);
        if (!coupled || !(pp > dead || qq > dead)) continue;
        const double z = (qq - pp) / (2.0 * pq), root = sqrt(1.0 + z * z);
        const double tangent = 1.0 / (z < 0.0 ? z - root : z + root);
        const double cosine = 1.0 / sqrt(1.0 + tangent * tangent);
        turn[at] = make_double2(cosine, cosine * tangent);
        square[at] = make_double2(pp - tangent * pq, qq + tangent * pq);
        turns = turns || tangent != 0.0;
      }
      if (!block_any(turns)) continue;
      rotated = true;
      for (int at = warp_id(); at < pairs; at += block_warps()) {
        const double2 own = turn[at];
        if (own.y == 0.0) continue;
        int p, q;
        pair_at(round, at, &p, &q);
        for (int half = 0; half < 2; ++half) {
          double* upper = half == 0 ? g + p * ldg : v + p * ldv;
          double* lower = half == 0 ? g + q * ldg : v + q * ldv;
          for (int j = lane; j < m; j += kWarp) {
            const double first = upper[j], second = lower[j];
            upper[j] = own.x * first - own.y * second;
            lower[j] = own.y * first + own.x * second;
          }
        }
      }
      block_sync();
      for (int i = warp_id(); i < m; i += block_warps()) {
        double* row = g + i * ldg;
        for (int at = lane; at < pairs; at += kWarp) {
          const double2 own = turn[at];
          if (own.y == 0.0) continue;
          int p, q;
          pair_at(round, at, &p, &q);
          const double first = row[p], second = row[q];
          row[p] = i == q ? 0.0 : i == p ? square[at].x : own.x * first - own.y * second;
          row[q] = i == p ? 0.0 : i == q ? square[at].y : own.y * first + own.x * second;
        }
      }
      block_sync();
    }
    if (!rotated) break;
  }
}

// Rotates g = Y Y^T and v until g is diagonal; `values` receives the squares of the singular values of A,
// unsorted. Returns the level below which singular values are rounding, either of the rows (`floor`) or of the
// rotations; `elements`: the larger side of A. scratch: jacobi_scratch(m) doubles, 16-byte aligned; sums: 33
// doubles in shared memory.
__device__ inline double block_settle(double* g, int64_t ldg, double* v, int64_t ldv, int m, int64_t elements,
                                      double floor, double* values, double* scratch, double* sums) {
  double largest = 0.0;
  for (int i = thread_id(); i < m; i += block_threads()) largest = fmax(largest, g[i * ldg + i]);
  largest = block_max(largest, sums);
  const double own = static_cast<double>(elements) * DBL_EPSILON * sqrt(largest);
  const double cut = floor > own ? floor : own;
  block_jacobi(g, ldg, v, ldv, m, cut * cut, reinterpret_cast<double2*>(scratch));
  for (int i = thread_id(); i < m; i += block_threads()) values[i] = g[i * ldg + i];
  block_sync();
  return cut;
}

}  // namespace dse::cuda
