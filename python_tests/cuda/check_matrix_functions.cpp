// Stand-alone check of csrc/cuda/matrix_functions.cuh on the CPU, against one-sided Jacobi rotations:
//   g++ -std=c++20 -O2 -DDSE_CUDA_EMULATION -Icsrc -Ipython_tests/cuda
//   python_tests/cuda/check_matrix_functions.cpp && ./a.out
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/matrix_functions.cuh"

namespace {

using Matrix = std::vector<double>;
int checks = 0, failures = 0;

void expect(bool good, const std::string& what) {
  ++checks;
  if (!good) {
    std::printf("FAILED %s\n", what.c_str());
    ++failures;
  }
}

std::mt19937_64 generator(7);
double normal() { return std::normal_distribution<double>()(generator); }

Matrix gaussian(int64_t n, int64_t d) {
  Matrix x(n * d);
  for (double& v : x) v = normal();
  return x;
}

// Columns become orthonormal (Gram-Schmidt, twice).
void orthonormalize(Matrix& x, int64_t n, int64_t d) {
  for (int64_t j = 0; j < d; ++j) {
    for (int round = 0; round < 2; ++round) {
      for (int64_t k = 0; k < j; ++k) {
        double dot = 0.0;
        for (int64_t i = 0; i < n; ++i) dot += x[i * d + j] * x[i * d + k];
        for (int64_t i = 0; i < n; ++i) x[i * d + j] -= dot * x[i * d + k];
      }
    }
    double norm = 0.0;
    for (int64_t i = 0; i < n; ++i) norm += x[i * d + j] * x[i * d + j];
    for (int64_t i = 0; i < n; ++i) x[i * d + j] /= std::sqrt(norm);
  }
}

// n x d with the given singular values, n >= d.
Matrix with_spectrum(int64_t n, const std::vector<double>& sigma) {
  const auto d = static_cast<int64_t>(sigma.size());
  Matrix u = gaussian(n, d), v = gaussian(d, d), x(n * d, 0.0);
  orthonormalize(u, n, d);
  orthonormalize(v, d, d);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < d; ++k)
      for (int64_t j = 0; j < d; ++j) x[i * d + j] += u[i * d + k] * sigma[k] * v[j * d + k];
  return x;
}

// Effective rank and its gradient from X = U diag(sigma) V^T by one-sided Jacobi rotations of the columns.
double reference(const Matrix& x, int64_t n, int64_t d, Matrix& gradient) {
  Matrix y(d * n), v(d * d, 0.0);  // columns as rows
  for (int64_t j = 0; j < d; ++j) {
    v[j * d + j] = 1.0;
    for (int64_t i = 0; i < n; ++i) y[j * n + i] = x[i * d + j];
  }
  for (int sweep = 0; sweep < 40; ++sweep) {
    bool rotated = false;
    for (int64_t p = 0; p < d; ++p) {
      for (int64_t q = p + 1; q < d; ++q) {
        double a = 0.0, b = 0.0, c = 0.0;
        for (int64_t i = 0; i < n; ++i) {
          a += y[p * n + i] * y[p * n + i];
          b += y[q * n + i] * y[q * n + i];
          c += y[p * n + i] * y[q * n + i];
        }
        if (c == 0.0 || std::fabs(c) <= 1e-15 * std::sqrt(a * b)) continue;
        rotated = true;
        const double z = (b - a) / (2.0 * c), t = std::copysign(1.0, z) / (std::fabs(z) + std::sqrt(1.0 + z * z));
        const double cosine = 1.0 / std::sqrt(1.0 + t * t), sine = cosine * t;
        const auto turn = [&](double* row, int64_t count) {
          for (int64_t i = 0; i < count; ++i) {
            const double first = row[p * count + i], second = row[q * count + i];
            row[p * count + i] = cosine * first - sine * second;
            row[q * count + i] = sine * first + cosine * second;
          }
        };
        turn(y.data(), n);
        turn(v.data(), d);
      }
    }
    if (!rotated) break;
  }
  std::vector<double> sigma(d);
  double sum = 0.0, largest = 0.0;
  for (int64_t j = 0; j < d; ++j) {
    double norm = 0.0;
    for (int64_t i = 0; i < n; ++i) norm += y[j * n + i] * y[j * n + i];
    sigma[j] = std::sqrt(norm);
    largest = std::max(largest, sigma[j]);
  }
  for (double& s : sigma) {
    if (s <= 1e-14 * largest) s = 0.0;
    sum += s;
  }
  double entropy = 0.0;
  for (double s : sigma)
    if (s > 0.0) entropy -= s / sum * std::log(s / sum);
  const double value = sum > 0.0 ? std::exp(entropy) : 0.0;
  gradient.assign(n * d, 0.0);
  for (int64_t k = 0; k < d; ++k) {
    if (sigma[k] == 0.0) continue;
    const double weight = -(value / sum) * (std::log(sigma[k] / sum) + entropy) / sigma[k];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < d; ++j) gradient[i * d + j] += weight * y[k * n + i] * v[k * d + j];
  }
  return value;
}

