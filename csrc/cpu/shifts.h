// Functions of a positive semidefinite matrix A as sums of inverses of shifted copies,
//   f(A) = sum_s weight[s] (A + shift[s])^-1,
// with positive shifts. Both functions here are integrals over such inverses, and the sums are quadratures of
// them.
#pragma once

#include <cstdint>
#include <vector>

namespace dse::cpu {

struct ShiftedInverses {
  std::vector<double> shift, weight;

  int64_t size() const { return static_cast<int64_t>(shift.size()); }
  // f(eigenvalue).
  double at(double eigenvalue) const;
};

// A^-1/2 for eigenvalues in [smallest, largest], 0 < smallest, to a relative error of about `error` at each of
// them. Finite outside too: at 0 a small multiple of smallest^-1/2.
ShiftedInverses inverse_square_root(double smallest, double largest, double error);

// A^-1/2 and A^-1/2 ln(A / unit) at the same shifts, in the same sense; the error of the second is relative to
// A^-1/2.
struct InverseRootAndLog {
  ShiftedInverses root, log;
};
InverseRootAndLog inverse_square_root_and_log(double smallest, double largest, double unit, double error);

}  // namespace dse::cpu
