// Norms, mean, spread and nearest-other-centroid distances of rows.
#pragma once

#include <cstdint>

#include "common/problem.h"
#include "cpu/features.h"

namespace dse::cpu {

// scale[i] = 1 / max(||row i||, floor) where `normalize`, else 1; `mean` (or null): of the rows times their
// scales, exact where all rows are equal. Returns whether every feature is finite.
bool row_scales(const Features& x, bool normalize, double* scale, double* mean = nullptr);

// Whether every feature of the rows of outer index g is finite.
bool group_is_finite(const Features& x, int64_t g);

// Mean Euclidean distance of all rows from their mean (0 where that is rounding), and the mean of the unit
// vectors from the mean to the rows.
double average_norm(const Features& x, const double* mean, double* mean_direction);

// For every row of [first, last): the nearest centroid other than its own, and the distance to it.
// centroids is k x dim; a centroid that is not finite does not exist. Without two centroids nearest is -1 and
// the distance 0. Returns whether there were two.
bool nearest_other_centroid(const Features& x, int64_t first, int64_t last, const int64_t* labels,
                            const double* centroids, int64_t k, int64_t* nearest, double* distance);

}  // namespace dse::cpu
