// k-means for one instruction set: see every_isa.h and kmeans.cpp.

namespace dse::cpu::DSE_ISA {
namespace {

// Squared norms of `count` rows.
template <typename T>
void row_norms(const T* rows, int64_t count, int64_t ld, T* out) {
  for (int64_t i = 0; i < count; ++i) row_dots(rows + i * ld, 1, rows + i * ld, 1, ld, out + i, 1);
}

// points = (x - shift) / scale, rounded to T; remembers shift and scale.
template <typename T>
void load_points(const Features& x, int64_t first, int64_t n, KMeansWorkspace<T>& ws) {
  const int64_t d = x.dim, ld = ws.ld, blocks = blocks_of(n, kBlockRows);
  double* shift = ws.shift.reserve(d);
  double* rows = ws.row.reserve(blocks * ld + blocks);
  double* largest = rows + blocks * ld;

  // The mean of a few rows from all over the set: near enough to all of them, unless most of the sample are
  // outliers. Taken relative to the first row, so that equal rows have exactly their own value as the mean.
  constexpr int64_t kSample = 16;
  const int64_t sample = std::min(n, kSample);
  double* origin = ws.sums.reserve(d);
  x.load(first, origin);
  std::fill(shift, shift + d, 0.0);
  for (int64_t s = 1; s < sample; ++s) {
    x.load(first + s * n / sample, rows);
    for (int64_t f = 0; f < d; ++f) shift[f] += rows[f] - origin[f];
  }
  for (int64_t f = 0; f < d; ++f) shift[f] = origin[f] + shift[f] / static_cast<double>(sample);

  // Normalized rows are at most 2 apart; others are scaled into the range of float32's squares.
  double most = 1.0;
  if (!x.unit_rows) {
    for_each_task(blocks, 8 * n * ld, [&](int64_t b, int64_t) {
      double* row = rows + b * ld;
      double extent = 0.0;
      for (int64_t i = b * kBlockRows; i < std::min(n, (b + 1) * kBlockRows); ++i) {
        x.load(first + i, row);
        for (int64_t f = 0; f < d; ++f) extent = std::max(extent, std::abs(row[f] - shift[f]));
      }
      largest[b] = extent;
    });
    most = *std::max_element(largest, largest + blocks);
  }
  // A power of two: scaling is exact.
  ws.scale = most > 0.0 ? std::exp2(std::floor(std::log2(most))) : 1.0;
  if (!(ws.scale > 0.0)) ws.scale = std::numeric_limits<double>::min();
  const double inverse = 1.0 / ws.scale;

  T* points = ws.points.reserve(n * ld);
  T* norms = ws.norms.reserve(n);
  for_each_task(blocks, 8 * n * ld, [&](int64_t b, int64_t) {
    for (int64_t i = b * kBlockRows; i < std::min(n, (b + 1) * kBlockRows); ++i) {
      T* out = points + i * ld;
      x.load_shifted_row(first + i, shift, inverse, out);
      for (int64_t f = d; f < ld; ++f) out[f] = T(0);
      row_norms(out, 1, ld, norms + i);
    }
  });
}

// More than the relative rounding of a distance between rows of ld elements, of which sixteenths are summed one
// after the other at most.
template <typename T>
T distance_slack(int64_t ld) {
  return std::numeric_limits<T>::epsilon() * static_cast<T>(8 + ld / 8);
}

// k-means++ (Arthur & Vassilvitskii 2007): every next centroid is a row drawn with probability proportional to
// its squared distance from the nearest centroid so far. Leaves every row's label and bounds.
template <typename T>
void seed_centroids(int64_t n, int64_t k, const RngStream& rng, KMeansWorkspace<T>& ws, int64_t* labels) {
  const int64_t ld = ws.ld, blocks = blocks_of(n, kBlockRows);
  const T* points = ws.points.data();
  T* centroids = ws.centroids.data();
  T* nearest = ws.distance.reserve(n);
  T* lower = ws.lower.data();
  T* upper = ws.upper.data();
  T* apart = upper + n;  // distances of the newest centroid to the older ones
  std::fill(nearest, nearest + n, std::numeric_limits<T>::infinity());
  int64_t chosen = rng.below(0, n);
  for (int64_t c = 0; c < k; ++c) {
    T* centroid = centroids + c * ld;
    std::copy_n(points + chosen * ld, ld, centroid);
    squared_distances(centroid, centroids, ld, nullptr, c, apart);
    for (int64_t j = 0; j < c; ++j) apart[j] = std::sqrt(apart[j]) * (T(1) - ws.slack);
    for_each_task(blocks, n * ld, [&](int64_t b, int64_t) {
      const int64_t begin = b * kBlockRows, end = std::min(n, begin + kBlockRows);
      int64_t rows[kBlockRows] = {}, count = 0;
      T fresh[kBlockRows];
      for (int64_t i = begin; i < end; ++i) {
        const T gap = c > 0 ? apart[labels[i]] - upper[i] : T(0);  // no nearer than this
        if (c > 0 && gap > upper[i]) lower[i * k + c] = gap;
        else rows[count++] = i;
      }
      squared_distances(centroid, points, ld, rows, count, fresh);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = rows[r];
        const T distance = std::sqrt(fresh[r]);
        lower[i * k + c] = distance * (T(1) - ws.slack);
        if (!(fresh[r] < nearest[i])) continue;
        nearest[i] = fresh[r];
        upper[i] = distance * (T(1) + ws.slack);
        labels[i] = c;
      }
    });
    if (c + 1 == k) return;
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) total += static_cast<double>(nearest[i]);
    const auto draw = static_cast<uint32_t>(c + 1);
    if (!(total > 0.0)) {
      chosen = rng.below(draw, n);
      continue;
    }
    const double target = rng.uniform(draw) * total;
    double running = 0.0;
    chosen = -1;
    int64_t last_positive = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (nearest[i] > T(0)) last_positive = i;
      running += static_cast<double>(nearest[i]);
      if (running > target) {
        chosen = i;
        break;
      }
    }
    if (chosen < 0) chosen = last_positive;  // rounding put the target at the very end
  }
}

