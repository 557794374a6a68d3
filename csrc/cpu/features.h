// A zero-copy view of (B, N, d) features of any strides and dtype, read row by row as float64.
#pragma once

#include <cstdint>
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "cpu/simd.h"

namespace dse::cpu {

DType dtype_of(const torch::stable::Tensor& t, const char* argument);

struct Features {
  const char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t element_size = 4;
  int64_t outer = 0, inner = 0, dim = 0;  // B, N, d
  int64_t stride_outer = 0, stride_inner = 0, stride_dim = 0;
  const double* row_scale = nullptr;  // one factor a row, or null
  bool unit_rows = false;             // the factors make every row's norm 1, or less for short ones

  // t has shape (B, N, d).
  static Features of(const torch::stable::Tensor& t, const char* argument);

  int64_t rows() const { return outer * inner; }

  const void* row(int64_t i) const {
    return data + element_size * ((i / inner) * stride_outer + (i % inner) * stride_inner);
  }
  double scale_of(int64_t i) const { return row_scale != nullptr ? row_scale[i] : 1.0; }

  // Row i, times its scale.
  template <typename D>
  void load(int64_t i, D* dst) const {
    load_run(dtype, row(i), stride_dim, dim, scale_of(i), dst);
  }
  // Elements first, ..., first + count - 1 of row i, times its scale.
  template <typename D>
  void load_part(int64_t i, int64_t first, int64_t count, D* dst) const {
    const char* src = static_cast<const char*>(row(i)) + element_size * stride_dim * first;
    load_run(dtype, src, stride_dim, count, scale_of(i), dst);
  }
  // (row - shift) * inverse.
  template <typename D>
  void load_shifted_row(int64_t i, const double* shift, double inverse, D* dst) const {
    load_shifted(dtype, row(i), stride_dim, dim, scale_of(i), shift, inverse, dst);
  }
  void load_padded(int64_t i, double* dst) const {
    load(i, dst);
    for (int64_t f = dim; f < padded(dim); ++f) dst[f] = 0.0;
  }
};

}  // namespace dse::cpu
