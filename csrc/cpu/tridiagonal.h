// Eigenvalues and functions of one symmetric matrix that is too large for tridiagonal_lanes.h.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/shifts.h"

namespace dse::cpu {

// A = Q T Q^T. Matrices are n x n, row-major, with leading dimension `ld`, a multiple of 8 and at least
// gram_ld(n).
class Tridiagonal {
 public:
  // Reduces a matrix with zeros beyond column n, of which both triangles are given; it is overwritten. One
  // thread.
  void reduce(double* a, int64_t n, int64_t ld);

  int64_t side() const { return n_; }
  // T, scaled by a power of four: see scale(). n entries and n - 1 couplings.
  const double* diagonal() const { return vectors_.data(); }
  const double* couplings() const { return vectors_.data() + n_; }
  // What A was multiplied by before.
  double scale() const { return scale_; }

  // Orthonormal rows (count x n) that span the eigenvectors of the `count` smallest eigenvalues, of which `below`
  // is the largest in magnitude and a small part of the next one. In units of A.
  void smallest_subspace(int64_t count, double below, double* rows);

  // f(A) = Q f(T) Q^T, symmetric, into `out` (as large as the matrix was; it may be the same memory). All
  // threads, unless called by a task of for_each_task.
  void apply(const ShiftedInverses& function, double* out);

 private:
  int64_t n_ = 0, ld_ = 0;
  double scale_ = 1.0;
  Buffer<double> reflectors_;  // n x ld, row k: v_k, zero up to column k
  Buffer<double> vectors_;     // diagonal, couplings, factors of the reflectors
  Buffer<double> panel_;       // operands of the updates
  Buffer<double> work_;
};

}  // namespace dse::cpu
