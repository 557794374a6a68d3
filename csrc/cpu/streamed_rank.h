// Effective rank of a matrix that is not held in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/gather.h"
#include "cpu/parallel.h"
#include "cpu/tridiagonal.h"
#include "cpu/tridiagonal_lanes.h"

namespace dse::cpu {

// How products with the matrix of an effective rank's gradient have to run.
struct RankForm {
  bool steep = false;    // in float64
  int64_t dominant = 0;  // or in float32, after this many dominant eigenvectors were taken out (dominant.h)

  int64_t code() const { return dominant > 0 ? 1 + dominant : steep ? 1 : 0; }
  static RankForm of(int64_t code) { return {code != 0, std::max<int64_t>(code - 1, 0)}; }
};

// Effective rank of a matrix that is not held in memory, in three steps: the Gram matrix (all threads, one pass
// over the rows), its eigenvalues (one thread: the caller may have other work for the others), and the value with
// the m x m float64 matrix of its gradient (all threads), m = min(n, d).
//
// Precision follows the spectrum. A Gram matrix with float32 products, summed over blocks of rows and then in
// float64, has errors of about 2e-9 of its trace; a float32 Cholesky factorization of the matrix minus a multiple
// of the identity tells beforehand whether the smallest eigenvalue is far enough above that
// (docs/definitions.md).
class StreamedRank {
 public:
  // `exact`: float64 all the way.
  void measure(const RowSet& set, bool exact);
  void decompose(bool exact);
  // `exact`: the value needs full float64 accuracy. `gradient` may be null. `form` receives how products with the
  // gradient's matrix have to run.
  double finish(bool exact, double* gradient, RankForm* form);

  // All three.
  double run(const RowSet& set, bool exact, double* gradient, RankForm* form) {
    measure(set, exact);
    decompose(exact);
    return finish(exact, gradient, form);
  }

 private:
  bool find_eigenvalues();
  double finish_exactly(double* gradient);
  std::optional<double> finish_in_two_parts(bool exact, double* gradient, RankForm* form);

  RowSet set_;
  int64_t m_ = 0, null_ = 0;
  double floor_ = 0.0;
  bool finite_ = true;
  bool converged_ = true;
  double gram_error_ = 0.0;  // of float32 products, about
  Buffer<double> gram_;      // m x stream_ld(m)
  Buffer<double> spectrum_;  // eigenvalues, singular values, weights
  Buffer<double> iterated_, scaled_, factors_;
  TridiagonalLanes<double> small_;  // sides up to kLanesMaxSide
  Tridiagonal large_;               // and above
};

}  // namespace dse::cpu
