// Nuclear norms and effective ranks of dense matrices, with what their gradients need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/problem.h"
#include "common/spectral.h"
#include "cpu/gather.h"
#include "cpu/parallel.h"
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
  Buffer<double> gram[kLanes];      // m x gram_ld(m)
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
};

// Rows summed by one task of a reduction over n rows: fixed by n alone, so that the order of additions does not
// depend on the number of threads, and bounded in number, so that partial sums stay small.
inline int64_t reduction_rows(int64_t n) { return std::max<int64_t>(64, (n + 255) / 256); }

// Means of the columns of a non-empty set; exact where all rows are equal.
void column_means(const RowSet& set, double* mean);

// Values and gradient matrices of one spectral function of up to kLanes matrices, best of similar size.
// `narrow`: in float32 where the spectra allow it. Returns how many of them did not, and were done again.
template <typename T>
int64_t spectral_functions(const RowSet* sets, int64_t count, SpectralKind kind, SpectralTarget<T>* targets,
                           SpectralWorkspace& ws, bool narrow);

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
  SpectralWorkspace ws_;
};

}  // namespace dse::cpu
