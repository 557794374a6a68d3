// Every matrix goes through the float64 Gram matrix of its smaller side: exact enough for singular values above
// about 1e-7 of the largest. It is reduced to tridiagonal form, whose eigenvalues are the squares of the singular
// values; the gradient's matrix is a function of it (tridiagonal.h). Where a gradient (or a float64 result) needs
// smaller singular values, and the spectrum has them, the matrix itself is decomposed by a singular value
// decomposition of a triangular factor.

#include "cpu/spectrum.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/aten.h"
#include "cpu/dense.h"
#include "cpu/products.h"
#include "cpu/stage.h"

namespace dse::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int64_t kStreamRows = 128;
constexpr int64_t kTile = 96;  // columns of one task of a streamed Gram matrix, a multiple of kGramPanel

// Smallest eigenvalue ratio of a float64 Gram matrix that still gives singular vectors accurate to about 1e-6
// (float32 results) and 1e-9 (float64 results).
template <typename T>
constexpr double steep_ratio() {
  return sizeof(T) == 8 ? 1e-6 : 1e-9;
}

// Below this, singular values are rounding of the rows themselves.
double noise_floor(double magnitude, int64_t n) {
  return 4.0 * kEps * magnitude * std::sqrt(static_cast<double>(n));
}

// Rows or columns that are all zero (dead features, masked tokens) each hide one zero eigenvalue.
template <typename P>
int64_t count_null(const P* gram, int64_t m, int64_t ld, bool centered_rows) {
  int64_t count = centered_rows ? 1 : 0;
  for (int64_t i = 0; i < m; ++i) count += gram[i * ld + i] == P(0) ? 1 : 0;
  return std::min(count, m);
}

template <typename P>
void mirror_upper(P* g, int64_t n, int64_t ld) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) g[i * ld + j] = g[j * ld + i];
}

// turned (cols x ldt) = matrix^T, zero tails.
template <typename P>
void transpose(const P* matrix, int64_t rows, int64_t cols, int64_t ld, P* turned, int64_t ldt) {
  constexpr int64_t kStep = 8;
  for (int64_t i0 = 0; i0 < rows; i0 += kStep) {
    const int64_t i1 = std::min(rows, i0 + kStep);
    for (int64_t f = 0; f < cols; ++f)
      for (int64_t i = i0; i < i1; ++i) turned[f * ldt + i] = matrix[i * ld + f];
  }
  for (int64_t f = 0; f < cols; ++f) std::fill(turned + f * ldt + rows, turned + (f + 1) * ldt, P(0));
}

// out (m x m) = sum_r coefficient[r] v_r v_r^T for m eigenvectors, row-major; symmetric.
void weighted_projector(const double* vectors, const double* coefficient, int64_t m, SpectralWorkspace& ws,
                        double* out, int64_t ldo) {
  const int64_t ld = gram_ld(m);
  double* left = ws.scaled.reserve(2 * m * ld);
  double* right = left + m * ld;
  int64_t used = 0;
  for (int64_t r = 0; r < m; ++r) {
    if (coefficient[r] == 0.0) continue;
    double* a = left + used * ld;
    double* b = right + used * ld;
    for (int64_t i = 0; i < m; ++i) {
      a[i] = vectors[r * m + i];
      b[i] = vectors[r * m + i] * coefficient[r];
    }
    std::fill(a + m, a + ld, 0.0);
    std::fill(b + m, b + ld, 0.0);
    ++used;
  }
  for (int64_t i = 0; i < m; ++i) std::fill(out + i * ldo, out + (i + 1) * ldo, 0.0);
  for_each_upper_tile(0, m, kTile, m * m * used / 2, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    tn_product_upper(left, ld, right, ld, used, out, ldo, i0, i1, j0, j1);
  });
  mirror_upper(out, m, ldo);
}

template <typename P, typename T>
void store_matrix(const P* src, int64_t rows, int64_t cols, int64_t ld, T* dst) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) dst[i * cols + j] = static_cast<T>(src[i * ld + j]);
}

// Singular values from eigenvalues (ascending). `structural_null` eigenvalues are known to be zero.
void eigenvalues_to_sigma(const double* values, int64_t m, int64_t structural_null, double floor, double* sigma) {
  for (int64_t i = 0; i < m; ++i) {
    const double s = i < structural_null ? 0.0 : std::sqrt(std::max(values[i], 0.0));
    sigma[i] = s > floor ? s : 0.0;
  }
}

bool is_steep(const double* values, int64_t m, int64_t structural_null, double floor, double ratio) {
  const double largest = values[m - 1];
  // Nothing but rounding: the value is 0 and so is the gradient.
  if (!(largest > floor * floor)) return false;
  return structural_null < m && values[structural_null] < ratio * largest;
}

// Zeroes singular values (any order) that are rounding of the decomposition.
void cut_noise(double* sigma, int64_t m, int64_t n, int64_t d, double floor) {
  const double largest = *std::max_element(sigma, sigma + m);
  const double cut = std::max(floor, static_cast<double>(std::max(n, d)) * kEps * largest);
  for (int64_t i = 0; i < m; ++i)
    if (!(sigma[i] > cut)) sigma[i] = 0.0;
}

}  // namespace

void column_means(const RowSet& set, double* mean) {
  const int64_t d = set.x->dim, n = set.n;
  const int64_t block_rows = reduction_rows(n), blocks = (n + block_rows - 1) / block_rows;
  Buffer<double> partial((2 * blocks + 1) * d);
  double* origin = partial.data() + 2 * blocks * d;
  set.x->load(set.index(0), origin);
  for_each_task(blocks, 8 * n * d, [&](int64_t b, int64_t) {
    double* sum = partial.data() + 2 * b * d;
    double* row = sum + d;
    std::fill(sum, sum + d, 0.0);
    for (int64_t i = b * block_rows; i < std::min(n, (b + 1) * block_rows); ++i) {
      set.x->load(set.index(i), row);
      for (int64_t f = 0; f < d; ++f) sum[f] += row[f] - origin[f];
    }
  });
  for (int64_t b = 1; b < blocks; ++b) axpy(1.0, partial.data() + 2 * b * d, partial.data(), d);
  for (int64_t f = 0; f < d; ++f) mean[f] = origin[f] + partial[f] / static_cast<double>(n);
}

