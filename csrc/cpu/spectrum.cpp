// Every cluster goes through the Gram matrix of its smaller side. It is reduced to tridiagonal form, whose
// eigenvalues are the squares of the singular values; the gradient's matrix is a function of it (tridiagonal.h).
//
// Three precisions, of which the first that is accurate is taken: float32, large matrices but for the products'
// sums and the first columns of the reduction; a float64 Gram matrix, exact enough for singular values above
// about 1e-7 of the largest; and, where a gradient (or a float64 result) needs smaller ones and the spectrum has
// them, a singular value decomposition of the matrix itself. Whether float32 was enough is read from the
// eigenvalues afterwards (NarrowLoss): no case is guessed, but some are done twice.

#include "cpu/spectrum.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/aten.h"
#include "cpu/dense.h"
#include "cpu/products.h"
#include "cpu/projector.h"
#include "cpu/short_products.h"
#include "cpu/singular_values.h"
#include "cpu/stage.h"
#include "cpu/streamed.h"
#include "cpu/tridiagonal_traces.h"

namespace dse::cpu {
namespace {

// Error of a Gram matrix of float32 products that are summed in float64 every 80, in units of the norm of its
// diagonal: products of two rows err with the lengths of both.
constexpr double kProducts = 4e-8;
// The same of sums of 16-bit products, which are exact over kShortRun of them and float32 over kShortRows.
constexpr double kShortSums = 2e-9;
constexpr double kNarrowEps = std::numeric_limits<float>::epsilon();

// One matrix on its way through spectral_functions.
struct Spectrum {
  int64_t m = 0, null = 0;  // side of the Gram matrix; eigenvalues known to be zero
  double floor = 0.0;       // singular values below are rounding
  bool finite = true;
  bool converged = true;
  double* gram = nullptr;        // of large sides: until it is reduced
  float* narrow_gram = nullptr;  // instead, of small sides
  bool narrow_products = false;  // the Gram matrix is of float32 products
  double lifted = 0.0;           // where the eigenvalue of a vector of ones was moved to
  double error = 0.0;            // of the Gram matrix and its tridiagonal form, about
  double row_error = 0.0;        // of the entries of the rows that it belongs to
  double* values = nullptr;
};

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
  if (s.m <= kLanesMaxSide) mirror(s.gram, ldg, 0, s.m, s.m);
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
  mirror(gram, ldg, 0, m, m);
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
    for (int64_t i = 0; i < m; i += kGramTile)
      for (int64_t j = i; j < m; j += kGramTile)
        panel_gram_upper(panels, height, s.gram, ldg, i, std::min(m, i + kGramTile), j,
                         std::min(m, j + kGramTile));
  }
}

// A large one in 16-bit products.
void fill_short_gram(const float* matrix, const RowSet& set, Spectrum& s, SpectralWorkspace& ws) {
  const int64_t d = set.x->dim, n = set.n, m = s.m, ldg = stream_ld(m);
  std::fill(s.gram, s.gram + m * ldg, 0.0);
  const auto add_products = [&](const ShortPair* panels, int64_t height, int64_t pairs, const float* step) {
    for (int64_t i = 0; i < m; i += kGramTile)
      short_gram_upper(panels, height, pairs, step, s.gram, ldg, i, std::min(m, i + kGramTile), i, m);
  };
  double squares = 0.0;  // of the steps
  if (n <= d) {
    ShortMatrix& rows = ws.short_rows;
    rows.reserve(d, n, kShortPanel);
    for (int64_t i = 0; i < n; i += kShortPanel)
      rows.set_columns(i, std::min(kShortPanel, n - i), matrix + i * d, d);
    rows.clear_columns(n, ldg - n);
    for (int64_t p = 0; p < rows.pairs(); p += kShortRows / 2)
      add_products(rows.data(0) + p * kShortPanel, rows.pairs(), std::min(kShortRows / 2, rows.pairs() - p),
                   rows.step());
    for (int64_t i = 0; i < n; ++i)
      squares += static_cast<double>(rows.step()[i]) * static_cast<double>(rows.step()[i]);
    s.row_error = std::sqrt(squares / (12.0 * static_cast<double>(n)));
    return;
  }
  ShortPair* panels = ws.short_panels.reserve(kShortRows / 2 * ldg + kShortSlack);
  float* step = ws.narrow_turned.reserve(ldg + kShortRows * kShortPanel);
  float* panel = step + ldg;
  for (int64_t r = 0; r < n; r += kShortRows) {
    const int64_t rows = std::min(kShortRows, n - r), pairs = (rows + 1) / 2;
    for (int64_t first = 0; first < d; first += kShortPanel) {
      const int64_t width = std::min(kShortPanel, d - first);
      copy_panel(matrix + r * d + first, d, rows, width, panel);
      quantize_columns(panel, rows, panels + first * pairs, step + first);
    }
    add_products(panels, pairs, pairs, step);
    for (int64_t f = 0; f < d; ++f)
      squares += static_cast<double>(step[f]) * static_cast<double>(step[f]) * static_cast<double>(rows);
  }
  s.row_error = std::sqrt(squares / (12.0 * static_cast<double>(n * d)));
}

