// Spectral functions of clusters, whose rows fit in memory, with what their gradients need.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/problem.h"
#include "common/spectral.h"
#include "cpu/gather.h"
#include "cpu/parallel.h"
#include "cpu/short_products.h"
#include "cpu/tridiagonal.h"
#include "cpu/tridiagonal_lanes.h"

namespace dse::cpu {

// Where the results of one matrix go. `slot` takes n * d elements of T (null: no gradient wanted).
template <typename T>
struct SpectralTarget {
  double value = 0.0;
  SavedForm form = SavedForm::kNone;
  T* slot = nullptr;
};

struct SpectralWorkspace {
  Buffer<double> matrix;            // n x gram_ld(d), centred
  Buffer<double> turned;            // a block of features x gram_ld(n)
  Buffer<double> gram[kLanes];      // m x stream_ld(m), small ones
  Buffer<double> large_gram;        // a large one, and the functions of large ones
  Buffer<double> spectrum[kLanes];  // eigenvalues, singular values, weights
  Buffer<double> values;            // of the iteration for eigenvalues
  Buffer<double> scaled;            // two operands of the weighted product
  Buffer<double> factors;           // singular vectors, in the exact path
  TridiagonalLanes<double> small;   // sides up to kLanesMaxSide
  Tridiagonal large[kLanes];        // and above

  Buffer<float> narrow_matrix;        // n x d, centred
  Buffer<float> narrow_turned;        // a block of its features, or of its rows in panels
  Buffer<float> narrow_gram[kLanes];  // m x gram_ld(m)
  TridiagonalLanes<float> narrow_small;

  ShortMatrix short_rows;
  Buffer<ShortPair> short_panels;
};

// Values and gradient matrices of one spectral function of up to kLanes matrices, best of similar size.
// `narrow`: in float32 where the spectra allow it. Returns how many of them did not, and were done again.
template <typename T>
int64_t spectral_functions(const RowSet* sets, int64_t count, SpectralKind kind, SpectralTarget<T>* targets,
                           SpectralWorkspace& ws, bool narrow);

}  // namespace dse::cpu
