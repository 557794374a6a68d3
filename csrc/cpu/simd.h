// Register-blocked inner kernels. Each is compiled twice where the compiler can dispatch at load time
// (x86-64: AVX2 + FMA, and the baseline), so one binary runs everywhere and uses what it finds.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// ifunc resolvers run before the sanitizers' runtimes are ready, hence the exceptions.
#define DSE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define DSE_MULTIVERSION
#endif

namespace dse::cpu {

// Leading dimensions of workspaces are multiples of this many elements, the tail zero.
inline constexpr int64_t kRowPad = 16;
inline int64_t padded(int64_t d) { return (d + kRowPad - 1) / kRowPad * kRowPad; }

// out[i * ldo + c] = <a_i, b_c> for i < m, c < k; rows of ld elements, ld a multiple of kRowPad, tails zero.
void row_dots(const float* a, int64_t m, const float* b, int64_t k, int64_t ld, float* out, int64_t ldo);
void row_dots(const double* a, int64_t m, const double* b, int64_t k, int64_t ld, double* out, int64_t ldo);

// out[i] = ||a_i - c||^2 for i < m.
void squared_distances(const float* a, int64_t m, const float* c, int64_t ld, float* out);
void squared_distances(const double* a, int64_t m, const double* c, int64_t ld, double* out);

// Leading dimension of the operands and the result of tn_product_upper: whole tiles of 12 columns.
inline int64_t gram_ld(int64_t n) { return (n + 11) / 12 * 12; }

// C[i, j] += sum_r a[r, i] * b[r, j] for i in [i0, i1), j in [j0, j1), at least where j >= i (tiles wholly below
// the diagonal are left out), in float64. i0 and j0 are multiples of 12; ldb and ldc at least gram_ld(columns).
void tn_product_upper(const double* a, int64_t lda, const double* b, int64_t ldb, int64_t rows, double* c,
                      int64_t ldc, int64_t i0, int64_t i1, int64_t j0, int64_t j1);

// The same for C += X^T X with X (rows x columns) in panels of 12 columns: element (r, j) is
// panels[(j / 12) * rows * 12 + r * 12 + j % 12]. Every operand of a tile is contiguous, whatever the row length.
inline constexpr int64_t kPanel = 12;
void panel_gram_upper(const double* panels, int64_t rows, double* c, int64_t ldc, int64_t i0, int64_t i1,
                      int64_t j0, int64_t j1);

// Conversions of a strided run of n elements to double or float times `scale`.
enum class DType : int { kFloat64, kFloat32, kBFloat16, kFloat16 };
void load_run(DType dtype, const void* src, int64_t stride, int64_t n, double scale, double* dst);
void store_run(DType dtype, const double* src, int64_t n, void* dst);

// sum of squares of n doubles; <a, b>; y += alpha * x.
double sum_of_squares(const double* x, int64_t n);
double dot(const double* a, const double* b, int64_t n);
void axpy(double alpha, const double* x, double* y, int64_t n);

}  // namespace dse::cpu