namespace {

// Calls put(block, rows, i, row) for every row of a block of `block_rows`, centred (in parallel), then
// consume(block, rows), block after block; `block` has block_rows * ld elements. Returns the root mean square
// norm that centred rows had before.
template <typename P, typename Put, typename Consume>
double stream_blocks(const RowSet& set, int64_t block_rows, int64_t ld, const Put& put, const Consume& consume) {
  const int64_t d = set.x->dim, n = set.n;
  Buffer<double> mean(d), norms(block_rows), row_work(max_workers() * d);
  Buffer<P> narrow_work(max_workers() * d);
  Buffer<P> block(block_rows * ld);
  if (set.center) column_means(set, mean.data());
  double squares = 0.0;
  for (int64_t begin = 0; begin < n; begin += block_rows) {
    const int64_t rows = std::min(block_rows, n - begin);
    constexpr int64_t kRowsPerTask = 16;
    for_each_task((rows + kRowsPerTask - 1) / kRowsPerTask, 32 * rows * d, [&](int64_t task, int64_t worker) {
      double* row = row_work.data() + worker * d;
      P* narrow = narrow_work.data() + worker * d;
      for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
        if (!set.center) {
          set.x->load(set.index(begin + i), narrow);
          put(block.data(), rows, i, narrow);
          continue;
        }
        set.x->load(set.index(begin + i), row);
        norms[i] = sum_of_squares(row, d);
        axpy(-1.0, mean.data(), row, d);
        put(block.data(), rows, i, row);
      }
    });
    if (set.center)
      for (int64_t i = 0; i < rows; ++i) squares += norms[i];
    consume(block.data(), rows);
  }
  return std::sqrt(squares / static_cast<double>(n));
}

// Triangular factor of a streamed matrix with n > d rows: QR of [R; next block] (a sequential tall-skinny QR,
// Demmel et al. 2012), so that never more than a few blocks are in memory.
void streamed_triangle(const RowSet& set, double* r) {
  const int64_t d = set.x->dim, ld = d, block_rows = std::max<int64_t>(d, kStreamRows);
  Buffer<double> stack((d + block_rows) * ld);
  int64_t height = 0;
  const auto put = [&](double* block, int64_t, int64_t i, const double* row) {
    std::copy_n(row, d, block + i * ld);
  };
  stream_blocks<double>(set, block_rows, ld, put, [&](const double* block, int64_t rows) {
    std::copy_n(block, rows * ld, stack.data() + height * ld);
    const int64_t total = height + rows;
    if (total < d) {
      height = total;
      return;
    }
    qr_triangle(stack.data(), total, d, ld, r);
    std::copy_n(r, d * d, stack.data());
    height = d;
  });
}

}  // namespace

namespace {

// Leading dimension of a streamed Gram matrix, for panels of either width.
int64_t stream_ld(int64_t m) { return narrow_ld(m); }

// Gram matrix of the columns of a set of n > d rows, upper triangle; all threads. P is the type of the products.
// Returns the rows' root mean square norm before centring.
template <typename P>
double column_gram(const RowSet& set, double* gram) {
  constexpr int64_t kPanel = sizeof(P) == 8 ? kGramPanel : kNarrowPanel;
  // Rows between two additions to the sums: those of one panel of each operand fit the smallest cache.
  constexpr int64_t kPart = 80, block_rows = 2 * kPart;
  const int64_t d = set.x->dim, ldg = stream_ld(d);
  std::fill(gram, gram + d * ldg, 0.0);
  const auto put = [&](P* block, int64_t all, int64_t index, const auto* row) {
    const int64_t before = index / kPart * kPart, rows = std::min(kPart, all - before), i = index - before;
    P* panels = block + before * ldg;
    for (int64_t f = 0; f < d; f += kPanel) {
      P* out = panels + f * rows + i * kPanel;
      const int64_t width = std::min(kPanel, d - f);
      for (int64_t j = 0; j < width; ++j) out[j] = static_cast<P>(row[f + j]);
      std::fill(out + width, out + kPanel, P(0));
    }
  };
  const double magnitude = stream_blocks<P>(set, block_rows, ldg, put, [&](const P* panels, int64_t rows) {
    for_each_upper_tile(0, d, kTile, d * d * rows / 2, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
      for (int64_t r = 0; r < rows; r += kPart)
        panel_gram_upper(panels + r * ldg, std::min(kPart, rows - r), gram, ldg, i0, i1, j0, j1);
    });
  });
  if (set.center) return magnitude;
  double trace = 0.0;  // the sum of the rows' squares, too
  for (int64_t f = 0; f < d; ++f) trace += gram[f * ldg + f];
  return std::sqrt(trace / static_cast<double>(set.n));
}

// Gram matrix of the rows of a set of n <= d rows.
double row_gram(const RowSet& set, double* gram) {
  const int64_t d = set.x->dim, n = set.n, ldg = stream_ld(n);
  std::fill(gram, gram + n * ldg, 0.0);
  Buffer<double> matrix(n * d), turned(d * ldg);
  const double magnitude = gather_rows(set, matrix.data(), d);
  transpose(matrix.data(), n, d, d, turned.data(), ldg);
  for_each_upper_tile(0, n, kTile, n * n * d / 2, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    tn_product_upper(turned.data(), ldg, turned.data(), ldg, d, gram, ldg, i0, i1, j0, j1);
  });
  return magnitude;
}

// Gram matrix (count x count, leading dimension ld) of the rows' coordinates in `basis` (count x d).
void projected_gram(const RowSet& set, const double* basis, int64_t count, double* gram, int64_t ld) {
  const int64_t d = set.x->dim, n = set.n, block = reduction_rows(n), blocks = (n + block - 1) / block;
  const int64_t cells = count * count;
  Buffer<double> partial(blocks * cells), work(max_workers() * (d + count));
  for_each_task(blocks, n * d * (count + 4), [&](int64_t b, int64_t worker) {
    double* row = work.data() + worker * (d + count);
    double* coordinates = row + d;
    double* own = partial.data() + b * cells;
    std::fill(own, own + cells, 0.0);
    for (int64_t i = b * block; i < std::min(n, (b + 1) * block); ++i) {
      set.x->load(set.index(i), row);
      for (int64_t r = 0; r < count; ++r) coordinates[r] = dot(basis + r * d, row, d);
      for (int64_t r = 0; r < count; ++r) axpy(coordinates[r], coordinates, own + r * count, count);
    }
  });
  for (int64_t r = 0; r < count; ++r) {
    std::fill(gram + r * ld, gram + (r + 1) * ld, 0.0);
    for (int64_t b = 0; b < blocks; ++b) axpy(1.0, partial.data() + b * cells + r * count, gram + r * ld, count);
  }
}

// Smallest eigenvalue, in units of the mean one, above which the float32 products of column_gram change the
// gradient by less than 3e-4.
constexpr double kNarrowGramFloor = 5e-4;
// Whether the matrix minus shift * identity is positive definite, in float32.
bool exceeds(const double* gram, int64_t m, int64_t ld, double shift, float* work) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < m; ++j) work[i * m + j] = static_cast<float>(gram[i * ld + j]);
  for (int64_t i = 0; i < m; ++i) work[i * m + i] = static_cast<float>(gram[i * ld + i] - shift);
  return is_positive_definite(work, m, m);
}

}  // namespace

