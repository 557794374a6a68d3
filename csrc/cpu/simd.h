// Passes over rows. Each is compiled several times where the compiler can dispatch at load time (x86-64: AVX-512,
// AVX2 + FMA, and the baseline), so one binary runs everywhere and uses what it finds.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// ifunc resolvers run before the sanitizers' runtimes are ready, hence the exceptions.
#define DSE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DSE_MULTIVERSION
#endif

namespace dse::cpu {

// Leading dimensions of workspaces are multiples of this many elements, the tail zero.
inline constexpr int64_t kRowPad = 16;
inline int64_t padded(int64_t d) { return (d + kRowPad - 1) / kRowPad * kRowPad; }

// Conversions of a strided run of n elements to double or float times `scale`.
enum class DType : int { kFloat64, kFloat32, kBFloat16, kFloat16 };
void load_run(DType dtype, const void* src, int64_t stride, int64_t n, double scale, double* dst);
void load_run(DType dtype, const void* src, int64_t stride, int64_t n, double scale, float* dst);
// (element * scale - shift) * inverse, rounded once.
void load_shifted(DType dtype, const void* src, int64_t stride, int64_t n, double scale, const double* shift,
                  double inverse, double* dst);
void load_shifted(DType dtype, const void* src, int64_t stride, int64_t n, double scale, const double* shift,
                  double inverse, float* dst);
void store_run(DType dtype, const double* src, int64_t n, void* dst);

// dst = scale * src, multiplied in float64.
void store_scaled(const float* src, double scale, int64_t n, float* dst);
void store_scaled(const float* src, double scale, int64_t n, double* dst);
void store_scaled(const double* src, double scale, int64_t n, float* dst);
void store_scaled(const double* src, double scale, int64_t n, double* dst);

// sum of squares of n doubles; <a, b>; y += alpha * x.
double sum_of_squares(const double* x, int64_t n);
double dot(const double* a, const double* b, int64_t n);
void axpy(double alpha, const double* x, double* y, int64_t n);
void axpy(float alpha, const float* x, float* y, int64_t n);
// y += alpha * a * x and x *= a, entry by entry.
void add_products(float alpha, const float* a, const float* x, float* y, int64_t n);
void multiply(const float* a, float* x, int64_t n);

// x -= y; sum += x.
void subtract(const double* y, double* x, int64_t n);
void subtract(const float* y, float* x, int64_t n);
void accumulate(const double* x, double* sum, int64_t n);
void accumulate(const float* x, double* sum, int64_t n);

// One row of the gradient's epilogue, in place: grad = partial + to_centroid (x - centroid) + to_mean (x - mean)
// - spread * direction. `centroid` may be null, and so may `mean` (with `direction`).
void add_distances(const float* partial, const double* x, double to_centroid, const float* centroid,
                   double to_mean, const double* mean, double spread, const double* direction, double* grad,
                   int64_t n);
void add_distances(const double* partial, const double* x, double to_centroid, const double* centroid,
                   double to_mean, const double* mean, double spread, const double* direction, double* grad,
                   int64_t n);
// ||x - y||^2.
double squared_distance(const double* x, const double* y, int64_t n);
// y = scale * (y + alpha * x).
void axpy_scale(double alpha, const double* x, double scale, double* y, int64_t n);

}  // namespace dse::cpu
