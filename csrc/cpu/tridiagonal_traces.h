// What a sum over the eigenvalues of a tridiagonal matrix needs, without the eigenvalues: a lower bound of the
// smallest one, and traces of inverses of shifted copies. A dozen passes, where QL iterations take n of them.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace dse::cpu {

// An upper bound of the eigenvalues of rows begin .. n of T, from its discs (Gershgorin).
double largest_bound(const double* diagonal, const double* couplings, int64_t begin, int64_t n);

// T has n diagonal entries and, between them, n - 1 couplings; `work` is overwritten.

// At most 5 % below the smallest eigenvalue; 0 where that is less than 1e-12 of `largest`, an upper bound of all
// of them.
double smallest_eigenvalue(int64_t n, const double* diagonal, const double* couplings, double largest);

// below[i] = the number of eigenvalues less than at[i], for `count` numbers; `largest` as above.
void eigenvalues_below(int64_t n, const double* diagonal, const double* couplings, double largest, int64_t count,
                       const double* at, double* below);

// out[s] = tr (T + shift[s])^-1 for `count` shifts; all of these matrices are positive definite.
void inverse_traces(int64_t n, const double* diagonal, const double* couplings, int64_t count,
                    const double* shift, double* out, Buffer<double>& work);

}  // namespace dse::cpu
