// Functions of a matrix from its singular vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dense.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/streamed.h"

namespace dse::cpu {

// out (m x m) = sum_r coefficient[r] v_r v_r^T for m eigenvectors, row-major; symmetric.
inline void weighted_projector(const double* vectors, const double* coefficient, int64_t m,
                               Buffer<double>& scaled, double* out, int64_t ldo) {
  const int64_t ld = gram_ld(m);
  double* left = scaled.reserve(2 * m * ld);
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
  for_each_upper_tile(0, m, kGramTile, m * m * used / 2, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    tn_product_upper(left, ld, right, ld, used, out, ldo, i0, i1, j0, j1);
  });
  mirror(out, ldo, 0, m, m);
}

}  // namespace dse::cpu
