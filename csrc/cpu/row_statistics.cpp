#include "cpu/row_statistics.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/stage.h"
#include "cpu/streamed.h"

namespace dse::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

// Euclidean norm without overflow or underflow of the squares.
double safe_norm(const double* row, int64_t d) {
  const double squares = sum_of_squares(row, d);
  if (squares > 1e-280 && squares < 1e280) return std::sqrt(squares);
  double largest = 0.0;
  for (int64_t f = 0; f < d; ++f) {
    if (!std::isfinite(row[f])) return std::numeric_limits<double>::quiet_NaN();
    largest = std::max(largest, std::abs(row[f]));
  }
  if (largest == 0.0) return 0.0;
  double total = 0.0;
  for (int64_t f = 0; f < d; ++f) total += (row[f] / largest) * (row[f] / largest);
  return largest * std::sqrt(total);
}

}  // namespace

bool row_scales(const Features& x, bool normalize, double* scale, double* mean) {
  DSE_STAGE("row norms");
  const int64_t n = x.rows(), d = x.dim, block = reduction_rows(n), blocks = (n + block - 1) / block;
  const auto load_scaled = [&](int64_t i, double* row) {
    load_run(x.dtype, x.row(i), x.stride_dim, d, scale[i], row);
  };
  // Sums relative to the first row: the mean of equal rows is exact.
  Buffer<double> rows(max_workers() * d), sums(mean != nullptr ? (blocks + 1) * d : 0);
  double* origin = mean != nullptr ? sums.data() + blocks * d : nullptr;
  const auto set_scale = [&](int64_t i, double* row) {
    x.load(i, row);
    const double norm = safe_norm(row, d);
    scale[i] = normalize ? 1.0 / std::max(norm, kNormFloor) : 1.0;
    return std::isfinite(norm);
  };
  std::atomic<bool> finite{set_scale(0, rows.data())};
  if (mean != nullptr) load_scaled(0, origin);
  for_each_task(blocks, 8 * n * d, [&](int64_t b, int64_t worker) {
    double* row = rows.data() + worker * d;
    double* sum = mean != nullptr ? sums.data() + b * d : nullptr;
    if (mean != nullptr) std::fill(sum, sum + d, 0.0);
    for (int64_t i = std::max<int64_t>(1, b * block); i < std::min(n, (b + 1) * block); ++i) {
      if (!set_scale(i, row)) finite = false;
      if (mean == nullptr) continue;
      load_scaled(i, row);
      subtract(origin, row, d);
      accumulate(row, sum, d);
    }
  });
  if (mean == nullptr) return finite;
  for (int64_t b = 1; b < blocks; ++b) axpy(1.0, sums.data() + b * d, sums.data(), d);
  for (int64_t f = 0; f < d; ++f) mean[f] = origin[f] + sums[f] / static_cast<double>(n);
  return finite;
}

bool group_is_finite(const Features& x, int64_t g) {
  std::vector<double> row(static_cast<size_t>(x.dim));
  for (int64_t i = 0; i < x.inner; ++i) {
    x.load(g * x.inner + i, row.data());
    for (const double value : row)
      if (!std::isfinite(value)) return false;
  }
  return true;
}

double average_norm(const Features& x, const double* mean, double* mean_direction) {
  DSE_STAGE("spread");
  const int64_t n = x.rows(), d = x.dim, block = reduction_rows(n), blocks = (n + block - 1) / block;
  Buffer<double> partial(blocks * (2 * d + 2));
  for_each_task(blocks, 8 * n * d, [&](int64_t b, int64_t) {
    double* direction = partial.data() + b * (2 * d + 2);
    double* row = direction + d;
    double total = 0.0, largest = 0.0;
    std::fill(direction, direction + d, 0.0);
    for (int64_t i = b * block; i < std::min(n, (b + 1) * block); ++i) {
      x.load(i, row);
      largest = std::max(largest, sum_of_squares(row, d));
      axpy(-1.0, mean, row, d);
      const double norm = std::sqrt(sum_of_squares(row, d));
      total += norm;
      if (norm > 0.0) axpy(1.0 / norm, row, direction, d);
    }
    row[d] = total;
    row[d + 1] = largest;
  });
  double total = 0.0, largest = 0.0;
  std::fill(mean_direction, mean_direction + d, 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    const double* direction = partial.data() + b * (2 * d + 2);
    axpy(1.0, direction, mean_direction, d);
    total += direction[2 * d];
    largest = std::max(largest, direction[2 * d + 1]);
  }
  for (int64_t f = 0; f < d; ++f) mean_direction[f] /= static_cast<double>(n);
  const double average = total / static_cast<double>(n);
  if (average > 8.0 * kEps * std::sqrt(largest)) return average;
  std::fill(mean_direction, mean_direction + d, 0.0);
  return 0.0;
}

bool nearest_other_centroid(const Features& x, int64_t first, int64_t last, const int64_t* labels,
                            const double* centroids, int64_t k, int64_t* nearest, double* distance) {
  DSE_STAGE("nearest other centroid");
  const int64_t d = x.dim, ld = padded(d), n = last - first;
  constexpr int64_t kRows = 32;
  std::vector<int64_t> present;
  for (int64_t c = 0; c < k; ++c) {
    bool finite = true;
    for (int64_t f = 0; f < d; ++f) finite = finite && std::isfinite(centroids[c * d + f]);
    if (finite) present.push_back(c);
  }
  const auto count = static_cast<int64_t>(present.size());
  if (count < 2) {
    std::fill(nearest, nearest + n, int64_t{-1});
    std::fill(distance, distance + n, 0.0);
    return false;
  }
  Buffer<double> packed(count * ld + count);
  double* half_norm = packed.data() + count * ld;
  for (int64_t c = 0; c < count; ++c) {
    double* row = packed.data() + c * ld;
    std::copy_n(centroids + present[static_cast<size_t>(c)] * d, d, row);
    std::fill(row + d, row + ld, 0.0);
    half_norm[c] = 0.5 * sum_of_squares(row, d);
  }
  const int64_t work_size = kRows * ld + kRows * count;
  Buffer<double> work(max_workers() * work_size);
  for_each_task((n + kRows - 1) / kRows, n * count * ld, [&](int64_t task, int64_t worker) {
    double* rows = work.data() + worker * work_size;
    double* scores = rows + kRows * ld;
    const int64_t begin = task * kRows, end = std::min(n, begin + kRows);
    for (int64_t i = begin; i < end; ++i) x.load_padded(first + i, rows + (i - begin) * ld);
    row_dots(rows, end - begin, packed.data(), count, ld, scores, count);
    for (int64_t i = begin; i < end; ++i) {
      const double* s = scores + (i - begin) * count;
      int64_t best = -1;
      double best_value = 0.0;
      for (int64_t c = 0; c < count; ++c) {
        if (present[static_cast<size_t>(c)] == labels[i]) continue;
        const double value = half_norm[c] - s[c];
        if (best < 0 || value < best_value) {
          best = c;
          best_value = value;
        }
      }
      nearest[i] = present[static_cast<size_t>(best)];
      double square = 0.0;
      squared_distances(rows + (i - begin) * ld, packed.data(), ld, &best, 1, &square);
      distance[i] = std::sqrt(square);
    }
  });
  return true;
}

}  // namespace dse::cpu
