#include "cpu/gather.h"

#include <algorithm>
#include <cmath>

#include "common/problem.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dse::cpu {
namespace {

// Rows are taken relative to the first one before anything is rounded or summed: equal rows become zero, but for
// the rounding of one product, whatever their number.
template <typename P>
double gather(const RowSet& set, P* out, int64_t ld) {
  const int64_t d = set.x->dim, n = set.n;
  Buffer<double> work(3 * d);
  double* origin = work.data();
  double* sum = origin + d;
  double* row = sum + d;
  double squares = 0.0;
  std::fill(sum, sum + d, 0.0);
  if (set.center) set.x->load(set.index(0), origin);
  for (int64_t i = 0; i < n; ++i) {
    P* target = out + i * ld;
    // Of normalized rows, but for short ones, the norm is known.
    if (set.x->unit_rows && set.x->scale_of(set.index(i)) < 1.0 / kNormFloor) {
      squares += 1.0;
    } else {
      set.x->load(set.index(i), row);
      squares += sum_of_squares(row, d);
    }
    if (set.center) {
      set.x->load_shifted_row(set.index(i), origin, 1.0, target);
      accumulate(target, sum, d);
    } else {
      set.x->load(set.index(i), target);
    }
    std::fill(target + d, target + ld, P(0));
  }
  const double inverse = 1.0 / static_cast<double>(std::max<int64_t>(n, 1));
  if (set.center) {
    Buffer<P> mean(d);
    for (int64_t f = 0; f < d; ++f) mean[f] = static_cast<P>(sum[f] * inverse);
    for (int64_t i = 0; i < n; ++i) subtract(mean.data(), out + i * ld, d);
  }
  return std::sqrt(squares * inverse);
}

}  // namespace

double gather_rows(const RowSet& set, double* out, int64_t ld) { return gather(set, out, ld); }
double gather_rows(const RowSet& set, float* out, int64_t ld) { return gather(set, out, ld); }

}  // namespace dse::cpu
