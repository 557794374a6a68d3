// A zero-copy view of (B, N, d) features of any strides, read as float64; passed to kernels by value.
#pragma once

#include "common/portability.h"
#include "cuda/device.cuh"

namespace dse::cuda {

template <class S>
struct FeatureView {
  const S* data = nullptr;
  int64_t outer = 0, inner = 0, dim = 0;  // B, N, d
  int64_t stride_outer = 0, stride_inner = 0, stride_dim = 0;
  const double* row_scale = nullptr;  // one factor a row, or null

  DSE_HOST_DEVICE int64_t rows() const { return outer * inner; }

  // First element of a row: the division is worth doing once a row rather than once an element.
  __device__ __forceinline__ const S* row(int64_t i) const {
    return data + (i / inner) * stride_outer + (i % inner) * stride_inner;
  }
  __device__ __forceinline__ double scale(int64_t i) const { return row_scale != nullptr ? row_scale[i] : 1.0; }

  // Feature f of row i, scaled.
  __device__ __forceinline__ double at(int64_t i, int64_t f) const {
    return to_double(row(i)[f * stride_dim]) * scale(i);
  }
};

}  // namespace dse::cuda
