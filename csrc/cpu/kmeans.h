// k-means++ seeding and Lloyd iterations over one set of rows.
#pragma once

#include <cstdint>

#include "common/rng.h"
#include "cpu/features.h"
#include "cpu/parallel.h"

namespace dse::cpu {

struct KMeansOptions {
  int64_t max_iters = 20;
  double tol = 1e-4;  // stop where the Frobenius norm of the centroids' shift falls below it
};

// Working memory of one problem; reused from one to the next.
template <typename T>
struct KMeansWorkspace {
  Buffer<T> points;          // n x ld: (x - shift) / scale
  Buffer<T> centroids;       // k x ld, in the same coordinates
  Buffer<T> distance;        // n: squared distances
  Buffer<T> norms;           // n: squared norms of the points
  Buffer<T> centroid_norms;  // k
  Buffer<T> batch;           // rows that are compared with all centroids, and what comes of it
  Buffer<T> upper;           // n: bound of the distance to the own centroid, then k: of the centroids' last step
  Buffer<T> lower;           // n x k: bounds of the distances to all of them
  Buffer<double> sums;       // k x ld
  Buffer<double> row;        // one row a task
  Buffer<double> shift;      // d
  Buffer<int64_t> labels, previous, counts;
  double scale = 1.0;
  T slack = T(0);  // relative width of a bound
  int64_t ld = 0;
};

// Clusters rows [first, first + n) of x. Writes n labels; centroids (k x d, in x's coordinates, float64) if not
// null; returns the inertia sum_i ||x_i - c_label(i)||^2 if asked for, else 0.
//
// k <= n. Final labels are the nearest centroids (lowest index on ties); an empty cluster moves to the row that
// lies farthest from its own centroid. Same result for any number of threads.
template <typename T>
double kmeans(const Features& x, int64_t first, int64_t n, int64_t k, const KMeansOptions& options,
              const RngStream& rng, KMeansWorkspace<T>& ws, int64_t* labels, double* centroids,
              bool want_inertia);

}  // namespace dse::cpu
