#include "cpu/simd.h"

#include <bit>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Vectors never cross the boundary of a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace dse::cpu {
namespace {

// 32-byte vectors: two SSE registers in the baseline clone, one AVX register in the other.
template <typename T>
struct VecOf;
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(32), aligned(8), may_alias));
};

#define DSE_INLINE inline __attribute__((always_inline))

template <typename T>
DSE_INLINE T horizontal_sum(const typename VecOf<T>::type& v) {
  constexpr int kLanes = 32 / sizeof(T);
  T total = 0;
  // Pairwise, so that the order does not depend on how the vector is mapped to registers.
  T part[kLanes];
  for (int i = 0; i < kLanes; ++i) part[i] = v[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  total = part[0];
  return total;
}

DSE_INLINE float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }

DSE_INLINE double widen(double x) { return x; }
DSE_INLINE double widen(float x) { return static_cast<double>(x); }
DSE_INLINE double widen_bfloat16(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
// Rebias by a multiplication, which also normalizes subnormals; infinities and NaN keep their exponent.
DSE_INLINE double widen_half(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t scaled = std::bit_cast<uint32_t>(bits_to_float(magnitude) * 0x1p112f);
  const uint32_t special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(scaled | special | sign);
}

// dst[i] = map(element i as float64, i).
template <typename S, typename D, typename Widen, typename Map>
DSE_INLINE void map_run(const S* src, int64_t stride, int64_t n, D* dst, Widen to, Map map) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<D>(map(to(src[i]), i));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<D>(map(to(src[i * stride]), i));
  }
}

template <typename D, typename Map>
DSE_INLINE void map_run_of(DType dtype, const void* src, int64_t stride, int64_t n, D* dst, Map map) {
  switch (dtype) {
    case DType::kFloat64:
      map_run(static_cast<const double*>(src), stride, n, dst, [](double x) { return widen(x); }, map);
      return;
    case DType::kFloat32:
      map_run(static_cast<const float*>(src), stride, n, dst, [](float x) { return widen(x); }, map);
      return;
    case DType::kBFloat16:
      map_run(
          static_cast<const uint16_t*>(src), stride, n, dst, [](uint16_t x) { return widen_bfloat16(x); }, map);
      return;
    case DType::kFloat16:
      map_run(static_cast<const uint16_t*>(src), stride, n, dst, [](uint16_t x) { return widen_half(x); }, map);
      return;
  }
}

template <typename T>
DSE_INLINE void add_distances_impl(const T* partial, const double* x, double to_centroid, const T* centroid,
                                   double to_mean, const double* mean, double spread, const double* direction,
                                   double* grad, int64_t n) {
  for (int64_t f = 0; f < n; ++f) grad[f] = static_cast<double>(partial[f]);
  if (centroid != nullptr) {
    for (int64_t f = 0; f < n; ++f) grad[f] += to_centroid * (x[f] - static_cast<double>(centroid[f]));
  }
  if (mean != nullptr) {
    for (int64_t f = 0; f < n; ++f) grad[f] += to_mean * (x[f] - mean[f]) - spread * direction[f];
  }
}

}  // namespace

#define DSE_LOADS(D)                                                                                        \
  DSE_MULTIVERSION void load_run(DType dtype, const void* src, int64_t stride, int64_t n, double scale,     \
                                 D* dst) {                                                                  \
    map_run_of(dtype, src, stride, n, dst, [scale](double x, int64_t) { return x * scale; });               \
  }                                                                                                         \
  DSE_MULTIVERSION void load_shifted(DType dtype, const void* src, int64_t stride, int64_t n, double scale, \
                                     const double* shift, double inverse, D* dst) {                         \
    map_run_of(dtype, src, stride, n, dst,                                                                  \
               [=](double x, int64_t i) { return (x * scale - shift[i]) * inverse; });                      \
  }
DSE_LOADS(double)
DSE_LOADS(float)

#define DSE_SCALED_STORES(S, D)                                                                   \
  DSE_MULTIVERSION void store_scaled(const S* src, double scale, int64_t n, D* dst) {             \
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<D>(scale * static_cast<double>(src[i])); \
  }