namespace {

// One matrix on its way through spectral_functions.
struct Spectrum {
  int64_t m = 0, null = 0;  // side of the Gram matrix; eigenvalues known to be zero
  double floor = 0.0;       // singular values below are rounding
  bool finite = true;
  bool converged = true;
  double* gram = nullptr;
  float* narrow_gram = nullptr;  // instead, of small sides
  bool narrow_products = false;  // the Gram matrix is of float32 products
  double lifted = 0.0;           // where the eigenvalue of a vector of ones was moved to
  double error = 0.0;            // of the Gram matrix and its tridiagonal form, about
  double* values = nullptr;
};

// Error of a Gram matrix with float32 products, summed in float64 every 80 of `depth`, in units of its trace.
double narrow_products(int64_t depth) { return 2e-9 * std::sqrt(std::min(1.0, 1600.0 / static_cast<double>(depth))); }

// The part of the columns that a mixed reduction may do in float64.
constexpr int64_t kWideShare = 8;
constexpr double kNarrowEps = std::numeric_limits<float>::epsilon();

void fill_gram(const RowSet& set, Spectrum& s, SpectralWorkspace& ws) {
  DSE_STAGE("clusters: Gram matrices");
  const int64_t d = set.x->dim, n = set.n, ldm = gram_ld(d), ldg = stream_ld(s.m);
  double* matrix = ws.matrix.reserve(n * ldm);
  s.floor = noise_floor(gather_rows(set, matrix, ldm), n);
  std::fill(s.gram, s.gram + s.m * ldg, 0.0);
  const bool rows_side = n <= d;
  if (rows_side) {
    // Feature block by feature block, so that the turned rows are still in the cache when they are multiplied.
    constexpr int64_t kFeatures = 96;
    double* turned = ws.turned.reserve(kFeatures * ldg);
    for (int64_t f = 0; f < d; f += kFeatures) {
      const int64_t width = std::min(kFeatures, d - f);
      transpose(matrix + f, n, width, ldm, turned, ldg);
      tn_product_upper(turned, ldg, turned, ldg, width, s.gram, ldg, 0, s.m, 0, s.m);
    }
  } else {
    tn_product_upper(matrix, ldm, matrix, ldm, n, s.gram, ldg, 0, s.m, 0, s.m);
  }
  // Rows that sum to zero: one singular value vanishes by construction.
  s.null = count_null(s.gram, s.m, ldg, set.center && rows_side);
  mirror_upper(s.gram, s.m, ldg);
  double trace = 0.0;
  for (int64_t i = 0; i < s.m; ++i) trace += s.gram[i * ldg + i];
  s.finite = std::isfinite(trace);
}

// A small Gram matrix in float32.
void fill_small_gram(const float* matrix, const RowSet& set, Spectrum& s, SpectralWorkspace& ws) {
  constexpr int64_t kDepth = 96;  // products between two additions to the sums
  const int64_t d = set.x->dim, n = set.n, m = s.m, ldg = gram_ld(m);
  float* gram = s.narrow_gram;
  std::fill(gram, gram + m * ldg, 0.0f);
  const bool rows_side = n <= d;
  const int64_t depth = rows_side ? d : n;
  float* block = ws.narrow_turned.reserve(kDepth * ldg);
  for (int64_t r = 0; r < depth; r += kDepth) {
    const int64_t height = std::min(kDepth, depth - r);
    if (rows_side) {
      transpose(matrix + r, n, height, d, block, ldg);
    } else {
      for (int64_t i = 0; i < height; ++i) {
        std::copy_n(matrix + (r + i) * d, d, block + i * ldg);
        std::fill(block + i * ldg + d, block + (i + 1) * ldg, 0.0f);
      }
    }
    tn_product_upper(block, ldg, block, ldg, height, gram, ldg, 0, m, 0, m);
  }
  mirror_upper(gram, m, ldg);
}

// A large one with float32 products, summed in float64.
void fill_large_gram(const float* matrix, const RowSet& set, Spectrum& s, SpectralWorkspace& ws) {
  constexpr int64_t kDepth = 80;
  const int64_t d = set.x->dim, n = set.n, m = s.m, ldg = stream_ld(m);
  std::fill(s.gram, s.gram + m * ldg, 0.0);
  const bool rows_side = n <= d;
  const int64_t depth = rows_side ? d : n;
  float* panels = ws.narrow_turned.reserve(kDepth * ldg);
  for (int64_t r = 0; r < depth; r += kDepth) {
    const int64_t height = std::min(kDepth, depth - r);
    for (int64_t first = 0; first < m; first += kNarrowPanel) {
      const int64_t width = std::min(kNarrowPanel, m - first);
      float* panel = panels + first * height;
      if (rows_side) {
        transpose(matrix + first * d + r, width, height, d, panel, kNarrowPanel);
        continue;
      }
      for (int64_t i = 0; i < height; ++i) {
        std::copy_n(matrix + (r + i) * d + first, width, panel + i * kNarrowPanel);
        std::fill(panel + i * kNarrowPanel + width, panel + (i + 1) * kNarrowPanel, 0.0f);
      }
    }
    for (int64_t i = 0; i < m; i += kTile)
      for (int64_t j = i; j < m; j += kTile)
        panel_gram_upper(panels, height, s.gram, ldg, i, std::min(m, i + kTile), j, std::min(m, j + kTile));
  }
  mirror_upper(s.gram, m, ldg);
}

// The vector of ones, which centred rows have as a null vector, moved to the middle of the spectrum: a function of
// the matrix need not be tame at zero then.
template <typename P>
void lift_ones(P* gram, int64_t ld, Spectrum& s) {
  double trace = 0.0;
  for (int64_t i = 0; i < s.m; ++i) trace += static_cast<double>(gram[i * ld + i]);
  s.lifted = trace / static_cast<double>(s.m - 1);
  const P share = static_cast<P>(s.lifted / static_cast<double>(s.m));
  for (int64_t i = 0; i < s.m; ++i)
    for (int64_t j = 0; j < s.m; ++j) gram[i * ld + j] += share;
}

// Takes the lifted eigenvalue out of the sorted ones, and puts the zero that it was in front.
void drop_lifted(Spectrum& s) {
  double* values = s.values;
  int64_t at = std::lower_bound(values, values + s.m, s.lifted) - values;
  if (at == s.m || (at > 0 && s.lifted - values[at - 1] < values[at] - s.lifted)) --at;
  std::copy_backward(values, values + at, values + at + 1);
  values[0] = 0.0;
}

// About as many rows as features: the smallest singular values are out of reach of float32 products.
bool is_nearly_square(const RowSet& set) {
  const int64_t d = set.x->dim;
  return 100 * set.n > 92 * d && 100 * set.n < 108 * d;
}

void fill_narrow_gram(const RowSet& set, Spectrum& s, SpectralWorkspace& ws) {
  if (s.m > kLanesMaxSide && is_nearly_square(set)) {
    fill_gram(set, s, ws);
  } else {
    DSE_STAGE("clusters: Gram matrices");
    float* matrix = ws.narrow_matrix.reserve(set.n * set.x->dim);
    s.floor = noise_floor(gather_rows(set, matrix, set.x->dim), set.n);
    if (s.m > kLanesMaxSide) fill_large_gram(matrix, set, s, ws);
    else fill_small_gram(matrix, set, s, ws);
    const bool zero_sum = set.center && set.n <= set.x->dim;
    double trace = 0.0;
    const auto look = [&](const auto* gram, int64_t ld) {
      s.null = count_null(gram, s.m, ld, zero_sum);
      for (int64_t i = 0; i < s.m; ++i) trace += static_cast<double>(gram[i * ld + i]);
    };
    if (s.m > kLanesMaxSide) look(s.gram, stream_ld(s.m));
    else look(s.narrow_gram, gram_ld(s.m));
    // Squares that leave float32's range are float64's.
    s.finite = trace > 1e-20 && trace < 1e30;
    s.error = s.m > kLanesMaxSide ? narrow_products(std::max(set.n, set.x->dim)) * trace : 0.0;
    s.narrow_products = true;
  }
  if (!s.finite || !set.center || set.n > set.x->dim) return;
  if (s.m > kLanesMaxSide) lift_ones(s.gram, stream_ld(s.m), s);
  else lift_ones(s.narrow_gram, gram_ld(s.m), s);
}

// Eigenvalues of reduced large matrices, of which spectra[i] belongs to matrices[i].
void large_eigenvalues(Spectrum* const* spectra, Tridiagonal* const* matrices, int64_t count,
                       SpectralWorkspace& ws) {
  const double* diagonals[kLanes] = {};
  const double* couplings[kLanes] = {};
  double* values[kLanes] = {};
  int64_t side[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    diagonals[i] = matrices[i]->diagonal();
    couplings[i] = matrices[i]->couplings();
    values[i] = spectra[i]->values;
    side[i] = spectra[i]->m;
  }
  const bool converged = tridiagonal_eigenvalues(count, diagonals, couplings, side, values, ws.values);
  for (int64_t i = 0; i < count; ++i) {
    Spectrum& s = *spectra[i];
    s.converged = converged;
    const double inverse = 1.0 / matrices[i]->scale();
    for (int64_t j = 0; j < s.m; ++j) s.values[j] *= inverse;
    if (s.lifted > 0.0) drop_lifted(s);
  }
}

// Eigenvalues of the Gram matrices, which are destroyed.
void decompose(Spectrum* spectra, int64_t count, SpectralWorkspace& ws, bool narrow) {
  DSE_STAGE("clusters: tridiagonal form, eigenvalues");
  const double* wide[kLanes];
  const float* narrow_matrices[kLanes];
  double* values[kLanes];
  int64_t side[kLanes], ld[kLanes], used = 0, large = 0;
  Spectrum* small_spectra[kLanes];
  Spectrum* large_spectra[kLanes];
  Tridiagonal* matrices[kLanes];
  for (int64_t i = 0; i < count; ++i) {
    Spectrum& s = spectra[i];
    if (!s.finite) continue;
    if (s.m > kLanesMaxSide) {
      if (narrow) ws.large[i].reduce_mixed(s.gram, s.m, stream_ld(s.m), s.m / kWideShare);
      else ws.large[i].reduce(s.gram, s.m, stream_ld(s.m));
      s.error += ws.large[i].error();
      large_spectra[large] = &s;
      matrices[large++] = &ws.large[i];
      continue;
    }
    wide[used] = s.gram;
    narrow_matrices[used] = s.narrow_gram;
    ld[used] = narrow ? gram_ld(s.m) : stream_ld(s.m);
    values[used] = s.values;
    side[used] = s.m;
    small_spectra[used++] = &s;
  }
  if (large > 0) large_eigenvalues(large_spectra, matrices, large, ws);
  if (used == 0) return;
  const bool converged = narrow ? ws.narrow_small.reduce(used, narrow_matrices, side, ld, values)
                                : ws.small.reduce(used, wide, side, ld, values);
  for (int64_t i = 0; i < used; ++i) {
    Spectrum& s = *small_spectra[i];
    s.converged = converged;
    if (!narrow || !converged) continue;
    s.error = 2.0 * kNarrowEps * std::abs(s.values[s.m - 1]);
    if (s.lifted > 0.0) drop_lifted(s);
  }
}

// Error of the sums of inverses, relative to each singular value's share of the gradient.
template <typename T>
constexpr double function_error() {
  return sizeof(T) == 8 ? 1e-11 : 3e-6;
}

// Eigenvalues of a Gram matrix, or of the part of one that a small matrix stands for.
struct Part {
  const double* values;
  int64_t count;
  ShiftedInverses function;  // out: V diag(w / s) V^T as a function of the matrix
};

// The gradient's functions of all parts together, w the weights of spectral_value_and_weights for m singular
// values. Returns whether there is any gradient.
bool gradient_functions(SpectralKind kind, Part* parts, int64_t count, double value, const double* sigma,
                        const double* weight, int64_t m, double error) {
  InverseRootAndLog both[2];
  double root = 0.0, log = 0.0, sum = 0.0, most = 0.0;
  for (int64_t i = 0; i < m; ++i) {
    sum += sigma[i];
    most = std::max(most, std::abs(weight[i]));
  }
  const double centre = std::sqrt(parts[0].values[0]) * std::sqrt(parts[0].values[parts[0].count - 1]);
  if (kind == SpectralKind::kEffectiveRank) {
    // Near its maximum, where all singular values are equal, the effective rank has next to no gradient, and an
    // error is relative to that.
    const double bracket = most * sum / value;
    if (!(bracket > 4.0 * kEps)) return false;
    error = std::max(error * std::min(bracket, 1.0), 4.0 * kEps);
  }
  for (int64_t p = 0; p < count; ++p) {
    Part& part = parts[p];
    const double smallest = part.values[0], largest = part.values[part.count - 1];
    if (kind == SpectralKind::kNuclearNorm) {
      part.function = inverse_square_root(smallest, largest, error);
      continue;
    }
    both[p] = inverse_square_root_and_log(smallest, largest, centre, error);
    for (int64_t i = 0; i < part.count; ++i) {
      root += part.values[i] * both[p].root.at(part.values[i]);
      log += part.values[i] * both[p].log.at(part.values[i]);
    }
  }
  if (kind == SpectralKind::kNuclearNorm) return true;
  // w = -(F / S) (log s - log S + log F), log s = log(lambda) / 2. The second factor's constant makes sum w s
  // vanish: the effective rank does not depend on the features' scale. Taken from the sums as they are, not from
  // their limits, it makes that exact.
  const double unit = -0.5 * value / sum, constant = -log / root;
  for (int64_t p = 0; p < count; ++p) {
    parts[p].function = both[p].log;
    for (size_t s = 0; s < both[p].root.weight.size(); ++s) {
      double& term = parts[p].function.weight[s];
      term = unit * (term + constant * both[p].root.weight[s]);
    }
  }
  return true;
}

// What a gradient's matrix loses to float32, relative to the gradient.
struct NarrowLoss {
  double value = 0.0;     // relative error of the value that an error of the Gram matrix makes
  double gradient = 0.0;  // the same for the gradient
  double rounding = 0.0;  // of the gradient, from float32 arithmetic on the way back
};

// First order in the Gram matrix's `error`, for eigenvalues values[null .. m) with weights w of their singular
// values: dF = sum w / (2 s) dlambda, and d(w / s) s = s f'(lambda) dlambda with f a sum of inverses.
NarrowLoss narrow_loss(const double* values, const double* sigma, const double* weight, int64_t null, int64_t m,
                       double value, const ShiftedInverses* function, double error) {
  double along = 0.0, squares = 0.0, change = 0.0, trace = 0.0, most = 0.0;
  for (int64_t i = null; i < m; ++i) {
    along += sigma[i] > 0.0 ? std::abs(weight[i]) / (2.0 * sigma[i]) : 0.0;
    squares += weight[i] * weight[i];
    trace += std::max(values[i], 0.0);
    if (function == nullptr) continue;
    double steepness = 0.0, size = 0.0;
    for (size_t s = 0; s < function->shift.size(); ++s) {
      const double inverse = 1.0 / (values[i] + function->shift[s]);
      const double term = std::abs(function->weight[s]) * inverse;
      size += term;
      steepness += term * inverse;
    }
    most = std::max(most, size);
    change += std::max(values[i], 0.0) * steepness * steepness;
  }
  return {error * along / value, error * std::sqrt(change / squares),
          kNarrowEps * most * std::sqrt(trace / squares)};
}

// Bounds on what is a sum over many directions, of which a third or less is seen: far below what the results
// are promised to (docs/definitions.md).
bool is_small(const NarrowLoss& loss) {
  return loss.value < 1e-4 && loss.gradient + loss.rounding < 2e-4;
}

// (I - 1 1^T / m) F (I - 1 1^T / m) of a symmetric matrix.
template <typename P>
void centre_both_ways(P* f, int64_t m, int64_t ld) {
  std::vector<double> mean(static_cast<size_t>(m));
  double total = 0.0;
  for (int64_t i = 0; i < m; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < m; ++j) sum += static_cast<double>(f[i * ld + j]);
    mean[static_cast<size_t>(i)] = sum / static_cast<double>(m);
    total += sum;
  }
  total /= static_cast<double>(m * m);
  for (int64_t i = 0; i < m; ++i) {
    const double own = mean[static_cast<size_t>(i)] - total;
    for (int64_t j = 0; j < m; ++j) f[i * ld + j] -= static_cast<P>(own + mean[static_cast<size_t>(j)]);
  }
}