// The vector of ones, which centred rows have as a null vector, moved to the middle of the spectrum: a function
// of the matrix need not be tame at zero then.
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
  return 100 * set.n > 97 * d && 100 * set.n < 106 * d;
}

// So nearly that a float32 reduction is tried in vain, as a rule.
bool is_square(const RowSet& set) {
  const int64_t d = set.x->dim;
  return 1000 * set.n > 985 * d && 1000 * set.n < 1040 * d;
}

void fill_narrow_gram(const RowSet& set, Spectrum& s, SpectralWorkspace& ws) {
  const bool is_large = s.m > kLanesMaxSide, is_short = is_large && uses_short_products();
  if (is_large && !is_short && is_nearly_square(set)) {
    fill_gram(set, s, ws);
  } else {
    DSE_STAGE("clusters: Gram matrices");
    float* matrix = ws.narrow_matrix.reserve(set.n * set.x->dim);
    const double magnitude = gather_rows(set, matrix, set.x->dim);
    s.floor = noise_floor(magnitude, set.n);
    if (is_short) fill_short_gram(matrix, set, s, ws);
    else if (is_large) fill_large_gram(matrix, set, s, ws);
    else fill_small_gram(matrix, set, s, ws);
    const bool zero_sum = set.center && set.n <= set.x->dim;
    double trace = 0.0, squares = 0.0;
    const auto look = [&](const auto* gram, int64_t ld) {
      s.null = count_null(gram, s.m, ld, zero_sum);
      for (int64_t i = 0; i < s.m; ++i) {
        const double own = static_cast<double>(gram[i * ld + i]);
        trace += own;
        squares += own * own;
      }
    };
    if (is_large) look(s.gram, stream_ld(s.m));
    else look(s.narrow_gram, gram_ld(s.m));
    // Squares that leave float32's range are float64's, and so are rows that may have left it when they were
    // centred.
    s.finite = trace > 1e-20 && trace < 1e30 && magnitude < 1e30;
    s.error = is_large ? (is_short ? kShortSums : kProducts) * std::sqrt(squares) : 0.0;
    // Roundings E of the rows add E E^T or E^T E, as good as a multiple of the identity.
    s.error += s.row_error * s.row_error * static_cast<double>(std::max(set.n, set.x->dim));
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

// Whether the traces of evaluate_by_traces() do: for float32 results of large matrices without zero eigenvalues
// but the one that was lifted.
template <typename T>
bool is_traced(const Spectrum& s, SpectralKind kind) {
  return sizeof(T) == 4 && kind == SpectralKind::kNuclearNorm && s.m > kLanesMaxSide &&
         s.null == (s.lifted > 0.0 ? 1 : 0);
}

// Eigenvalues of what was reduced, and of the small Gram matrices, which are destroyed.
template <typename T>
void find_eigenvalues(SpectralKind kind, Spectrum* spectra, int64_t count, SpectralWorkspace& ws, bool narrow) {
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
      s.error += ws.large[i].error();
      if (is_traced<T>(s, kind)) continue;
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
    s.error = 4.0 * kNarrowEps * std::abs(s.values[s.m - 1]);
    if (s.lifted > 0.0) drop_lifted(s);
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
  const auto finish = [&](int64_t i, auto* matrix, int64_t own_ld, double unit = 1.0) {
    const Spectrum& s = spectra[i];
    // Centred rows sum to zero: their vector of ones takes no part, whatever the function made of it.
    if (sets[i].center && sets[i].n <= sets[i].x->dim) centre_both_ways(matrix, s.m, own_ld);
    store_triangle(matrix, s.m, own_ld, targets[i].slot, unit);
    if (targets[i].form == SavedForm::kNone) targets[i].form = SavedForm::kGramSide;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (!is_wanted(i)) continue;
    const Spectrum& s = spectra[i];
    if (s.m <= kLanesMaxSide) {
      if (narrow) finish(i, s.narrow_gram, gram_ld(s.m));
      else finish(i, s.gram, stream_ld(s.m));
    } else if (outcome[i] == Outcome::kNarrowFunction) {
      double unit = 1.0;
      float* matrix = ws.large[i].apply_narrow(functions[i], &unit);
      finish(i, matrix, stream_ld(s.m), unit);
    } else {
      double* matrix = ws.large_gram.reserve(s.m * stream_ld(s.m));
      ws.large[i].apply(functions[i], matrix);
      finish(i, matrix, stream_ld(s.m));
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
    double* projector = ws.large_gram.reserve(m * ldg);
    weighted_projector(vh, weight, m, ws.scaled, projector, ldg);
    matmul(product, {matrix, n, d, ldm, 1}, {projector, d, d, ldg, 1}, product, d);
  }
  store_matrix(product, n, d, d, target.slot);
  target.form = SavedForm::kPolar;
}

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
      std::fill_n(target.slot, s.m * (s.m + 1) / 2, T(0));
      target.form = SavedForm::kGramSide;
    }
    return Outcome::kDone;
  };
  eigenvalues_to_sigma(s.values, s.m, s.null, s.floor, sigma);
  target.value = spectral_value_and_weights(kind, sigma, s.m, weight);
  const bool wants_gradient = target.slot != nullptr;
  if (sigma[s.m - 1] == 0.0) return no_gradient();
  if (narrow && (!(s.values[s.null] > s.error) || sigma[s.null] == 0.0)) return Outcome::kInaccurate;
  // Without a gradient as with one in everything that the value depends on: it is the same.
  if (!wants_gradient && !narrow && sizeof(T) != 8) return Outcome::kDone;
  if (is_steep(s.values, s.m, s.null, s.floor, steep_ratio<T>()) || sigma[s.null] == 0.0)
    return narrow ? Outcome::kInaccurate : Outcome::kSteep;
  if (!wants_gradient && !narrow) return Outcome::kDone;
  Part part = Part::of(s.values + s.null, s.m - s.null);
  if (!gradient_functions(kind, &part, 1, target.value, SingularSums::of(sigma, weight, s.m),
                          function_error<T>()))
    return no_gradient();
  function = std::move(part.function);
  if (sizeof(T) == 8) return Outcome::kFunction;
  const NarrowLoss loss = narrow_loss(s.values, sigma, weight, s.null, s.lifted > 0.0 ? 1 : 0, s.m, target.value,
                                      function, s.error, s.row_error);
  if (loss.is_small() && loss.rows < kShortLoss)
    return wants_gradient ? Outcome::kNarrowFunction : Outcome::kDone;
  return narrow ? Outcome::kInaccurate : Outcome::kFunction;
}

