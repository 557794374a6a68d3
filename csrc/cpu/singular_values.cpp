#include "cpu/singular_values.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace dse::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kNarrowEps = std::numeric_limits<float>::epsilon();
// Roundings that the entries of Q f(T) Q^T and of its product with the rows go through, about.
constexpr double kWayBack = 8.0;

}  // namespace

double noise_floor(double magnitude, int64_t n) {
  return 4.0 * kEps * magnitude * std::sqrt(static_cast<double>(n));
}

void eigenvalues_to_sigma(const double* values, int64_t m, int64_t structural_null, double floor, double* sigma) {
  for (int64_t i = 0; i < m; ++i) {
    const double s = i < structural_null ? 0.0 : std::sqrt(std::max(values[i], 0.0));
    sigma[i] = s > floor ? s : 0.0;
  }
}

bool is_steep(const double* values, int64_t m, int64_t structural_null, double floor, double ratio) {
  const double largest = values[m - 1];
  // Nothing but rounding: the value is 0 and so is the gradient.
  if (!(largest > floor * floor)) return false;
  return structural_null < m && values[structural_null] < ratio * largest;
}

void cut_noise(double* sigma, int64_t m, int64_t n, int64_t d, double floor) {
  const double largest = *std::max_element(sigma, sigma + m);
  const double cut = std::max(floor, static_cast<double>(std::max(n, d)) * kEps * largest);
  for (int64_t i = 0; i < m; ++i)
    if (!(sigma[i] > cut)) sigma[i] = 0.0;
}

Part Part::of(const double* values, int64_t count) {
  const auto sum_times = [values, count](const ShiftedInverses& function) {
    double total = 0.0;
    for (int64_t i = 0; i < count; ++i) total += values[i] * function.at(values[i]);
    return total;
  };
  return {values[0], values[count - 1], sum_times, {}};
}

SingularSums SingularSums::of(const double* sigma, const double* weight, int64_t m) {
  SingularSums sums;
  for (int64_t i = 0; i < m; ++i) {
    sums.sum += sigma[i];
    sums.most_weight = std::max(sums.most_weight, std::abs(weight[i]));
  }
  return sums;
}

bool gradient_functions(SpectralKind kind, Part* parts, int64_t count, double value, const SingularSums& sums,
                        double error) {
  if (kind == SpectralKind::kNuclearNorm) {
    for (int64_t p = 0; p < count; ++p)
      parts[p].function = inverse_square_root(parts[p].smallest, parts[p].largest, error);
    return true;
  }
  // Near its maximum, where all singular values are equal, the effective rank has next to no gradient, and an
  // error is relative to that.
  const double bracket = sums.most_weight * sums.sum / value;
  if (!(bracket > 4.0 * kEps)) return false;
  error = std::max(error * std::min(bracket, 1.0), 4.0 * kEps);
  const double centre = std::sqrt(parts[0].smallest) * std::sqrt(parts[0].largest);
  InverseRootAndLog both[2];
  double root = 0.0, log = 0.0;
  for (int64_t p = 0; p < count; ++p) {
    both[p] = inverse_square_root_and_log(parts[p].smallest, parts[p].largest, centre, error);
    root += parts[p].sum_times(both[p].root);
    log += parts[p].sum_times(both[p].log);
  }
  // w = -(F / S) (log s - log S + log F), log s = log(lambda) / 2. The second factor's constant makes sum w s
  // vanish: the effective rank does not depend on the features' scale. Taken from the sums as they are, not from
  // their limits, it makes that exact.
  const double unit = -0.5 * value / sums.sum, constant = -log / root;
  for (int64_t p = 0; p < count; ++p) {
    parts[p].function = both[p].log;
    for (size_t s = 0; s < both[p].root.weight.size(); ++s) {
      double& term = parts[p].function.weight[s];
      term = unit * (term + constant * both[p].root.weight[s]);
    }
  }
  return true;
}