// Rows against all centroids: a product tells the distances up to the rounding of large terms, which is enough
// for all but the few that may be the nearest; of these the distances themselves are compared.
template <typename T>
void assign_to_any(const int64_t* rows, int64_t count, int64_t k, KMeansWorkspace<T>& ws, int64_t* labels,
                   T* work) {
  const int64_t ld = ws.ld;
  T* batch = work;
  T* products = batch + kBatchRows * ld;
  T* square = products + kBatchRows * k;
  for (int64_t r = 0; r < count; ++r) std::copy_n(ws.points.data() + rows[r] * ld, ld, batch + r * ld);
  row_dots(batch, count, ws.centroids.data(), k, ld, products, k);
  int64_t list[kListed];
  T squares[kListed];
  for (int64_t r = 0; r < count; ++r) {
    T* lower = ws.lower.data() + rows[r] * k;
    const T* product = products + r * k;
    const T own = ws.norms[rows[r]];
    T least = std::numeric_limits<T>::infinity(), most = T(0);
    for (int64_t c = 0; c < k; ++c) {
      square[c] = own + ws.centroid_norms[c] - T(2) * product[c];
      least = std::min(least, square[c]);
      most = std::max(most, ws.centroid_norms[c]);
    }
    const T margin = T(4) * ws.slack * (own + most);
    for (int64_t c = 0; c < k; ++c) lower[c] = std::sqrt(std::max(square[c] - margin, T(0))) * (T(1) - ws.slack);
    int64_t candidates = 0, best = 0;
    for (int64_t c = 0; c < k; ++c) {
      if (square[c] > least + T(2) * margin) continue;
      ++candidates;
      best = c;
    }
    if (candidates == 1) {  // the nearest in any case
      labels[rows[r]] = best;
      ws.upper[rows[r]] = std::sqrt(square[best] + margin) * (T(1) + ws.slack);
      continue;
    }
    T nearest = std::numeric_limits<T>::infinity();
    for (int64_t c = 0; c < k;) {
      int64_t listed = 0;
      for (; c < k && listed < kListed; ++c)
        if (square[c] <= least + T(2) * margin) list[listed++] = c;
      squared_distances(batch + r * ld, ws.centroids.data(), ld, list, listed, squares);
      for (int64_t i = 0; i < listed; ++i) {
        if (!(squares[i] < nearest)) continue;
        nearest = squares[i];
        best = list[i];
      }
    }
    labels[rows[r]] = best;
    lower[best] = std::sqrt(nearest) * (T(1) - ws.slack);
    ws.upper[rows[r]] = std::sqrt(nearest) * (T(1) + ws.slack);
  }
}

