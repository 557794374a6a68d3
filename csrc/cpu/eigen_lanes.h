// Eigendecompositions of up to eight small symmetric matrices at once, one in each SIMD lane.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace dse::cpu {

inline constexpr int64_t kEigenLanes = 8;
// Above this side, eight interleaved matrices outgrow the caches and a LAPACK call each is faster.
inline constexpr int64_t kEigenLanesMaxSide = 160;

struct EigenLanesWorkspace {
  Buffer<double> matrix;   // side x side x lanes
  Buffer<double> rows;     // the same, if eigenvectors are wanted
  Buffer<double> vectors;  // a few arrays of side x lanes
};

// Matrix `lane` (side n[lane], row-major, leading dimension ld[lane], lower triangle read) is decomposed into
// eigenvalues values[lane][0 .. n), ascending, and, unless `vectors` is null, eigenvectors
// vectors[lane][i * n .. (i + 1) * n). Lanes beyond `count` are idle. Returns false if an iteration did not
// converge (then no result is to be used).
bool symmetric_eigen_lanes(int64_t count, const double* const* matrices, const int64_t* n, const int64_t* ld,
                           double* const* values, double* const* vectors, EigenLanesWorkspace& ws);

}  // namespace dse::cpu