Matrix second_moment(const Matrix& x, int64_t n, int64_t d) {
  Matrix c(d * d, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < d; ++j)
      for (int64_t k = j; k < d; ++k) c[j * d + k] += x[i * d + j] * x[i * d + k];
  // Only the upper triangle may be read.
  for (int64_t j = 0; j < d; ++j)
    for (int64_t k = 0; k < j; ++k) c[j * d + k] = 1e300;
  return c;
}

struct Result {
  double value = 0.0;
  Matrix f;
};
Result run(const Matrix& c, int64_t m, int batch, bool gradient, uint64_t seed) {
  dse::emulation::schedule_seed = seed;
  Result result;
  std::vector<unsigned char> workspace(dse::cuda::effective_rank_workspace(m, batch), 0xff);
  result.f.assign(m * m, 7.0);
  dse::cuda::run_effective_rank(c.data(), m, workspace.data(), batch, gradient, &result.value, result.f.data(),
                                nullptr);
  return result;
}

void check_rank(const char* name, const Matrix& x, int64_t n, int64_t d, double value_bound,
                double gradient_bound, bool zero_gradient = false) {
  Matrix expected;
  const double value = reference(x, n, d, expected);
  const Result got = run(second_moment(x, n, d), d, 7, true, 1);
  double error = 0.0, norm = 0.0, scale = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      double sum = 0.0;
      for (int64_t k = 0; k < d; ++k) sum += x[i * d + k] * got.f[k * d + j];
      error += (sum - expected[i * d + j]) * (sum - expected[i * d + j]);
      norm += expected[i * d + j] * expected[i * d + j];
      scale += x[i * d + j] * x[i * d + j];
    }
  }
  // Where the gradient vanishes: against that of a direction alone, value / |X|.
  const double unit = zero_gradient ? value / std::sqrt(scale) : std::sqrt(norm);
  const double gradient_error = std::sqrt(error) / std::max(unit, 1e-300);
  const double value_error = std::fabs(got.value - value) / std::max(value, 1e-300);
  std::printf("%-22s m %3d value %.8g error %.1e gradient error %.1e\n", name, static_cast<int>(d), got.value,
              value_error, gradient_error);
  expect(value_error <= value_bound, std::string(name) + ": value");
  expect(gradient_error <= gradient_bound, std::string(name) + ": gradient");
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < i; ++j)
      expect(got.f[i * d + j] == got.f[j * d + i], std::string(name) + ": symmetry");
}

std::vector<double> powers(int64_t m, double last) {
  std::vector<double> sigma(m);
  for (int64_t i = 0; i < m; ++i) sigma[i] = std::pow(last, static_cast<double>(i) / static_cast<double>(m - 1));
  return sigma;
}

void check_ranks() {
  check_rank("gaussian", gaussian(150, 70), 150, 70, 1e-6, 1e-4);
  check_rank("gaussian, 3 tiles", gaussian(200, 130), 200, 130, 1e-6, 1e-4);
  check_rank("one column", gaussian(9, 1), 9, 1, 1e-6, 1e-4, true);
  check_rank("two columns", gaussian(9, 2), 9, 2, 1e-6, 1e-4);
  check_rank("sigma to 1e-4", with_spectrum(80, powers(66, 1e-4)), 80, 66, 1e-6, 1e-4);
  check_rank("sigma to 1e-6", with_spectrum(80, powers(66, 1e-6)), 80, 66, 1e-6, 2e-3);
  check_rank("sigma to 3e-7", with_spectrum(80, powers(66, 3e-7)), 80, 66, 1e-6, 5e-3);
  check_rank("flat", with_spectrum(80, std::vector<double>(66, 3.0)), 80, 66, 1e-6, 1e-4, true);
  std::vector<double> spike(66, 1e-5);
  spike[0] = 1.0;
  check_rank("spike, tail 1e-5", with_spectrum(80, spike), 80, 66, 2e-6, 1e-3);
  std::vector<double> half(66, 0.0);
  for (int i = 0; i < 20; ++i) half[i] = 1.0 + 0.1 * i;
  check_rank("rank 20", with_spectrum(80, half), 80, 66, 1e-6, 1e-4);
  check_rank("equal rows", Matrix(80 * 66, 1.0), 80, 66, 2e-6, 1e-4, true);
  for (double scale : {1e-30, 1e30}) {
    Matrix x = gaussian(100, 40);
    for (double& v : x) v *= scale;
    check_rank("scaled", x, 100, 40, 1e-6, 1e-4);
  }
  Matrix dead = gaussian(90, 65);
  for (int64_t i = 0; i < 90; ++i)
    for (int64_t j = 0; j < 30; ++j) dead[i * 65 + 2 * j] = 0.0;
  check_rank("dead columns", dead, 90, 65, 1e-6, 1e-4);
}

