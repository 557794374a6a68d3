// Rows of a matrix gathered from the features.
#pragma once

#include <cstdint>

#include "cpu/features.h"

namespace dse::cpu {

// A matrix whose rows are rows of `x`: either the n rows listed in `rows`, or first, first + 1, ...; its column
// means are taken off where `center`.
struct RowSet {
  const Features* x = nullptr;
  const int64_t* rows = nullptr;
  int64_t first = 0;
  int64_t n = 0;
  bool center = false;

  int64_t index(int64_t i) const { return rows != nullptr ? rows[i] : first + i; }
};

// The rows as float64 or float32, centred about their mean without cancellation (float32: rounded after a row of
// theirs was taken off in float64): `out` is n x ld with zero tails. Returns the root mean square norm of the
// rows before centring.
double gather_rows(const RowSet& set, double* out, int64_t ld);
double gather_rows(const RowSet& set, float* out, int64_t ld);

}  // namespace dse::cpu
