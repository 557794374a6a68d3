#include "cpu/tridiagonal_traces.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/processor.h"
#include "cpu/vectors.h"

#define DSE_KERNELS "cpu/tridiagonal_traces.kernels.h"
#include "cpu/every_isa.h"

namespace dse::cpu {
namespace {

constexpr int64_t kPoints = 8;

// What a pivot that vanishes is taken for.
double least_pivot(double largest) { return std::max(largest * 1e-200, std::numeric_limits<double>::min()); }

void count_below(int64_t n, const double* diagonal, const double* couplings, double least, const double* at,
                 double* below) {
  DSE_CALL_BY_ISA(count_below, n, diagonal, couplings, least, at, below);
}
void eight_inverse_traces(int64_t n, const double* diagonal, const double* couplings, const double* shift,
                          double* inverses, double* traces) {
  DSE_CALL_BY_ISA(inverse_traces, n, diagonal, couplings, shift, inverses, traces);
}

}  // namespace

double largest_bound(const double* diagonal, const double* couplings, int64_t begin, int64_t n) {
  double most = 0.0;
  for (int64_t i = begin; i < n; ++i) {
    const double before = i > begin ? std::abs(couplings[i - 1]) : 0.0;
    const double after = i + 1 < n ? std::abs(couplings[i]) : 0.0;
    most = std::max(most, std::abs(diagonal[i]) + before + after);
  }
  return most;
}

void eigenvalues_below(int64_t n, const double* diagonal, const double* couplings, double largest, int64_t count,
                       const double* at, double* below) {
  for (int64_t s = 0; s < count; s += kPoints) {
    double some[kPoints], counts[kPoints];
    for (int64_t i = 0; i < kPoints; ++i) some[i] = at[std::min(count - 1, s + i)];
    count_below(n, diagonal, couplings, least_pivot(largest), some, counts);
    std::copy_n(counts, std::min(kPoints, count - s), below + s);
  }
}

double smallest_eigenvalue(int64_t n, const double* diagonal, const double* couplings, double largest) {
  constexpr double kRange = 1e-12, kClose = 1.05;
  const double least = least_pivot(largest);
  // Nine sections of equal ratios at a time.
  double low = kRange * largest, high = largest;
  while (high > kClose * low) {
    const double ratio = std::pow(high / low, 1.0 / static_cast<double>(kPoints + 1));
    double at[kPoints], below[kPoints];
    // The first pass looks at the lower end too, and leaves the uppermost section as wide as two.
    const bool first = low == kRange * largest && high == largest;
    for (int64_t s = 0; s < kPoints; ++s) at[s] = low * std::pow(ratio, static_cast<double>(first ? s : s + 1));
    count_below(n, diagonal, couplings, least, at, below);
    if (first && below[0] > 0.0) return 0.0;
    double next_low = low, next_high = high;
    for (int64_t s = kPoints - 1; s >= 0; --s) {
      if (below[s] > 0.0) next_high = at[s];
      else next_low = std::max(next_low, at[s]);
    }
    low = next_low;
    high = next_high;
    if (!(low < high)) break;
  }
  return low;
}

void inverse_traces(int64_t n, const double* diagonal, const double* couplings, int64_t count,
                    const double* shift, double* out, Buffer<double>& work) {
  double* inverses = work.reserve(n * kPoints);
  for (int64_t s = 0; s < count; s += kPoints) {
    double some[kPoints], traces[kPoints];
    for (int64_t i = 0; i < kPoints; ++i) some[i] = shift[std::min(count - 1, s + i)];
    eight_inverse_traces(n, diagonal, couplings, some, inverses, traces);
    std::copy_n(traces, std::min(kPoints, count - s), out + s);
  }
}

}  // namespace dse::cpu