enum class Outcome {
  kDone,            // the value, and a gradient that is zero or not wanted
  kFunction,        // the gradient is a function of the Gram matrix
  kNarrowFunction,  // and float32 is enough for it
  kInaccurate,      // float32 was not enough for what has been done
  kSteep            // nor is a Gram matrix
};

// Functions of the Gram matrices whose outcome is one, to the targets' slots. `narrow`: of what was reduced.
template <typename T>
void apply_functions(const RowSet* sets, const Spectrum* spectra, const ShiftedInverses* functions,
                     const Outcome* outcome, int64_t count, SpectralTarget<T>* targets, SpectralWorkspace& ws,
                     bool narrow) {
  DSE_STAGE("clusters: gradient matrices");
  const auto is_wanted = [&](int64_t i) {
    return outcome[i] == Outcome::kFunction || outcome[i] == Outcome::kNarrowFunction;
  };
  const ShiftedInverses* chosen[kLanes];
  double* out[kLanes];
  float* narrow_out[kLanes];
  int64_t ld[kLanes], used = 0;
  for (int64_t i = 0; i < count; ++i) {  // in the order of reduce()
    const Spectrum& s = spectra[i];
    if (!s.finite || s.m > kLanesMaxSide) continue;
    chosen[used] = is_wanted(i) ? &functions[i] : nullptr;
    out[used] = s.gram;
    narrow_out[used] = s.narrow_gram;
    ld[used] = narrow ? gram_ld(s.m) : stream_ld(s.m);
    ++used;
  }
  if (used > 0 && narrow) ws.narrow_small.apply(chosen, narrow_out, ld);
  else if (used > 0) ws.small.apply(chosen, out, ld);
  const auto finish = [&](int64_t i, auto* matrix, int64_t own_ld) {
    const Spectrum& s = spectra[i];
    // Centred rows sum to zero: their vector of ones takes no part, whatever the function made of it.
    if (sets[i].center && sets[i].n <= sets[i].x->dim) centre_both_ways(matrix, s.m, own_ld);
    store_matrix(matrix, s.m, s.m, own_ld, targets[i].slot);
    targets[i].form = SavedForm::kGramSide;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (!is_wanted(i)) continue;
    const Spectrum& s = spectra[i];
    if (s.m <= kLanesMaxSide) {
      if (narrow) finish(i, s.narrow_gram, gram_ld(s.m));
      else finish(i, s.gram, stream_ld(s.m));
    } else if (outcome[i] == Outcome::kNarrowFunction) {
      finish(i, ws.large[i].apply_narrow(functions[i]), stream_ld(s.m));
    } else {
      ws.large[i].apply(functions[i], s.gram);
      finish(i, s.gram, stream_ld(s.m));
    }
  }
}

