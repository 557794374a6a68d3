// The tensors that the forward pass leaves for the backward pass, and where things lie in them.
#pragma once

#include <cstdint>

#include "common/problem.h"

namespace dse::cpu {

// saved_rows (float64): factor of every row (1 / norm), distance to its nearest other centroid, then the mean of
// the rows, the mean of their directions from it, and the five components.
struct SavedRows {
  int64_t rows, dim;
  explicit SavedRows(const Problem& p) : rows(p.rows()), dim(p.dim) {}
  int64_t scale() const { return 0; }
  int64_t distance() const { return rows; }
  int64_t mean() const { return 2 * rows; }
  int64_t mean_direction() const { return 2 * rows + dim; }
  int64_t components() const { return 2 * rows + 2 * dim; }
  int64_t size() const { return 2 * rows + 2 * dim + 5; }
};

// saved_index (int64): nearest other centroid of every row (-1: none), the form of every cluster's slot, the
// RankForm of each matrix of saved_dim, the permutation (evaluation variant), and whether all features are
// finite.
struct SavedIndex {
  int64_t rows, local, global, dims, permuted;
  explicit SavedIndex(const Problem& p)
      : rows(p.rows()),
        local(p.images * p.local_clusters),
        global(p.groups() * p.global_clusters),
        dims(p.variant == Variant::kEvaluation ? p.positions : 1),
        permuted(p.variant == Variant::kEvaluation ? p.rows() : 0) {}
  int64_t nearest() const { return 0; }
  int64_t local_form() const { return rows; }
  int64_t global_form() const { return local_form() + local; }
  int64_t rank_form() const { return global_form() + global; }
  int64_t permutation() const { return rank_form() + dims; }
  int64_t finite() const { return permutation() + permuted; }
  int64_t size() const { return finite() + 1; }
};

// Side of the matrices of saved_dim and their number.
inline int64_t dim_side(const Problem& p) {
  return std::min(p.variant == Variant::kEvaluation ? p.images : p.rows(), p.dim);
}
inline int64_t dim_matrices(const Problem& p) { return p.variant == Variant::kEvaluation ? p.positions : 1; }

}  // namespace dse::cpu
