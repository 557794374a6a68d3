// Dense linear algebra that torch does well, called through the dispatcher on buffers of ours.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace dse::cpu {

using torch::stable::Tensor;

// out (m x n, ld ldo) = a (m x k) * b (k x n); row-major with the given strides (stride of the row, stride of the
// column), out with unit column stride.
struct Matrix {
  const void* data;
  int64_t rows, cols, row_stride, col_stride;
};
void matmul(const float* /*type tag*/, const Matrix& a, const Matrix& b, float* out, int64_t ldo);
void matmul(const double* /*type tag*/, const Matrix& a, const Matrix& b, double* out, int64_t ldo);

// Whether a symmetric matrix is positive definite as far as a float32 Cholesky factorization can tell.
bool is_positive_definite(const float* g, int64_t n, int64_t ld);

// Thin singular value decomposition a (m x n, ld) = u diag(s) vh, r = min(m, n):
// u (m x r) and vh (r x n) are row-major without gaps; null pointers are left out.
void thin_svd(const double* a, int64_t m, int64_t n, int64_t ld, double* u, double* s, double* vh);

// The triangular factor r (n x n, row-major) of a (m x n, m >= n).
void qr_triangle(const double* a, int64_t m, int64_t n, int64_t ld, double* r);

}  // namespace dse::cpu