// Features whose squares overflow: no number can be given.
template <typename T>
void fill_nan(const RowSet& set, SpectralTarget<T>& target) {
  target.value = std::numeric_limits<double>::quiet_NaN();
  if (target.slot == nullptr) return;
  std::fill_n(target.slot, set.n * set.x->dim, std::numeric_limits<T>::quiet_NaN());
  target.form = SavedForm::kPolar;
}

// Decomposes the matrix itself: values and the gradient, without the squared condition of the Gram matrix.
template <typename T>
void exact_spectral_function(const RowSet& set, SpectralKind kind, const Spectrum& s, SpectralTarget<T>& target,
                             SpectralWorkspace& ws) {
  double* sigma = s.values + s.m;
  double* weight = sigma + s.m;
  const int64_t d = set.x->dim, n = set.n, m = s.m, ldm = gram_ld(d), ldg = stream_ld(m);
  double* matrix = ws.matrix.reserve(n * ldm);
  gather_rows(set, matrix, ldm);
  double* u = ws.factors.reserve(2 * m * m + m * d + n * d);
  double* r = u + m * m;
  double* vh = r + m * m;
  double* product = vh + m * d;
  const bool rows_side = n <= d;
  if (rows_side) {
    thin_svd(matrix, n, d, ldm, u, sigma, vh);
  } else {  // the triangle has the singular values and right singular vectors of the matrix
    qr_triangle(matrix, n, d, ldm, r);
    thin_svd(r, d, d, d, nullptr, sigma, vh);
  }
  std::fill(sigma + m - s.null, sigma + m, 0.0);
  cut_noise(sigma, m, n, d, s.floor);
  const double value = spectral_value_and_weights(kind, sigma, m, weight);
  if (sizeof(T) == 8 || !s.converged) target.value = value;
  if (target.slot == nullptr) return;
  if (rows_side) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) u[i * m + j] *= weight[j];
    matmul(product, {u, n, m, m, 1}, {vh, m, d, d, 1}, product, d);
  } else {
    for (int64_t j = 0; j < m; ++j) weight[j] = sigma[j] > 0.0 ? weight[j] / sigma[j] : 0.0;
    weighted_projector(vh, weight, m, ws, s.gram, ldg);
    matmul(product, {matrix, n, d, ldm, 1}, {s.gram, d, d, ldg, 1}, product, d);
  }
  store_matrix(product, n, d, d, target.slot);
  target.form = SavedForm::kPolar;
}

}  // namespace