DSE_SCALED_STORES(float, float)
DSE_SCALED_STORES(float, double)
DSE_SCALED_STORES(double, float)
DSE_SCALED_STORES(double, double)

DSE_MULTIVERSION void store_run(DType dtype, const double* src, int64_t n, void* dst) {
  switch (dtype) {
    case DType::kFloat64: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(double)); return;
    case DType::kFloat32: {
      auto* out = static_cast<float*>(dst);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(src[i]);
      return;
    }
    case DType::kBFloat16: {
      auto* out = static_cast<torch::headeronly::BFloat16*>(dst);
      for (int64_t i = 0; i < n; ++i) out[i] = torch::headeronly::BFloat16(static_cast<float>(src[i]));
      return;
    }
    case DType::kFloat16: {
      auto* out = static_cast<torch::headeronly::Half*>(dst);
      for (int64_t i = 0; i < n; ++i) out[i] = torch::headeronly::Half(static_cast<float>(src[i]));
      return;
    }
  }
}

DSE_MULTIVERSION double sum_of_squares(const double* x, int64_t n) {
  using V = VecOf<double>::type;
  V acc0 = {}, acc1 = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const V x0 = *reinterpret_cast<const V*>(x + i);
    const V x1 = *reinterpret_cast<const V*>(x + i + 4);
    acc0 += x0 * x0;
    acc1 += x1 * x1;
  }
  double total = horizontal_sum<double>(acc0 + acc1);
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

DSE_MULTIVERSION double dot(const double* a, const double* b, int64_t n) {
  using V = VecOf<double>::type;
  V acc0 = {}, acc1 = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    acc0 += *reinterpret_cast<const V*>(a + i) * *reinterpret_cast<const V*>(b + i);
    acc1 += *reinterpret_cast<const V*>(a + i + 4) * *reinterpret_cast<const V*>(b + i + 4);
  }
  double total = horizontal_sum<double>(acc0 + acc1);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

DSE_MULTIVERSION void axpy(double alpha, const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += alpha * x[i];
}

DSE_MULTIVERSION void axpy(float alpha, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += alpha * x[i];
}

DSE_MULTIVERSION void add_products(float alpha, const float* a, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += alpha * a[i] * x[i];
}

DSE_MULTIVERSION void multiply(const float* a, float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= a[i];
}

DSE_MULTIVERSION void subtract(const double* y, double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] -= y[i];
}

DSE_MULTIVERSION void subtract(const float* y, float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] -= y[i];
}

DSE_MULTIVERSION void accumulate(const double* x, double* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}
DSE_MULTIVERSION void accumulate(const float* x, double* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<double>(x[i]);
}

DSE_MULTIVERSION void add_distances(const float* partial, const double* x, double to_centroid,
                                    const float* centroid, double to_mean, const double* mean, double spread,
                                    const double* direction, double* grad, int64_t n) {
  add_distances_impl(partial, x, to_centroid, centroid, to_mean, mean, spread, direction, grad, n);
}
DSE_MULTIVERSION void add_distances(const double* partial, const double* x, double to_centroid,
                                    const double* centroid, double to_mean, const double* mean, double spread,
                                    const double* direction, double* grad, int64_t n) {
  add_distances_impl(partial, x, to_centroid, centroid, to_mean, mean, spread, direction, grad, n);
}

DSE_MULTIVERSION double squared_distance(const double* x, const double* y, int64_t n) {
  using V = VecOf<double>::type;
  V acc = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const V step = *reinterpret_cast<const V*>(x + i) - *reinterpret_cast<const V*>(y + i);
    acc += step * step;
  }
  double total = horizontal_sum<double>(acc);
  for (; i < n; ++i) total += (x[i] - y[i]) * (x[i] - y[i]);
  return total;
}

DSE_MULTIVERSION void axpy_scale(double alpha, const double* x, double scale, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = scale * (y[i] + alpha * x[i]);
}

}  // namespace dse::cpu
