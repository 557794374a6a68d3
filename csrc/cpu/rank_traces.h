// The effective rank of a large matrix in float32, and the function that its gradient is, without eigenvalues.
#pragma once

#include <optional>

#include "cpu/parallel.h"
#include "cpu/singular_values.h"
#include "cpu/tridiagonal.h"

namespace dse::cpu {

struct TracedRank {
  double value = 0.0;
  ShiftedInverses function;
  NarrowLoss loss;  // about, from how many eigenvalues there are in each of many sections
};

// From the tridiagonal form of a Gram matrix whose error has the norm `error`, and that of rows whose entries
// have the root mean square error `row_error`. Nothing where the smallest eigenvalue may be out of reach of that,
// or where its root is below `floor`; nor at the maximum, where there is no gradient to be accurate about.
std::optional<TracedRank> rank_by_traces(const Tridiagonal& matrix, double error, double row_error, double floor,
                                         Buffer<double>& work);

}  // namespace dse::cpu