namespace {

// From eigenvalues to the value, and to the gradient's function. `narrow`: float32 took part in the eigenvalues.
template <typename T>
Outcome evaluate(const RowSet& set, SpectralKind kind, const Spectrum& s, SpectralTarget<T>& target, bool narrow,
                 ShiftedInverses& function) {
  target.form = SavedForm::kNone;
  if (narrow && (!s.finite || !s.converged)) return Outcome::kInaccurate;
  if (!s.finite) {
    fill_nan(set, target);
    return Outcome::kDone;
  }
  if (!s.converged) return Outcome::kSteep;
  double* sigma = s.values + s.m;
  double* weight = sigma + s.m;
  const auto no_gradient = [&] {
    if (target.slot != nullptr) {
      std::fill_n(target.slot, s.m * s.m, T(0));
      target.form = SavedForm::kGramSide;
    }
    return Outcome::kDone;
  };
  eigenvalues_to_sigma(s.values, s.m, s.null, s.floor, sigma);
  target.value = spectral_value_and_weights(kind, sigma, s.m, weight);
  const bool wants_gradient = target.slot != nullptr;
  if (sigma[s.m - 1] == 0.0) return no_gradient();
  if (narrow && (!(s.values[s.null] > s.error) || sigma[s.null] == 0.0)) return Outcome::kInaccurate;
  if (!wants_gradient && !narrow && sizeof(T) != 8) return Outcome::kDone;
  if (!wants_gradient && narrow) {
    const NarrowLoss loss = narrow_loss(s.values, sigma, weight, s.null, s.m, target.value, nullptr, s.error);
    return is_small(loss) ? Outcome::kDone : Outcome::kInaccurate;
  }
  if (is_steep(s.values, s.m, s.null, s.floor, steep_ratio<T>()) || sigma[s.null] == 0.0)
    return narrow ? Outcome::kInaccurate : Outcome::kSteep;
  if (!wants_gradient) return Outcome::kDone;
  Part part{s.values + s.null, s.m - s.null, {}};
  if (!gradient_functions(kind, &part, 1, target.value, sigma, weight, s.m, function_error<T>()))
    return no_gradient();
  function = std::move(part.function);
  if (sizeof(T) == 8) return Outcome::kFunction;
  const NarrowLoss loss = narrow_loss(s.values, sigma, weight, s.null, s.m, target.value, &function, s.error);
  if (is_small(loss)) return Outcome::kNarrowFunction;
  return narrow ? Outcome::kInaccurate : Outcome::kFunction;
}

// spectral_functions in one precision. `failed` receives the matrices whose spectra float32 is not enough for.
template <typename T>
void spectral_functions_in(const RowSet* sets, int64_t count, SpectralKind kind, SpectralTarget<T>* targets,
                           SpectralWorkspace& ws, bool narrow, std::vector<int64_t>* failed) {
  Spectrum spectra[kLanes];
  for (int64_t i = 0; i < count; ++i) {
    Spectrum& s = spectra[i];
    s.m = std::min(sets[i].n, sets[i].x->dim);
    s.values = ws.spectrum[i].reserve(3 * s.m);
    if (narrow && s.m <= kLanesMaxSide) s.narrow_gram = ws.narrow_gram[i].reserve(s.m * gram_ld(s.m));
    else s.gram = ws.gram[i].reserve(s.m * stream_ld(s.m));
    if (narrow) fill_narrow_gram(sets[i], s, ws);
    else fill_gram(sets[i], s, ws);
  }
  decompose(spectra, count, ws, narrow);

  ShiftedInverses functions[kLanes];
  Outcome outcome[kLanes];
  Spectrum* again[kLanes];
  Tridiagonal* matrices[kLanes];
  int64_t count_again = 0;
  for (int64_t i = 0; i < count; ++i) {
    Spectrum& s = spectra[i];
    outcome[i] = evaluate(sets[i], kind, s, targets[i], narrow, functions[i]);
    if (outcome[i] != Outcome::kInaccurate || s.m <= kLanesMaxSide || !s.finite || s.narrow_products) continue;
    // The Gram matrix is as good as it gets, and its reduction can be taken up where float32 began.
    DSE_STAGE("clusters: tridiagonal form, eigenvalues");
    ws.large[i].reduce_again(s.gram);
    s.error = 0.0;
    again[count_again] = &s;
    matrices[count_again++] = &ws.large[i];
  }
  if (count_again > 0) large_eigenvalues(again, matrices, count_again, ws);
  for (int64_t j = 0; j < count_again; ++j) {
    const int64_t i = again[j] - spectra;
    outcome[i] = evaluate(sets[i], kind, spectra[i], targets[i], false, functions[i]);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (outcome[i] == Outcome::kInaccurate) failed->push_back(i);
    if (outcome[i] == Outcome::kSteep) exact_spectral_function(sets[i], kind, spectra[i], targets[i], ws);
  }
  apply_functions(sets, spectra, functions, outcome, count, targets, ws, narrow);
}

}  // namespace