NarrowLoss narrow_loss(const double* values, const double* sigma, const double* weight, int64_t null,
                       int64_t lifted, int64_t m, double value, const ShiftedInverses& function, double error,
                       double row_error) {
  double along = 0.0, squares = 0.0, change = 0.0, row_change = 0.0, trace = 0.0, sizes = 0.0, mean = 0.0,
         spread = 0.0;
  std::vector<double> own(static_cast<size_t>(m)), at(own.size());  // eigenvalues, and the function of them
  for (int64_t i = lifted; i < m; ++i) {
    const double eigenvalue = i < null ? 0.0 : std::max(values[i], 0.0);
    double steepness = 0.0, size = 0.0;
    for (size_t s = 0; s < function.shift.size(); ++s) {
      const double inverse = 1.0 / (eigenvalue + function.shift[s]);
      const double term = std::abs(function.weight[s]) * inverse;
      size += term;
      steepness += term * inverse;
    }
    sizes += size * size;
    if (i < null) continue;
    along += sigma[i] > 0.0 ? std::abs(weight[i]) / (2.0 * sigma[i]) : 0.0;
    squares += weight[i] * weight[i];
    trace += eigenvalue;
    // The diagonal of a symmetric random matrix has twice the variance of the rest.
    change += 2.0 * eigenvalue * steepness * steepness;
    own[static_cast<size_t>(i)] = eigenvalue;
    at[static_cast<size_t>(i)] = sigma[i] > 0.0 ? weight[i] / sigma[i] : 0.0;
    mean += at[static_cast<size_t>(i)];
    row_change += 4.0 * eigenvalue * eigenvalue * steepness * steepness;
    double pairs = 0.0, row_pairs = 0.0;
    for (int64_t j = null; j < i; ++j) {
      const double gap = eigenvalue - own[static_cast<size_t>(j)];
      const double difference = at[static_cast<size_t>(i)] - at[static_cast<size_t>(j)];
      const double slope = gap > 1e-7 * eigenvalue ? difference / gap : steepness;
      const double both = eigenvalue + own[static_cast<size_t>(j)], term = slope * slope * both;
      pairs += term;
      row_pairs += term * both;
    }
    change += pairs;
    row_change += row_pairs;
  }
  const double count = static_cast<double>(m - null), entry = error / std::sqrt(count);
  mean /= count;
  for (int64_t i = null; i < m; ++i) {
    const double own = at[static_cast<size_t>(i)] - mean;
    spread += own * own;
  }
  NarrowLoss loss;
  loss.value = (error * along + row_error * std::sqrt(squares)) / value;
  loss.gradient = entry * std::sqrt(change / squares);
  loss.rows = row_error * std::sqrt(row_change / squares);
  loss.rounding = kWayBack * kNarrowEps * std::sqrt(sizes / count * trace / squares);
  loss.amplification = std::sqrt(spread / count * trace / squares);
  return loss;
}

NarrowLoss nuclear_norm_loss(const PowerSums& sums, int64_t longer, double error, double row_error) {
  const double count = static_cast<double>(sums.count), inverse = sums.inverses / count;
  NarrowLoss loss;
  loss.value = (error * 0.5 * sums.inverse_roots + row_error * std::sqrt(count)) / sums.roots;
  loss.gradient = error * std::sqrt(0.5) * inverse;
  loss.rows = row_error * std::sqrt(sums.inverses);
  loss.same_rows = row_error * std::sqrt(0.5 * sums.inverse_roots * sums.inverse_roots / count +
                                         (static_cast<double>(longer) - count) * inverse);
  const double mean_square = sums.eigenvalues / count, mean = sums.inverse_roots / count;
  loss.rounding = kWayBack * kNarrowEps * std::sqrt(inverse * mean_square);
  loss.amplification = std::sqrt(std::max(inverse - mean * mean, 0.0) * mean_square);
  return loss;
}

}  // namespace dse::cpu