// The same for a nuclear norm of what is_traced(): the sum of square roots is a sum of traces of inverses, and so
// is what float32 costs. kInaccurate of a float64 matrix (not `narrow`) speaks of the traces only: eigenvalues
// have to tell.
template <typename T>
Outcome evaluate_by_traces(const RowSet& set, const Spectrum& s, const Tridiagonal& matrix,
                           SpectralTarget<T>& target, bool narrow, ShiftedInverses& function,
                           Buffer<double>& work) {
  DSE_STAGE("clusters: tridiagonal form, eigenvalues");
  constexpr double kValueError = 1e-8;
  target.form = SavedForm::kNone;
  if (!s.finite) return Outcome::kInaccurate;
  const double* diagonal = matrix.diagonal();
  const double* couplings = matrix.couplings();
  const double scale = matrix.scale();
  const double largest = largest_bound(diagonal, couplings, 0, s.m);
  const double smallest = smallest_eigenvalue(s.m, diagonal, couplings, largest);
  if (smallest < steep_ratio<T>() * largest || !(smallest > std::max(s.error, s.floor * s.floor) * scale))
    return Outcome::kInaccurate;

  ShiftedInverses root = inverse_square_root(smallest, largest, kValueError);
  root.shift.push_back(0.0);
  std::vector<double> traces(root.shift.size());
  inverse_traces(s.m, diagonal, couplings, root.size(), root.shift.data(), traces.data(), work);
  PowerSums sums;
  sums.count = s.m - s.null;
  for (int64_t i = 0; i < s.m; ++i) sums.eigenvalues += diagonal[i] / scale;
  for (size_t i = 0; i < root.weight.size(); ++i) {  // T (T + s)^-1 = I - s (T + s)^-1
    sums.roots += root.weight[i] * (static_cast<double>(s.m) - root.shift[i] * traces[i]);
    sums.inverse_roots += root.weight[i] * traces[i];
  }
  sums.roots /= std::sqrt(scale);
  sums.inverse_roots *= std::sqrt(scale);
  sums.inverses = traces.back() * scale;
  if (s.lifted > 0.0) {
    sums.roots -= std::sqrt(s.lifted);
    sums.eigenvalues -= s.lifted;
    sums.inverse_roots -= 1.0 / std::sqrt(s.lifted);
    sums.inverses -= 1.0 / s.lifted;
  }
  const NarrowLoss loss = nuclear_norm_loss(sums, std::max(set.n, set.x->dim), s.error, s.row_error);
  const bool rounds = loss.same_rows < loss.rows;
  const double rows = rounds ? loss.same_rows : loss.rows;
  const bool is_narrow = loss.is_small() && rows < kShortLoss;
  if (narrow && !is_narrow) return Outcome::kInaccurate;
  // The product's errors in 16 bits are independent of those.
  const bool is_short = s.row_error > 0.0 && std::hypot(rows, kShortRounding * loss.amplification) < kShortLoss;
  target.value = sums.roots;
  if (rounds) target.form = is_short ? SavedForm::kRoundedShortGramSide : SavedForm::kRoundedGramSide;
  else target.form = is_short ? SavedForm::kShortGramSide : SavedForm::kGramSide;
  if (target.slot == nullptr) return Outcome::kDone;
  function = inverse_square_root(smallest / scale, largest / scale, function_error<T>());
  return is_narrow ? Outcome::kNarrowFunction : Outcome::kFunction;
}