void check_degenerate() {
  const int64_t m = 5;
  Result zero = run(Matrix(m * m, 0.0), m, 4, true, 1);
  expect(zero.value == 0.0 && run(Matrix(m * m, 0.0), m, 4, false, 1).value == 0.0, "zero matrix: value");
  for (double v : zero.f) expect(v == 0.0, "zero matrix: F");
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Matrix c(m * m, 0.0);
    for (int64_t i = 0; i < m; ++i) c[i * m + i] = 1.0;
    c[1 * m + 3] = bad;
    Result got = run(c, m, 4, true, 1);
    expect(std::isnan(got.value), "not finite: value");
    for (double v : got.f) expect(std::isnan(v), "not finite: F");
  }
}

void check_repeatable() {
  const int64_t n = 90, d = 70;
  const Matrix x = gaussian(n, d), c = second_moment(x, n, d);
  const Result first = run(c, d, 20, true, 0);
  for (const auto& [batch, seed] : {std::pair{20, 3}, std::pair{3, 11}}) {
    const Result again = run(c, d, batch, true, seed);
    expect(again.value == first.value && again.f == first.f, "bits depend on the schedule or the batch");
  }
  Matrix ignored;
  const double value = reference(x, n, d, ignored), alone = run(c, d, 14, false, 5).value;
  std::printf("value alone: error %.1e\n", std::fabs(alone / value - 1.0));
  expect(std::fabs(alone / value - 1.0) < 1e-6, "value alone");
  // In place.
  std::vector<unsigned char> workspace(dse::cuda::effective_rank_workspace(d, 4));
  Matrix both = c;
  double in_place = 0.0;
  dse::cuda::run_effective_rank(both.data(), d, workspace.data(), 4, true, &in_place, both.data(), nullptr);
  expect(in_place == first.value && both == first.f, "in place");
}

// Features of strides that no contiguous tensor has, with scales and a mean.
template <class S>
void check_features(const char* name, double tolerance) {
  const int64_t outer = 7, inner = 13, d = 70, n = outer * inner, begin = 3, end = n - 2;
  std::vector<S> data(outer * inner * d * 2);
  for (S& v : data) v = dse::cuda::from_double<S>(normal());
  std::vector<double> scale(n), mean(d);
  for (double& v : scale) v = 0.5 + std::fabs(normal());
  for (double& v : mean) v = 0.1 * normal();
  const dse::cuda::FeatureView<S> x{data.data(), outer, inner, d, 2 * d, 2 * outer * d, 2, scale.data()};
  Matrix rows((end - begin) * d), expected(d * d, 0.0);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t f = 0; f < d; ++f) rows[(i - begin) * d + f] = x.at(i, f) - mean[f];
  for (int64_t i = 0; i < end - begin; ++i)
    for (int64_t j = 0; j < d; ++j)
      for (int64_t k = 0; k < d; ++k) expected[j * d + k] += rows[i * d + j] * rows[i * d + k];
  Matrix first;
  for (uint64_t seed : {0, 5, 9}) {
    dse::emulation::schedule_seed = seed;
    const int splits = 3;
    Matrix c(d * d, -1.0), workspace(dse::cuda::second_moment_workspace(d, splits) / 8, std::nan(""));
    dse::cuda::run_second_moment(x, begin, end, mean.data(), splits, workspace.data(), c.data(), nullptr);
    double error = 0.0;
    for (size_t i = 0; i < c.size(); ++i) error = std::max(error, std::fabs(c[i] - expected[i]));
    expect(error < tolerance, std::string(name) + ": second moment");
    if (seed == 0) {
      first = c;
      std::printf("%-22s second moment error %.1e\n", name, error);
    }
    expect(c == first, std::string(name) + ": bits depend on the schedule");
  }
  // More splits than steps, no mean, no scales.
  dse::cuda::FeatureView<S> plain = x;
  plain.row_scale = nullptr;
  Matrix c(d * d, -1.0), workspace(dse::cuda::second_moment_workspace(d, 9) / 8, std::nan(""));
  dse::cuda::run_second_moment(plain, 0, 5, static_cast<const double*>(nullptr), 9, workspace.data(), c.data(),
                               nullptr);
  double error = 0.0;
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t k = 0; k < d; ++k) {
      double sum = 0.0;
      for (int64_t i = 0; i < 5; ++i) sum += plain.at(i, j) * plain.at(i, k);
      error = std::max(error, std::fabs(sum - c[j * d + k]));
    }
  }
  expect(error < tolerance, std::string(name) + ": few rows");
}

}  // namespace

int main() {
  check_ranks();
  check_degenerate();
  check_repeatable();
  check_features<double>("float64", 1e-11);
  check_features<float>("float32", 1e-11);
  check_features<__nv_bfloat16>("bfloat16", 1e-11);
  check_features<__half>("float16", 1e-11);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
