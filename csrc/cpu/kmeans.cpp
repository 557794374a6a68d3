// k-means in centred, scaled coordinates: subtracting a mean of the rows keeps the differences between
// collapsing features, and dividing by their largest deviation keeps squares inside float32's range.
//
// Most distances are never computed: the triangle inequality bounds them. Every row keeps an upper bound of the
// distance to its own centroid and a lower one for each other (Elkan, "Using the triangle inequality to
// accelerate k-means", ICML 2003); a centroid's step moves the bounds, and only centroids whose bounds overlap
// are looked at: a few by their distances, many, as where there are no clusters, by a product first. The seeding
// leaves the first bounds, and skips rows that the next centroid cannot attract (Raff 2021). Bounds are widened
// by more than the rounding of a distance, so that labels are those of all distances. Centroid sums are kept in
// float64 and updated only for rows that changed cluster.

#include "cpu/kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/processor.h"
#include "cpu/products.h"

namespace dse::cpu {
namespace {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kListed = 64;      // centroids that one row is compared with at a time
constexpr int64_t kBatchRows = 16;   // rows that are compared with all centroids side by side
constexpr int64_t kFewOverlaps = 5;  // centroids up to which a row is better compared with one after the other
constexpr int64_t kSlab = 64;        // columns of the centroid sums that one task updates

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

}  // namespace
}  // namespace dse::cpu

#define DSE_KERNELS "cpu/kmeans.kernels.h"
#include "cpu/every_isa.h"

namespace dse::cpu {

template <typename T>
double kmeans(const Features& x, int64_t first, int64_t n, int64_t k, const KMeansOptions& options,
              const RngStream& rng, KMeansWorkspace<T>& ws, int64_t* labels, double* centroids,
              bool want_inertia) {
  return DSE_CALL_BY_ISA(run<T>, x, first, n, k, options, rng, ws, labels, centroids, want_inertia);
}

template double kmeans<float>(const Features&, int64_t, int64_t, int64_t, const KMeansOptions&, const RngStream&,
                              KMeansWorkspace<float>&, int64_t*, double*, bool);
template double kmeans<double>(const Features&, int64_t, int64_t, int64_t, const KMeansOptions&, const RngStream&,
                               KMeansWorkspace<double>&, int64_t*, double*, bool);

}  // namespace dse::cpu