// spectral_functions in one precision. Returns the matrices whose spectra float32 is not enough for.
template <typename T>
std::vector<int64_t> spectral_functions_in(const RowSet* sets, int64_t count, SpectralKind kind,
                                           SpectralTarget<T>* targets, SpectralWorkspace& ws, bool narrow) {
  Spectrum spectra[kLanes];
  for (int64_t i = 0; i < count; ++i) {
    Spectrum& s = spectra[i];
    s.m = std::min(sets[i].n, sets[i].x->dim);
    s.values = ws.spectrum[i].reserve(3 * s.m);
    const bool large = s.m > kLanesMaxSide;
    if (narrow && !large) s.narrow_gram = ws.narrow_gram[i].reserve(s.m * gram_ld(s.m));
    else s.gram = (large ? ws.large_gram : ws.gram[i]).reserve(s.m * stream_ld(s.m));
    if (narrow) fill_narrow_gram(sets[i], s, ws);
    else fill_gram(sets[i], s, ws);
    if (!large || !s.finite) continue;
    if (!narrow && sizeof(T) == 4 && kind == SpectralKind::kNuclearNorm && sets[i].center &&
        sets[i].n <= sets[i].x->dim)
      lift_ones(s.gram, stream_ld(s.m), s);
    // While it is in the cache.
    DSE_STAGE("clusters: tridiagonal form, eigenvalues");
    if (narrow && !is_square(sets[i]))
      ws.large[i].reduce_mixed(s.gram, s.m, stream_ld(s.m), s.m / kWideShare,
                               flat_share(s.m, std::max(sets[i].n, sets[i].x->dim)));
    else ws.large[i].reduce(s.gram, s.m, stream_ld(s.m));
    s.gram = nullptr;  // the next one's
  }
  find_eigenvalues<T>(kind, spectra, count, ws, narrow);

  ShiftedInverses functions[kLanes];
  Outcome outcome[kLanes];
  std::vector<int64_t> failed;
  for (int64_t i = 0; i < count; ++i) {
    Spectrum& s = spectra[i];
    Tridiagonal* matrix = &ws.large[i];
    const bool traced = is_traced<T>(s, kind);
    outcome[i] = traced ? evaluate_by_traces(sets[i], s, *matrix, targets[i], narrow, functions[i], ws.values)
                        : evaluate(sets[i], kind, s, targets[i], narrow, functions[i]);
    if (traced && !narrow && outcome[i] == Outcome::kInaccurate) {
      Spectrum* const one = &s;
      if (s.finite) large_eigenvalues(&one, &matrix, 1, ws);
      outcome[i] = evaluate(sets[i], kind, s, targets[i], narrow, functions[i]);
    }
    if (outcome[i] == Outcome::kInaccurate) failed.push_back(i);
    if (outcome[i] == Outcome::kSteep) exact_spectral_function(sets[i], kind, spectra[i], targets[i], ws);
  }
  apply_functions(sets, spectra, functions, outcome, count, targets, ws, narrow);
  return failed;
}

}  // namespace

