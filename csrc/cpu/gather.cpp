#include "cpu/gather.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dse::cpu {
namespace {

template <typename P>
double gather(const RowSet& set, P* out, int64_t ld) {
  const int64_t d = set.x->dim, n = set.n;
  Buffer<double> work(3 * d);
  double* origin = work.data();
  double* mean = origin + d;
  double squares = 0.0;
  std::fill(mean, mean + d, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    P* target = out + i * ld;
    double* row = mean + d;
    if constexpr (std::is_same_v<P, double>) row = target;
    set.x->load(set.index(i), row);
    squares += sum_of_squares(row, d);
    if (set.center) {
      // Relative to the first row first: equal rows become exactly zero, whatever their number.
      if (i == 0) std::copy_n(row, d, origin);
      subtract_and_sum(origin, row, mean, d);
    }
    if constexpr (!std::is_same_v<P, double>) narrow_run(row, d, target);
    std::fill(target + d, target + ld, P(0));
  }
  const double inverse = 1.0 / static_cast<double>(std::max<int64_t>(n, 1));
  if (set.center) {
    Buffer<P> own(d);
    for (int64_t f = 0; f < d; ++f) own[f] = static_cast<P>(mean[f] * inverse);
    for (int64_t i = 0; i < n; ++i) subtract(own.data(), out + i * ld, d);
  }
  return std::sqrt(squares * inverse);
}

}  // namespace

double gather_rows(const RowSet& set, double* out, int64_t ld) { return gather(set, out, ld); }
double gather_rows(const RowSet& set, float* out, int64_t ld) { return gather(set, out, ld); }

}  // namespace dse::cpu
