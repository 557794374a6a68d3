// Eigenvalues and functions of one symmetric matrix that is too large for tridiagonal_lanes.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/shifts.h"

namespace dse::cpu {

// The part of the columns that a mixed reduction does in float64 at most, where float32 products are not enough.
inline constexpr int64_t kWideShare = 8;

// Sides from which on sums are shared out among parts. Clusters, which are many, have smaller ones, and threads
// have one each; of a single matrix that is smaller, one thread does most.
inline constexpr int64_t kWorthParts = kWorthThreads == 0 ? 0 : 640;
// Sides up to which a single matrix is better one thread's work beside other tasks. Builds that look for races:
// both ways.
inline constexpr int64_t kOneThreads = kWorthThreads == 0 ? 32 : kWorthParts - 1;

// What to call flat, of the Gram matrix of a matrix with sides `shorter` and `longer`. Of independent entries the
// mean of the inverse eigenvalues is that of the mean one over 1 - shorter / longer (Marchenko & Pastur), and the
// gradient's error grows with it: a tenth of what is allowed, for spectra that are less kind.
inline double flat_share(int64_t shorter, int64_t longer) {
  constexpr double kLeast = 8.0, kMost = 100.0;
  return std::max(kLeast, kMost * (1.0 - static_cast<double>(shorter) / static_cast<double>(longer)));
}

// A = Q T Q^T. Matrices are n x n, row-major, with leading dimension `ld`, a multiple of 8 and at least
// gram_ld(n).
class Tridiagonal {
 public:
  // Reduces a matrix with zeros beyond column n, of which the upper triangle and the diagonal blocks of eight are
  // given; it is overwritten. All threads, unless called by a task of for_each_task.
  void reduce(double* a, int64_t n, int64_t ld);
  // The same, but for the first columns in float32: as long as that makes the error() smaller and it is not yet
  // that of `flat` times the mean eigenvalue, and `most_wide` of them or one block at most, are in float64.
  void reduce_mixed(double* a, int64_t n, int64_t ld, int64_t most_wide, double flat);
  // In float64 after all. `a` is what the mixed reduction has left.
  void reduce_again(double* a);

  int64_t side() const { return n_; }
  // T, scaled by a power of four: see scale(). n entries and n - 1 couplings.
  const double* diagonal() const { return vectors_.data(); }
  const double* couplings() const { return vectors_.data() + n_; }
  // What A was multiplied by before.
  double scale() const { return scale_; }
  // Of a mixed reduction: how far Q T Q^T is from A, about, in units of A; 0 otherwise. The first columns span
  // what the powers of A make of one vector, the largest eigenvalues above all, so that what is left for float32,
  // and with it the error, is small in comparison.
  double error() const { return error_; }

  // Orthonormal rows (count x n) that span the eigenvectors of the `count` smallest eigenvalues, of which `below`
  // is the largest in magnitude and a small part of the next one. In units of A. Not after a mixed reduction.
  void smallest_subspace(int64_t count, double below, double* rows);

  // f(A) = Q f(T) Q^T, symmetric, into `out` (as large as the matrix was; it may be the same memory). All
  // threads, unless called by a task of for_each_task. Not after a mixed reduction.
  void apply(const ShiftedInverses& function, double* out);
  // The same in float32, after either reduction: f(A) = unit * result, whose entries are in range whatever f. It
  // has the leading dimension of A and is valid until the next call.
  float* apply_narrow(const ShiftedInverses& function, double* unit);

 private:
  template <typename T>
  struct Memory {
    Buffer<T> reflectors;  // n x ld, row k: v_k, zero up to column k
    Buffer<T> panel;       // operands of the updates
    Buffer<T> work;
  };

  void start(double* a, int64_t n, int64_t ld);
  template <typename T>
  void reduce_columns(T* a, int64_t begin, int64_t end, Memory<T>& memory, Crew& crew);
  template <typename T>
  void apply_by(Crew& crew, const ShiftedInverses& function, double unit, Memory<T>& memory, T* out);
  template <typename T>
  void apply_in(const ShiftedInverses& function, double unit, Memory<T>& memory, T* out);

  int64_t n_ = 0, ld_ = 0;
  double scale_ = 1.0, error_ = 0.0;
  int64_t narrow_from_ = 0;  // the first column whose reflector is in float32
  Buffer<double> vectors_;   // diagonal, couplings, factors of the reflectors
  Memory<double> wide_;
  Memory<float> narrow_;
  Buffer<float> narrow_matrix_;
  Buffer<double> shifts_;
};

}  // namespace dse::cpu