template <typename T>
int64_t spectral_functions(const RowSet* sets, int64_t count, SpectralKind kind, SpectralTarget<T>* targets,
                           SpectralWorkspace& ws, bool narrow) {
  if (!narrow || sizeof(T) == 8) {
    spectral_functions_in(sets, count, kind, targets, ws, false);
    return 0;
  }
  const std::vector<int64_t> failed = spectral_functions_in(sets, count, kind, targets, ws, true);
  if (failed.empty()) return 0;
  RowSet again[kLanes];
  SpectralTarget<T> again_targets[kLanes];
  const auto total = static_cast<int64_t>(failed.size());
  for (int64_t i = 0; i < total; ++i) {
    again[i] = sets[failed[static_cast<size_t>(i)]];
    again_targets[i].slot = targets[failed[static_cast<size_t>(i)]].slot;
  }
  spectral_functions_in(again, total, kind, again_targets, ws, false);
  for (int64_t i = 0; i < total; ++i) targets[failed[static_cast<size_t>(i)]] = again_targets[i];
  return total;
}

template int64_t spectral_functions<float>(const RowSet*, int64_t, SpectralKind, SpectralTarget<float>*,
                                           SpectralWorkspace&, bool);
template int64_t spectral_functions<double>(const RowSet*, int64_t, SpectralKind, SpectralTarget<double>*,
                                            SpectralWorkspace&, bool);

}  // namespace dse::cpu
