#include "cpu/dominant.h"

#include <algorithm>
#include <cmath>

#include "common/rng.h"
#include "cpu/simd.h"

namespace dse::cpu {
namespace {

// rows[r] = F v_r for `count` rows.
void multiply_all(const double* f, int64_t m, int64_t count, const double* v, double* rows) {
  for_each_task(m, count * m * m, [&](int64_t i, int64_t) {
    for (int64_t r = 0; r < count; ++r) rows[r * m + i] = dot(f + i * m, v + r * m, m);
  });
}

void orthonormalize(double* rows, int64_t count, int64_t m) {
  for (int64_t r = 0; r < count; ++r) {
    double* own = rows + r * m;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t q = 0; q < r; ++q) axpy(-dot(rows + q * m, own, m), rows + q * m, own, m);
      const double norm = std::sqrt(sum_of_squares(own, m));
      if (norm > 0.0)
        for (int64_t i = 0; i < m; ++i) own[i] /= norm;
    }
  }
}

}  // namespace

void DominantPart::take_out(double* f, int64_t m, int64_t number) {
  constexpr int kSteps = 8;
  count = number;
  side = m;
  double* v = basis.reserve(count * m);
  double* b = weights.reserve(count * count);
  Buffer<double> product(count * m);
  const RngStream rng{0, RngPurpose::kSubspace, static_cast<uint64_t>(m)};
  for (int64_t i = 0; i < count * m; ++i) v[i] = rng.uniform(static_cast<uint32_t>(i)) - 0.5;
  for (int step = 0; step < kSteps; ++step) {
    orthonormalize(v, count, m);
    multiply_all(f, m, count, v, product.data());
    std::copy_n(product.data(), count * m, v);
  }
  orthonormalize(v, count, m);
  multiply_all(f, m, count, v, product.data());
  for (int64_t r = 0; r < count; ++r)
    for (int64_t q = 0; q < count; ++q) b[r * count + q] = dot(v + r * m, product.data() + q * m, m);
  // F - U^T V - V^T U + V^T B V, U = V F: both sides of F lose the part.
  for (int64_t r = 0; r < count; ++r)
    for (int64_t q = 0; q < count; ++q) axpy(-0.5 * b[r * count + q], v + q * m, product.data() + r * m, m);
  for_each_task(m, 2 * count * m * m, [&](int64_t i, int64_t) {
    for (int64_t r = 0; r < count; ++r) {
      axpy(-v[r * m + i], product.data() + r * m, f + i * m, m);
      axpy(-product[r * m + i], v + r * m, f + i * m, m);
    }
  });
}

void DominantPart::multiply(const double* x, double* work, double* out) const {
  double* weighted = work + count;
  for (int64_t r = 0; r < count; ++r) work[r] = dot(basis.data() + r * side, x, side);
  for (int64_t r = 0; r < count; ++r) weighted[r] = dot(weights.data() + r * count, work, count);
  std::fill(out, out + side, 0.0);
  for (int64_t r = 0; r < count; ++r) axpy(weighted[r], basis.data() + r * side, out, side);
}

}  // namespace dse::cpu