template <typename T>
int64_t spectral_functions(const RowSet* sets, int64_t count, SpectralKind kind, SpectralTarget<T>* targets,
                           SpectralWorkspace& ws, bool narrow) {
  if (!narrow || sizeof(T) == 8) {
    spectral_functions_in(sets, count, kind, targets, ws, false, nullptr);
    return 0;
  }
  std::vector<int64_t> failed;
  spectral_functions_in(sets, count, kind, targets, ws, true, &failed);
  if (failed.empty()) return 0;
  RowSet again[kLanes];
  SpectralTarget<T> again_targets[kLanes];
  const auto total = static_cast<int64_t>(failed.size());
  for (int64_t i = 0; i < total; ++i) {
    again[i] = sets[failed[static_cast<size_t>(i)]];
    again_targets[i].slot = targets[failed[static_cast<size_t>(i)]].slot;
  }
  spectral_functions_in(again, total, kind, again_targets, ws, false, nullptr);
  for (int64_t i = 0; i < total; ++i) targets[failed[static_cast<size_t>(i)]] = again_targets[i];
  return total;
}

template int64_t spectral_functions<float>(const RowSet*, int64_t, SpectralKind, SpectralTarget<float>*,
                                           SpectralWorkspace&, bool);
template int64_t spectral_functions<double>(const RowSet*, int64_t, SpectralKind, SpectralTarget<double>*,
                                            SpectralWorkspace&, bool);

void StreamedRank::measure(const RowSet& set, bool exact) {
  DSE_STAGE("rank: second moment");
  set_ = set;
  m_ = std::min(set.n, set.x->dim);
  const int64_t ldg = stream_ld(m_);
  double* gram = ws_.gram[0].reserve(m_ * ldg);
  const bool columns = set.n > set.x->dim;
  // Unit rows only: their squares cannot leave float32's range. Small matrices cost nothing either way, and of
  // few rows the smallest eigenvalue is seldom large enough.
  bool narrow = !exact && columns && set.n >= 4 * m_ && set.x->unit_rows && set.x->dtype != DType::kFloat64 &&
                m_ > kLanesMaxSide;
  double magnitude = 0.0;
  const auto trace = [&] {
    double total = 0.0;
    for (int64_t i = 0; i < m_; ++i) total += gram[i * ldg + i];
    return total;
  };
  if (narrow) {
    magnitude = column_gram<float>(set, gram);
    mirror_upper(gram, m_, ldg);
    Buffer<float> work(m_ * m_);
    narrow = exceeds(gram, m_, ldg, kNarrowGramFloor * trace() / static_cast<double>(m_), work.data());
  }
  gram_error_ = narrow ? narrow_products(set.n) * trace() : 0.0;
  if (!narrow) magnitude = columns ? column_gram<double>(set, gram) : row_gram(set, gram);
  floor_ = noise_floor(magnitude, set.n);
  null_ = count_null(gram, m_, ldg, set.center && !columns);
  mirror_upper(gram, m_, ldg);
  finite_ = std::isfinite(trace());
}

bool StreamedRank::find_eigenvalues() {
  const Tridiagonal& matrix = ws_.large[0];
  double* values = ws_.spectrum[0].data();
  const double* diagonal = matrix.diagonal();
  const double* couplings = matrix.couplings();
  const bool converged = tridiagonal_eigenvalues(1, &diagonal, &couplings, &m_, &values, ws_.values);
  for (int64_t i = 0; i < m_; ++i) values[i] /= matrix.scale();
  return converged;
}

void StreamedRank::decompose(bool exact) {
  DSE_STAGE("rank: tridiagonal form, eigenvalues");
  if (!finite_) return;
  const int64_t ldg = stream_ld(m_);
  double* gram = ws_.gram[0].data();
  double* values = ws_.spectrum[0].reserve(3 * m_);
  if (m_ <= kLanesMaxSide) {
    const double* matrix = gram;
    converged_ = ws_.small.reduce(1, &matrix, &m_, &ldg, &values);
    return;
  }
  Tridiagonal& matrix = ws_.large[0];
  const bool mixed = !exact && null_ == 0;
  // Where float32 products were good enough, the spectrum is so flat that one block is.
  if (mixed) matrix.reduce_mixed(gram, m_, ldg, gram_error_ > 0.0 ? 0 : m_ / kWideShare);
  else matrix.reduce(gram, m_, ldg);
  converged_ = find_eigenvalues();
  if (!mixed) return;
  const double error = gram_error_ + matrix.error();
  if (converged_ && values[0] > error) {
    double* sigma = values + m_;
    double* weight = sigma + m_;
    eigenvalues_to_sigma(values, m_, 0, floor_, sigma);
    const double value = spectral_value_and_weights(SpectralKind::kEffectiveRank, sigma, m_, weight);
    Part part{values, m_, {}};
    // At its maximum there is no gradient to be accurate about.
    if (sigma[0] > 0.0 && gradient_functions(SpectralKind::kEffectiveRank, &part, 1, value, sigma, weight, m_,
                                             function_error<float>()) &&
        is_small(narrow_loss(values, sigma, weight, 0, m_, value, &part.function, error)))
      return;
  }
  matrix.reduce_again(gram);
  converged_ = find_eigenvalues();
}

double StreamedRank::finish(bool exact, double* gradient, RankForm* form) {
  DSE_STAGE("rank: gradient matrix");
  const int64_t ldg = stream_ld(m_);
  *form = {};
  bool steep = false;
  if (!finite_) {  // squares overflow: no number can be given
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (gradient != nullptr) std::fill_n(gradient, m_ * m_, nan);
    return nan;
  }
  double* values = ws_.spectrum[0].data();
  double* sigma = values + m_;
  double* weight = sigma + m_;
  double* gram = ws_.gram[0].data();
  double result = 0.0;
  if (converged_) {
    eigenvalues_to_sigma(values, m_, null_, floor_, sigma);
    result = spectral_value_and_weights(SpectralKind::kEffectiveRank, sigma, m_, weight);
    if (sigma[m_ - 1] == 0.0) {
      if (gradient != nullptr) std::fill_n(gradient, m_ * m_, 0.0);
      return result;
    }
    steep = (gradient != nullptr || exact) &&
            (is_steep(values, m_, null_, floor_, exact ? steep_ratio<double>() : steep_ratio<float>()) ||
             sigma[null_] == 0.0);
  }
  if (steep || !converged_) {
    if (const auto value = finish_in_two_parts(exact, gradient, form)) return *value;
    form->steep = true;
    const double value = finish_exactly(gradient);
    return exact || !converged_ ? value : result;
  }
  if (gradient == nullptr) return result;
  Part part{values + null_, m_ - null_, {}};
  if (!gradient_functions(SpectralKind::kEffectiveRank, &part, 1, result, sigma, weight, m_,
                          exact ? function_error<double>() : function_error<float>())) {
    std::fill_n(gradient, m_ * m_, 0.0);
    return result;
  }
  if (m_ <= kLanesMaxSide) {
    const ShiftedInverses* functions = &part.function;
    ws_.small.apply(&functions, &gram, &ldg);
  } else if (!exact && is_small(narrow_loss(values, sigma, weight, null_, m_, result, &part.function,
                                             ws_.large[0].error()))) {
    float* narrow = ws_.large[0].apply_narrow(part.function);
    if (set_.center && set_.n <= set_.x->dim) centre_both_ways(narrow, m_, ldg);
    store_matrix(narrow, m_, m_, ldg, gradient);
    return result;
  } else {
    ws_.large[0].apply(part.function, gram);
  }
  if (set_.center && set_.n <= set_.x->dim) centre_both_ways(gram, m_, ldg);
  store_matrix(gram, m_, m_, ldg, gradient);
  return result;
}

