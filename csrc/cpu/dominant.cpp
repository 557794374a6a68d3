#include "cpu/dominant.h"

#include <algorithm>

#include "common/rng.h"
#include "cpu/dense.h"

namespace dse::cpu {
void DominantPart::take_out(double* f, int64_t m, int64_t number) {
  constexpr int kSteps = 8;
  count = number;
  side = m;
  double* v = basis.reserve(count * m);
  double* b = weights.reserve(count * count);
  Buffer<double> product(count * m);
  const RngStream rng{0, RngPurpose::kSubspace, static_cast<uint64_t>(m)};
  for (int64_t i = 0; i < count * m; ++i) v[i] = rng.uniform(static_cast<uint32_t>(i)) - 0.5;
  const auto orthonormalize = [&] {
    for (int64_t r = 0; r < count; ++r) orthonormalize_row(v, r, m);
  };
  for (int step = 0; step < kSteps; ++step) {
    orthonormalize();
    multiply_rows(f, m, m, count, v, product.data());
    std::copy_n(product.data(), count * m, v);
  }
  orthonormalize();
  multiply_rows(f, m, m, count, v, product.data());
  for (int64_t r = 0; r < count; ++r)
    for (int64_t q = 0; q < count; ++q) b[r * count + q] = dot(v + r * m, product.data() + q * m, m);
  // F - U^T V - V^T U + V^T B V, U = V F: both sides of F lose the part.
  for (int64_t r = 0; r < count; ++r)
    for (int64_t q = 0; q < count; ++q) axpy(-0.5 * b[r * count + q], v + q * m, product.data() + r * m, m);
  subtract_both_ways(f, m, m, count, v, product.data());
}

void DominantPart::multiply(const double* x, double* work, double* out) const {
  double* weighted = work + count;
  for (int64_t r = 0; r < count; ++r) work[r] = dot(basis.data() + r * side, x, side);
  for (int64_t r = 0; r < count; ++r) weighted[r] = dot(weights.data() + r * count, work, count);
  std::fill(out, out + side, 0.0);
  for (int64_t r = 0; r < count; ++r) axpy(weighted[r], basis.data() + r * side, out, side);
}

}  // namespace dse::cpu
