// Effective rank of a matrix that is not held in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/gather.h"
#include "cpu/parallel.h"
#include "cpu/rank_traces.h"
#include "cpu/tridiagonal.h"
#include "cpu/tridiagonal_lanes.h"

namespace dse::cpu {

// How products with the matrix of an effective rank's gradient have to run.
struct RankForm {
  bool steep = false;    // in float64
  int64_t dominant = 0;  // or in float32, after this many dominant eigenvectors were taken out (dominant.h)
  bool short_products = false;  // or in 16-bit products (short_products.h); else in float32

  int64_t code() const { return short_products ? -1 : dominant > 0 ? 1 + dominant : steep ? 1 : 0; }
  static RankForm of(int64_t code) { return {code > 0, std::max<int64_t>(code - 1, 0), code < 0}; }
};

// Effective rank of a matrix that is not held in memory, in four steps: the Gram matrix (one pass over the rows)
// and its tridiagonal form, by all threads; its eigenvalues, by one (the caller may have other work for the
// others); and the value with the m x m float64 matrix of its gradient, by all, m = min(n, d). Of a small matrix
// the second and the last step are best left to one thread, too.
//
// Precision follows the spectrum. A Gram matrix with float32 products, summed over blocks of rows and then in
// float64, has errors of about 2e-9 of its trace; in 16-bit products it is the exact one of rows that were
// rounded. Whether that, and a reduction in float32, were good enough is read from the eigenvalues; where they
// were not, the last step does both again (docs/definitions.md).
class StreamedRank {
 public:
  // `exact`: float64 all the way.
  void measure(const RowSet& set, bool exact);
  void reduce(bool exact);
  void find_eigenvalues();
  // `exact`: the value needs full float64 accuracy. `gradient` may be null. `form` receives how products with the
  // gradient's matrix have to run.
  double finish(bool exact, double* gradient, RankForm* form);

  // Before reduce(): one thread does most of it in any case, and the caller may have other work for the others.
  bool is_small() const { return m_ <= kOneThreads; }
  // After find_eigenvalues(): finish() does not go through the rows again.
  bool is_nearly_done() const { return accurate_ && traced_.has_value(); }

  // All four.
  double run(const RowSet& set, bool exact, double* gradient, RankForm* form) {
    measure(set, exact);
    reduce(exact);
    find_eigenvalues();
    return finish(exact, gradient, form);
  }

 private:
  // What the products of a Gram matrix are summed from.
  enum class Products { kWide, kNarrow, kShort };

  void fill_gram(Products products);
  void start_again();
  double finish_exactly(double* gradient);
  void apply_narrow(const ShiftedInverses& function, const NarrowLoss& loss, double* gradient, RankForm* form);
  std::optional<double> finish_in_two_parts(bool exact, double* gradient, RankForm* form);

  RowSet set_;
  int64_t m_ = 0, null_ = 0;
  double floor_ = 0.0;
  bool finite_ = true;
  bool converged_ = true;
  bool accurate_ = true;  // float32 was enough, or had no part in it
  Products products_ = Products::kWide;
  double gram_error_ = 0.0;           // of float32 products, about
  double row_error_ = 0.0;            // of the rows' entries, in 16-bit products
  std::optional<TracedRank> traced_;  // in place of eigenvalues
  Buffer<double> gram_;               // m x stream_ld(m)
  Buffer<double> spectrum_;           // eigenvalues, singular values, weights
  Buffer<double> iterated_, scaled_, factors_;
  TridiagonalLanes<double> small_;  // sides up to kLanesMaxSide
  Tridiagonal large_;               // and above
};

}  // namespace dse::cpu
