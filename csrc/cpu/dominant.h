// The few eigenvectors of a symmetric matrix that outweigh all others.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace dse::cpu {

// F = rest + V^T B V, V (count x m) with orthonormal rows.
struct DominantPart {
  int64_t count = 0, side = 0;
  Buffer<double> basis;    // V
  Buffer<double> weights;  // B, count x count

  // Takes the part out of f (m x m, row-major), of which `rest` is left. `count` eigenvalues have to be many
  // times larger than the others.
  void take_out(double* f, int64_t m, int64_t count);

  // out[j] = (V^T B V x)[j]; `work` has 2 * count elements.
  void multiply(const double* x, double* work, double* out) const;
};

}  // namespace dse::cpu
