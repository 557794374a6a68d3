// Spectral functions of a matrix X (n x d), from its singular values, and what their gradients need.
//
// Both functions have gradients of the form  dF/dX = X V diag(w_i / s_i) V^T = U diag(w_i / s_i) U^T X,
// X = U diag(s) V^T:
//   nuclear norm      F = sum s                       w_i = 1
//   effective rank    F = exp(-sum p log p), p = s/S  w_i = -(F / S) (log p_i + h),  S = sum s, h = log F
// (Roy & Vetterli, "The effective rank", EUSIPCO 2007.) A saved slot holds the small symmetric matrix
// (kGramSide: n x n if n <= d, else d x d; on the CPU its upper triangle) or, where the spectrum is too steep for
// that product to be accurate, the gradient itself (kPolar: n x d).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/portability.h"

namespace dse {

enum class SpectralKind { kNuclearNorm, kEffectiveRank };

// Value of the function; weight[i] receives w_i, 0 where sigma[i] is 0 (a point where F has no derivative: the
// subgradient of least norm).
DSE_HOST_DEVICE inline double spectral_value_and_weights(SpectralKind kind, const double* sigma, int64_t n,
                                                         double* weight) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += sigma[i];
  if (kind == SpectralKind::kNuclearNorm) {
    for (int64_t i = 0; i < n; ++i) weight[i] = sigma[i] > 0.0 ? 1.0 : 0.0;
    return sum;
  }
  if (!(sum > 0.0)) {
    for (int64_t i = 0; i < n; ++i) weight[i] = 0.0;
    // No direction at all. 0 rather than exp(0) = 1: a matrix of zeros has no dimension.
    return sum == 0.0 ? 0.0 : sum;
  }
  double entropy = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double p = sigma[i] / sum;
    if (p > 0.0) entropy -= p * std::log(p);
  }
  const double value = std::exp(entropy);
  for (int64_t i = 0; i < n; ++i) {
    const double p = sigma[i] / sum;
    weight[i] = p > 0.0 ? -(value / sum) * (std::log(p) + entropy) : 0.0;
  }
  return value;
}

}  // namespace dse