// Nearest centroid of every row, the lowest index on ties.
template <typename T>
void assign(int64_t n, int64_t k, KMeansWorkspace<T>& ws, int64_t* labels) {
  const int64_t ld = ws.ld, blocks = blocks_of(n, kBlockRows);
  row_norms(ws.centroids.data(), k, ld, ws.centroid_norms.reserve(k));
  const int64_t work_size = padded(kBatchRows * (ld + k) + k);
  T* all_work = ws.batch.reserve(max_workers() * work_size);
  for_each_task(blocks, n * k * 4, [&](int64_t b, int64_t worker) {
    T* work = all_work + worker * work_size;
    int64_t list[kListed], batch[kBatchRows], waiting = 0;
    T squares[kListed];
    for (int64_t i = b * kBlockRows; i < std::min(n, (b + 1) * kBlockRows); ++i) {
      T* lower = ws.lower.data() + i * k;
      T& upper = ws.upper[i];
      const auto count_overlaps = [&] {
        int64_t overlaps = 0;
        for (int64_t c = 0; c < k; ++c) overlaps += lower[c] <= upper ? 1 : 0;
        return overlaps;
      };
      const auto wait_for_others = [&] {
        batch[waiting++] = i;
        if (waiting < kBatchRows) return;
        assign_to_any(batch, waiting, k, ws, labels, work);
        waiting = 0;
      };
      const int64_t overlaps = count_overlaps();
      if (overlaps == 0 || (overlaps == 1 && lower[labels[i]] <= upper)) continue;
      if (overlaps > 2 * kFewOverlaps) {
        wait_for_others();
        continue;
      }
      const T* row = ws.points.data() + i * ld;
      int64_t best = labels[i];
      T nearest;
      squared_distances(row, ws.centroids.data(), ld, &best, 1, &nearest);
      lower[best] = std::sqrt(nearest) * (T(1) - ws.slack);
      upper = std::sqrt(nearest) * (T(1) + ws.slack);
      if (overlaps > kFewOverlaps && count_overlaps() > kFewOverlaps) {
        wait_for_others();
        continue;
      }
      const int64_t own = best;
      for (int64_t c = 0; c < k;) {
        int64_t count = 0;
        for (; c < k && count < kListed; ++c)
          if (c != own && lower[c] <= upper) list[count++] = c;
        squared_distances(row, ws.centroids.data(), ld, list, count, squares);
        for (int64_t r = 0; r < count; ++r) {
          lower[list[r]] = std::sqrt(squares[r]) * (T(1) - ws.slack);
          if (squares[r] > nearest || (squares[r] == nearest && list[r] > best)) continue;
          nearest = squares[r];
          best = list[r];
        }
      }
      labels[i] = best;
      upper = std::sqrt(nearest) * (T(1) + ws.slack);
    }
    assign_to_any(batch, waiting, k, ws, labels, work);
  });
}

// Bounds after centroids have moved by step[c]; every addition may round the wrong way.
template <typename T>
void move_bounds(int64_t n, int64_t k, KMeansWorkspace<T>& ws, const int64_t* labels) {
  constexpr T kEps = std::numeric_limits<T>::epsilon();
  const T* step = ws.upper.data() + n;
  for_each_task(blocks_of(n, kBlockRows), n * k, [&](int64_t b, int64_t) {
    for (int64_t i = b * kBlockRows; i < std::min(n, (b + 1) * kBlockRows); ++i) {
      T* lower = ws.lower.data() + i * k;
      for (int64_t c = 0; c < k; ++c) lower[c] -= step[c] + std::abs(lower[c]) * kEps;
      ws.upper[i] = (ws.upper[i] + step[labels[i]]) * (T(1) + kEps);
    }
  });
}

