// A^-1/2 = (2 / pi) int_0^inf (A + t^2)^-1 dt.
//
// Alone, in the variable of Hale, Higham & Trefethen ("Computing A^alpha, log(A), and related matrix functions by
// contour integrals", SIAM J. Numer. Anal. 2008, method 3), t = sqrt(a) sc(u | 1 - a/b), in which the integrand
// is periodic and analytic in a strip: N midpoints have a relative error of 2 exp(-pi^2 N / K'), K' the complete
// elliptic integral, about ln(16 b / a) / 2.
//
// With the logarithm, A^-1/2 ln A = (4 / pi) int_0^inf ln t (A + t^2)^-1 dt (the substitution t^2 = A y, and
// int y^-1/2 ln y / (1 + y) dy = 0), whose integrand is singular at the ends of that variable; in x = ln t it is
// analytic up to |Im x| = pi / 2 and decays like exp(-|x|): the trapezoidal rule of step h has a relative error
// of 2 exp(-pi^2 / h), and the same points serve both functions.

#include "cpu/shifts.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace dse::cpu {
namespace {

constexpr double kPi = std::numbers::pi;

struct Elliptic {
  double sn, cn, dn;
};

// Jacobi's functions of parameter 1 - complement by the arithmetic-geometric mean, for 0 <= u <= K / 2
// (Abramowitz & Stegun 16.4), and K itself.
class JacobiFunctions {
 public:
  explicit JacobiFunctions(double complement) : complement_(complement) {
    double a = 1.0, b = std::sqrt(complement);
    for (int i = 0; i < kMostSteps; ++i) {
      const double half_gap = 0.5 * (a - b);
      const double mean = 0.5 * (a + b);
      b = std::sqrt(a * b);
      a = mean;
      ratio_.push_back(half_gap / a);
      if (half_gap <= 1e-17 * a) break;
    }
    mean_ = a;
  }
  double quarter_period() const { return kPi / (2.0 * mean_); }
  Elliptic operator()(double u) const {
    double phi = std::ldexp(mean_ * u, static_cast<int>(ratio_.size()));
    for (size_t i = ratio_.size(); i-- > 0;) phi = 0.5 * (phi + std::asin(ratio_[i] * std::sin(phi)));
    const double sn = std::sin(phi), cn = std::cos(phi);
    return {sn, cn, std::sqrt(complement_ + (1.0 - complement_) * cn * cn)};
  }

 private:
  static constexpr int kMostSteps = 16;
  double complement_, mean_;
  std::vector<double> ratio_;
};

}  // namespace

double ShiftedInverses::at(double eigenvalue) const {
  double total = 0.0;
  for (size_t s = 0; s < shift.size(); ++s) total += weight[s] / (eigenvalue + shift[s]);
  return total;
}

ShiftedInverses inverse_square_root(double smallest, double largest, double error) {
  const double complement = std::min(smallest / largest, 1.0);
  const double k = std::sqrt(complement);
  const JacobiFunctions jacobi(complement);
  const double period = jacobi.quarter_period();
  const auto count = static_cast<int64_t>(std::ceil(period * std::log(2.0 / error) / (kPi * kPi)));
  ShiftedInverses out;
  out.shift.resize(static_cast<size_t>(count));
  out.weight.resize(static_cast<size_t>(count));
  const double unit = 2.0 / kPi * period / static_cast<double>(count) * std::sqrt(smallest);
  // The points mirror each other in t -> sqrt(a b) / t; only the lower half is well conditioned.
  for (int64_t j = 0; 2 * j < count; ++j) {
    const double u = (static_cast<double>(j) + 0.5) * period / static_cast<double>(count);
    const Elliptic e = jacobi(u);
    const auto low = static_cast<size_t>(j), high = static_cast<size_t>(count - 1 - j);
    out.shift[high] = largest * (e.cn / e.sn) * (e.cn / e.sn);
    out.weight[high] = unit * e.dn / (k * e.sn * e.sn);
    out.shift[low] = smallest * (e.sn / e.cn) * (e.sn / e.cn);
    out.weight[low] = unit * e.dn / (e.cn * e.cn);
  }
  return out;
}

InverseRootAndLog inverse_square_root_and_log(double smallest, double largest, double unit, double error) {
  const double step = kPi * kPi / std::log(2.0 / error), tail = std::log(1.0 / error) / 3.0 + 1.0;
  const double first = 0.5 * std::log(smallest) - tail, last = 0.5 * std::log(largest) + tail;
  const auto count = static_cast<int64_t>(std::ceil((last - first) / step)) + 1;
  const double origin = 0.5 * std::log(unit);
  InverseRootAndLog out;
  const auto add = [&](double shift, double sum, double sum_of_logs) {
    // Far above the rounding of a vanishing eigenvalue: the shifted matrix stays positive definite. Such a shift
    // is still nothing beside `smallest`, or the spectrum is out of a Gram matrix's reach.
    const double lifted = std::max(shift, 1e-13 * largest);
    for (ShiftedInverses* function : {&out.root, &out.log}) function->shift.push_back(lifted);
    out.root.weight.push_back(2.0 / kPi * step * sum);
    out.log.weight.push_back(4.0 / kPi * step * (sum_of_logs - origin * sum));
  };
  for (int64_t j = 0; j < count; ++j) {
    const double x = first + static_cast<double>(j) * step, t = std::exp(x);
    add(t * t, t, t * x);
  }
  // All points beyond either end as one: below, t / (A + t^2) = t / A - t^3 / A^2 + ..., above, 1 / t - A / t^3 +
  // ...; the shift matches the second term of the geometric series. Third order in exp(-tail).
  const double q = std::exp(-step), sum1 = q / (1.0 - q), moment = step * sum1 / (1.0 - q),
               sum3 = q * q * q / (1.0 - q * q * q);
  const double below = std::exp(first);
  add(below * below * sum3 / sum1, below * sum1, below * (first * sum1 - moment));
  const double end = first + static_cast<double>(count - 1) * step, above = std::exp(end);
  const double shift = above * above * sum1 / sum3;
  add(shift, shift / above * sum1, shift / above * (end * sum1 + moment));
  return out;
}

}  // namespace dse::cpu
