// The definitions on plain float64 arrays, slowly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace fuzz {

using Vector = std::vector<double>;

// Rows of a matrix that is held row by row.
struct Rows {
  Vector data;
  int64_t n = 0, d = 0;
  Rows(int64_t rows, int64_t columns) : data(static_cast<size_t>(rows * columns)), n(rows), d(columns) {}
  double* row(int64_t i) { return data.data() + i * d; }
  const double* row(int64_t i) const { return data.data() + i * d; }
};

inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline double distance(const double* a, const double* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

inline Rows select(const Rows& x, const std::vector<int64_t>& rows) {
  Rows out(static_cast<int64_t>(rows.size()), x.d);
  for (size_t i = 0; i < rows.size(); ++i) std::copy_n(x.row(rows[i]), x.d, out.row(static_cast<int64_t>(i)));
  return out;
}

inline Vector mean_row(const Rows& x) {
  Vector mean(static_cast<size_t>(x.d));
  for (int64_t f = 0; f < x.d; ++f) {
    long double sum = 0.0L;
    for (int64_t i = 0; i < x.n; ++i) sum += x.row(i)[f];
    mean[static_cast<size_t>(f)] = static_cast<double>(sum / x.n);
  }
  return mean;
}

inline void center(Rows& x) {
  const Vector mean = mean_row(x);
  for (int64_t i = 0; i < x.n; ++i)
    for (int64_t f = 0; f < x.d; ++f) x.row(i)[f] -= mean[static_cast<size_t>(f)];
}

// Singular values by one-sided Jacobi rotations (Hestenes 1958), small ones accurate too.
inline Vector singular_values(Rows x) {
  if (x.n < x.d) {
    Rows turned(x.d, x.n);
    for (int64_t i = 0; i < x.n; ++i)
      for (int64_t f = 0; f < x.d; ++f) turned.row(f)[i] = x.row(i)[f];
    x = turned;
  }
  // Columns, one after the other.
  std::vector<Vector> column(static_cast<size_t>(x.d), Vector(static_cast<size_t>(x.n)));
  double largest = 0.0;
  for (int64_t i = 0; i < x.n; ++i)
    for (int64_t f = 0; f < x.d; ++f) largest = std::max(largest, std::abs(x.row(i)[f]));
  Vector values(static_cast<size_t>(x.d), 0.0);
  if (largest == 0.0) return values;
  for (int64_t i = 0; i < x.n; ++i)
    for (int64_t f = 0; f < x.d; ++f)
      column[static_cast<size_t>(f)][static_cast<size_t>(i)] = x.row(i)[f] / largest;
  for (int sweep = 0; sweep < 40; ++sweep) {
    bool rotated = false;
    for (size_t p = 0; p < column.size(); ++p) {
      for (size_t q = p + 1; q < column.size(); ++q) {
        double* a = column[p].data();
        double* b = column[q].data();
        const double aa = dot(a, a, x.n), bb = dot(b, b, x.n), ab = dot(a, b, x.n);
        if (!(std::abs(ab) > 1e-15 * std::sqrt(aa * bb))) continue;
        rotated = true;
        const double zeta = (bb - aa) / (2.0 * ab);
        const double t = (zeta >= 0 ? 1.0 : -1.0) / (std::abs(zeta) + std::hypot(1.0, zeta));
        const double c = 1.0 / std::hypot(1.0, t), s = c * t;
        for (int64_t i = 0; i < x.n; ++i) {
          const double old = a[i];
          a[i] = c * old - s * b[i];
          b[i] = s * old + c * b[i];
        }
      }
    }
    if (!rotated) break;
  }
  for (size_t f = 0; f < column.size(); ++f)
    values[f] = largest * std::sqrt(dot(column[f].data(), column[f].data(), x.n));
  return values;
}

inline double sum(const Vector& values) {
  double total = 0.0;
  for (const double value : values) total += value;
  return total;
}

inline double root_mean_square(const Rows& x) {
  double largest = 0.0;
  for (const double value : x.data) largest = std::max(largest, std::abs(value));
  if (largest == 0.0) return 0.0;
  double total = 0.0;
  for (const double value : x.data) total += (value / largest) * (value / largest);
  return largest * std::sqrt(total / static_cast<double>(x.n));
}

// Singular values that are no more than rounding of the rows do not count; `unsure` receives how much of the sum
// lies near that bound.
inline double nuclear_norm(Rows rows, double* unsure) {
  const double floor = 1e-13 * root_mean_square(rows) * std::sqrt(static_cast<double>(rows.n * rows.d));
  center(rows);
  const Vector values = singular_values(std::move(rows));
  *unsure = floor * static_cast<double>(values.size());
  return sum(values);
}

inline double effective_rank(Rows rows, bool centered, double* smallest_ratio) {
  const double floor = 1e-13 * root_mean_square(rows) * std::sqrt(static_cast<double>(rows.n * rows.d));
  if (centered) center(rows);
  Vector values = singular_values(std::move(rows));
  for (double& value : values) value = value > floor ? value : 0.0;
  const double total = sum(values), largest = *std::max_element(values.begin(), values.end());
  *smallest_ratio = 1.0;
  if (!(total > 0.0)) return 0.0;
  double entropy = 0.0;
  for (const double value : values) {
    const double p = value / total;
    if (p > 0.0) {
      entropy -= p * std::log(p);
      *smallest_ratio = std::min(*smallest_ratio, value / largest);
    }
  }
  return std::exp(entropy);
}

}  // namespace fuzz