// Adds what changed since `previous` to the sums of every cluster.
template <typename T>
void update_sums(int64_t n, KMeansWorkspace<T>& ws, const int64_t* labels, const int64_t* previous) {
  const int64_t ld = ws.ld;
  const T* points = ws.points.data();
  double* sums = ws.sums.data();
  for_each_task(blocks_of(ld, kSlab), n * ld, [&](int64_t slab, int64_t) {
    const int64_t begin = slab * kSlab, end = std::min(ld, begin + kSlab);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t now = labels[i], before = previous[i];
      if (now == before) continue;
      const T* row = points + i * ld;
      double* gain = sums + now * ld;
      for (int64_t f = begin; f < end; ++f) gain[f] += static_cast<double>(row[f]);
      if (before >= 0) {
        double* loss = sums + before * ld;
        for (int64_t f = begin; f < end; ++f) loss[f] -= static_cast<double>(row[f]);
      }
    }
  });
}

// Squared distance of every row from the centroid that it was assigned to.
template <typename T>
T* own_distances(int64_t n, KMeansWorkspace<T>& ws, const int64_t* labels) {
  const int64_t ld = ws.ld;
  T* distance = ws.distance.reserve(n);
  for_each_task(blocks_of(n, kBlockRows), n * ld, [&](int64_t b, int64_t) {
    for (int64_t i = b * kBlockRows; i < std::min(n, (b + 1) * kBlockRows); ++i) {
      squared_distances(ws.points.data() + i * ld, ws.centroids.data(), ld, labels + i, 1, distance + i);
    }
  });
  return distance;
}

template <typename T>
double run(const Features& x, int64_t first, int64_t n, int64_t k, const KMeansOptions& options,
           const RngStream& rng, KMeansWorkspace<T>& ws, int64_t* labels, double* centroids, bool want_inertia) {
  const int64_t d = x.dim;
  ws.ld = padded(d);
  const int64_t ld = ws.ld;
  load_points(x, first, n, ws);
  T* c = ws.centroids.reserve(k * ld);
  T* step = ws.upper.reserve(n + k) + n;
  ws.lower.reserve(n * k);
  ws.slack = distance_slack<T>(ld);
  seed_centroids(n, k, rng, ws, labels);

  double* sums = ws.sums.reserve_zeroed(k * ld);
  int64_t* previous = ws.previous.reserve(n);
  int64_t* counts = ws.counts.reserve_zeroed(k);
  std::fill(previous, previous + n, int64_t{-1});
  for (int64_t iteration = 0; iteration < options.max_iters; ++iteration) {
    if (iteration > 0) assign(n, k, ws, labels);
    update_sums(n, ws, labels, previous);
    std::fill(counts, counts + k, int64_t{0});
    for (int64_t i = 0; i < n; ++i) ++counts[labels[i]];
    // Measured before the centroids move; a row that one empty cluster took is out of the others' reach.
    T* distance = std::find(counts, counts + k, 0) != counts + k ? own_distances(n, ws, labels) : nullptr;
    double shift = 0.0;
    for (int64_t j = 0; j < k; ++j) {
      T* centroid = c + j * ld;
      const T* replacement = nullptr;
      if (counts[j] == 0) {
        T* farthest = std::max_element(distance, distance + n);
        replacement = ws.points.data() + (farthest - distance) * ld;
        *farthest = T(-1);
      }
      const double inverse = counts[j] > 0 ? 1.0 / static_cast<double>(counts[j]) : 0.0;
      double moved = 0.0;
      for (int64_t f = 0; f < ld; ++f) {
        const T value = replacement != nullptr ? replacement[f] : static_cast<T>(sums[j * ld + f] * inverse);
        const double difference = static_cast<double>(value) - static_cast<double>(centroid[f]);
        moved += difference * difference;
        centroid[f] = value;
      }
      shift += moved;
      step[j] = static_cast<T>(std::sqrt(moved)) * (T(1) + ws.slack);
    }
    move_bounds(n, k, ws, labels);
    std::copy_n(labels, n, previous);
    if (std::sqrt(shift) * ws.scale < options.tol) break;
  }
  if (options.max_iters > 0) assign(n, k, ws, labels);

  const double* offset = ws.shift.data();
  if (centroids != nullptr) {
    for (int64_t j = 0; j < k; ++j)
      for (int64_t f = 0; f < d; ++f)
        centroids[j * d + f] = offset[f] + static_cast<double>(c[j * ld + f]) * ws.scale;
  }
  if (!want_inertia) return 0.0;
  const T* distance = own_distances(n, ws, labels);
  double inertia = 0.0;
  for (int64_t i = 0; i < n; ++i) inertia += static_cast<double>(distance[i]);
  return inertia * ws.scale * ws.scale;
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
