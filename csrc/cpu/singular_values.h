// From the eigenvalues of a Gram matrix to the singular values, and from these to the function that a gradient
// is.
#pragma once

#include <cstdint>
#include <functional>

#include "common/spectral.h"
#include "cpu/shifts.h"

namespace dse::cpu {

// Smallest eigenvalue ratio of a float64 Gram matrix that still gives singular vectors accurate to about 1e-6
// (float32 results) and 1e-9 (float64 results).
template <typename T>
constexpr double steep_ratio() {
  return sizeof(T) == 8 ? 1e-6 : 1e-9;
}

// Error of the sums of inverses, relative to each singular value's share of the gradient.
template <typename T>
constexpr double function_error() {
  return sizeof(T) == 8 ? 1e-11 : 3e-6;
}

// Below this, singular values are rounding of the rows themselves, whose root mean square norm is `magnitude`.
double noise_floor(double magnitude, int64_t n);

// Singular values from eigenvalues (ascending). `structural_null` eigenvalues are known to be zero.
void eigenvalues_to_sigma(const double* values, int64_t m, int64_t structural_null, double floor, double* sigma);

bool is_steep(const double* values, int64_t m, int64_t structural_null, double floor, double ratio);

// Zeroes singular values (any order) that are rounding of the decomposition.
void cut_noise(double* sigma, int64_t m, int64_t n, int64_t d, double floor);

// The eigenvalues of a Gram matrix, or of the part of one that a small matrix stands for.
struct Part {
  double smallest, largest;
  std::function<double(const ShiftedInverses&)> sum_times;  // the sum of lambda f(lambda)
  ShiftedInverses function;                                 // out: V diag(w / s) V^T as a function of the matrix

  // Of `count` eigenvalues, ascending.
  static Part of(const double* values, int64_t count);
};

// The sum of singular values and the largest magnitude of their weights.
struct SingularSums {
  double sum = 0.0, most_weight = 0.0;

  static SingularSums of(const double* sigma, const double* weight, int64_t m);
};

// The gradient's functions of all parts together, of spectral_value_and_weights. Returns whether there is any
// gradient.
bool gradient_functions(SpectralKind kind, Part* parts, int64_t count, double value, const SingularSums& sums,
                        double error);

// What results lose to float32, relative to themselves.
struct NarrowLoss {
  double value = 0.0;     // by an error of the Gram matrix
  double gradient = 0.0;  // the same
  double rounding = 0.0;  // of the gradient: float32 arithmetic on the way back
  // Of the gradient: by independent errors of the rows' entries, where the Gram matrix alone has them, and where
  // what it is multiplied with has the same (nuclear norms only).
  double rows = 0.0, same_rows = 0.0;
  // How much larger, relative to the gradient f(A) X, independent errors of the entries of X, or of f(A) relative
  // to themselves, become, the mean of f's values apart: of (f(A) - mean) X.
  double amplification = 1.0;

  // The bounds are on sums over many directions in which errors do not agree: of the value, a thirtieth is seen,
  // of the gradient about what the bound says (docs/definitions.md).
  bool is_small() const { return value < 1e-4 && gradient + rounding < 2e-4; }
};

// To first order in the Gram matrix's error, of which `error` is the norm, for eigenvalues values[null .. m) with
// weights w of their singular values: dF = sum w / (2 s) dlambda, and df(A) X, whose entries in the eigenvectors'
// basis are those of the error times divided differences of f. Rounding has no preferred direction: an entry is
// taken to be error / sqrt(m), twice what a random symmetric matrix of that norm has. The first `null`
// eigenvalues are zero, and of these the first `lifted` are not the matrix's: what f is at the others rounds
// beside the rest. Errors of the rows' entries, of root mean square `row_error`, change the Gram matrix's entry
// of two eigenvectors by that times the singular values of both.
NarrowLoss narrow_loss(const double* values, const double* sigma, const double* weight, int64_t null,
                       int64_t lifted, int64_t m, double value, const ShiftedInverses& function, double error,
                       double row_error = 0.0);

// Sums over the eigenvalues that are not known to be zero, with lambda to the power that the name says.
struct PowerSums {
  int64_t count = 0;
  double roots = 0.0, eigenvalues = 0.0, inverse_roots = 0.0, inverses = 0.0;
};

// narrow_loss() of a nuclear norm, of a matrix of `longer` rows or columns. Its divided differences are
// -1 / (s t (s + t)) for singular values s and t, so that their squares times s^2 + t^2 are at most 1 / (s t)^2,
// and at least half of that: the sum over all pairs is a product of sums. Times (s^2 + t^2)^2 they are at most 1
// / s^2 + 1 / t^2. Errors that the rows keep turn the polar factor by 1 / (s + t), and by 1 / s out of its range.
NarrowLoss nuclear_norm_loss(const PowerSums& sums, int64_t longer, double error, double row_error);

}  // namespace dse::cpu