// Where only a few eigenvalues are out of the Gram matrix's reach and well below the others, as behind a layer
// normalization, whose features sum to zero but for rounding: their eigenvectors V are within reach all the same,
// and so is the small matrix of X V, whose squares are not lost beside larger ones.
std::optional<double> StreamedRank::finish_in_two_parts(bool exact, double* gradient, RankForm* form) {
  constexpr int64_t kMost = 32;  // eigenvalues of the small part
  constexpr double kGap = 1e3;
  const int64_t m = m_, d = set_.x->dim, ldg = stream_ld(m);
  if (!converged_ || null_ > 0 || m <= kLanesMaxSide || set_.n <= d || set_.center) return std::nullopt;
  double* values = ws_.spectrum[0].data();
  double* sigma = values + m;
  double* weight = sigma + m;
  const double ratio = exact ? steep_ratio<double>() : steep_ratio<float>(), largest = values[m - 1];
  const int64_t few = std::lower_bound(values, values + m, ratio * largest) - values;
  if (few == 0 || few > kMost || values[few] < kGap * std::max(std::abs(values[0]), values[few - 1]))
    return std::nullopt;

  Tridiagonal& matrix = ws_.large[0];
  double* basis = ws_.factors.reserve(few * m + 2 * few * m);
  matrix.smallest_subspace(few, std::max(std::abs(values[0]), values[few - 1]), basis);
  const int64_t ld = gram_ld(few);
  Buffer<double> part(few * ld);
  projected_gram(set_, basis, few, part.data(), ld);
  double part_values[kMost];
  const double* part_matrix = part.data();
  double* part_target = part_values;
  if (!ws_.small.reduce(1, &part_matrix, &few, &ld, &part_target)) return std::nullopt;

  eigenvalues_to_sigma(values, m, few, floor_, sigma);
  for (int64_t i = 0; i < few; ++i) sigma[i] = std::sqrt(std::max(part_values[i], 0.0));
  cut_noise(sigma, m, set_.n, d, floor_);
  const bool vanishes = sigma[few - 1] == 0.0;
  // What is left of the small part is to be accurate, or nothing is to be left.
  if (!vanishes && (exact || sigma[0] == 0.0 || part_values[0] < ratio * part_values[few - 1]))
    return std::nullopt;
  const double value = spectral_value_and_weights(SpectralKind::kEffectiveRank, sigma, m, weight);
  if (!vanishes) *form = {true, few};
  if (gradient == nullptr) return value;

  Part parts[2]{{values + few, m - few, {}}, {part_values, few, {}}};
  if (!gradient_functions(SpectralKind::kEffectiveRank, parts, vanishes ? 1 : 2, value, sigma, weight, m,
                          exact ? function_error<double>() : function_error<float>())) {
    std::fill_n(gradient, m * m, 0.0);
    return value;
  }
  double* gram = ws_.gram[0].data();
  matrix.apply(parts[0].function, gram);
  // (I - V V^T) F (I - V V^T) + V f V^T = F - V W^T - W V^T, W = F V - V (V^T F V + f) / 2.
  std::fill(part.data(), part.data() + few * ld, 0.0);
  if (!vanishes) {
    const ShiftedInverses* functions = &parts[1].function;
    double* target = part.data();
    ws_.small.apply(&functions, &target, &ld);
  }
  double* turned = basis + few * m;
  double* update = turned + few * m;
  multiply_rows(gram, m, ldg, few, basis, turned);
  for (int64_t r = 0; r < few; ++r) {
    double* w = update + r * m;
    std::copy_n(turned + r * m, m, w);
    for (int64_t q = 0; q < few; ++q)
      axpy(-0.5 * (dot(turned + r * m, basis + q * m, m) + part[q * ld + r]), basis + q * m, w, m);
  }
  subtract_both_ways(gram, m, ldg, few, basis, update);
  store_matrix(gram, m, m, ldg, gradient);
  return value;
}

// By a singular value decomposition of the matrix or of its triangular factor.
double StreamedRank::finish_exactly(double* gradient) {
  const int64_t d = set_.x->dim, n = set_.n, ldg = stream_ld(m_);
  double* sigma = ws_.spectrum[0].data() + m_;
  double* weight = sigma + m_;
  double* r = ws_.factors.reserve(m_ * d + m_ * m_);
  double* basis = r + m_ * d;  // left singular vectors (n <= d) or right ones, as rows
  if (n <= d) {
    Buffer<double> matrix(n * d), u(m_ * m_);
    gather_rows(set_, matrix.data(), d);
    thin_svd(matrix.data(), n, d, d, u.data(), sigma, nullptr);
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < m_; ++j) basis[j * m_ + i] = u[i * m_ + j];
  } else {
    streamed_triangle(set_, r);
    thin_svd(r, d, d, d, nullptr, sigma, basis);
  }
  std::fill(sigma + m_ - null_, sigma + m_, 0.0);
  cut_noise(sigma, m_, n, d, floor_);
  const double value = spectral_value_and_weights(SpectralKind::kEffectiveRank, sigma, m_, weight);
  if (gradient == nullptr) return value;
  for (int64_t i = 0; i < m_; ++i) weight[i] = sigma[i] > 0.0 ? weight[i] / sigma[i] : 0.0;
  weighted_projector(basis, weight, m_, ws_, ws_.gram[0].data(), ldg);
  store_matrix(ws_.gram[0].data(), m_, m_, ldg, gradient);
  return value;
}

}  // namespace dse::cpu
