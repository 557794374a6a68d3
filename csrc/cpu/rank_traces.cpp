#include "cpu/rank_traces.h"

#include <cmath>
#include <vector>

#include "cpu/tridiagonal_traces.h"

namespace dse::cpu {
namespace {

// Values in the places of eigenvalues: as many in every section of the spectrum as there are, evenly.
std::vector<double> spread_evenly(const Tridiagonal& matrix, double smallest, double largest) {
  constexpr int64_t kSections = 128;
  const int64_t n = matrix.side();
  std::vector<double> edge(kSections + 1), below(edge.size()), values;
  const double ratio = std::pow(largest / smallest, 1.0 / static_cast<double>(kSections));
  for (size_t i = 0; i < edge.size(); ++i) edge[i] = smallest * std::pow(ratio, static_cast<double>(i));
  eigenvalues_below(n, matrix.diagonal(), matrix.couplings(), largest, static_cast<int64_t>(edge.size()),
                    edge.data(), below.data());
  below.front() = 0.0;
  below.back() = static_cast<double>(n);
  for (size_t i = 1; i < edge.size(); ++i) {
    const auto count = static_cast<int64_t>(below[i] - below[i - 1]);
    for (int64_t j = 0; j < count; ++j) {
      const double at = (static_cast<double>(j) + 0.5) / static_cast<double>(count);
      values.push_back(edge[i - 1] * std::pow(ratio, at) / matrix.scale());
    }
  }
  return values;
}

}  // namespace

std::optional<TracedRank> rank_by_traces(const Tridiagonal& matrix, double error, double row_error, double floor,
                                         Buffer<double>& work) {
  constexpr double kValueError = 1e-9;
  const int64_t n = matrix.side();
  const double* diagonal = matrix.diagonal();
  const double* couplings = matrix.couplings();
  const double scale = matrix.scale();
  const double largest = largest_bound(diagonal, couplings, 0, n);
  const double smallest = smallest_eigenvalue(n, diagonal, couplings, largest);
  if (!(smallest > steep_ratio<float>() * largest) || !(smallest > std::max(error, floor * floor) * scale))
    return std::nullopt;

  // The sum of lambda f(lambda) over the eigenvalues: A (A + s)^-1 = I - s (A + s)^-1.
  const auto sum_times = [&](const ShiftedInverses& function) {
    std::vector<double> shift(function.shift), traces(shift.size());
    for (double& s : shift) s *= scale;
    inverse_traces(n, diagonal, couplings, function.size(), shift.data(), traces.data(), work);
    double total = 0.0;
    for (size_t s = 0; s < shift.size(); ++s)
      total += function.weight[s] * (static_cast<double>(n) - shift[s] * traces[s]);
    return total;
  };
  const double low = smallest / scale, high = largest / scale, unit = std::sqrt(low) * std::sqrt(high);
  const InverseRootAndLog both = inverse_square_root_and_log(low, high, unit, kValueError);
  // With s = sqrt(lambda): the sum of s, and that of s ln s.
  const double sum = sum_times(both.root), logs = 0.5 * (sum_times(both.log) + sum * std::log(unit));
  const double entropy = std::log(sum) - logs / sum;
  TracedRank rank;
  rank.value = std::exp(entropy);
  const auto weight = [&](double sigma) { return -(rank.value / sum) * (std::log(sigma / sum) + entropy); };

  const double most = std::max(std::abs(weight(std::sqrt(low))), std::abs(weight(std::sqrt(high))));
  Part part{low, high, sum_times, {}};
  if (!gradient_functions(SpectralKind::kEffectiveRank, &part, 1, rank.value, {sum, most},
                          function_error<float>()))
    return std::nullopt;
  rank.function = std::move(part.function);
  const std::vector<double> values = spread_evenly(matrix, smallest, largest);
  std::vector<double> sigma, weights;
  for (const double value : values) {
    sigma.push_back(std::sqrt(value));
    weights.push_back(weight(sigma.back()));
  }
  rank.loss = narrow_loss(values.data(), sigma.data(), weights.data(), 0, 0, n, rank.value, rank.function, error,
                          row_error);
  return rank;
}

}  // namespace dse::cpu
