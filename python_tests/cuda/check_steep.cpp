// Stand-alone check of csrc/cuda/steep*.cuh on the CPU, against one-sided Jacobi rotations in long double:
//   g++ -std=c++20 -O2 -DDSE_CUDA_EMULATION -Icsrc -Ipython_tests/cuda
//   python_tests/cuda/check_steep.cpp && ./a.out
//
// Spectra reach down to 1e-12 of the largest singular value. Every case runs under several schedules of threads,
// which have to give the same bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/steep_clusters.cuh"
#include "cuda/steep_rank.cuh"

using namespace dse;
using namespace dse::cuda;
using Real = long double;
using Reals = std::vector<Real>;
using Doubles = std::vector<double>;
using Integers = std::vector<int64_t>;

namespace {

int checks = 0, failures = 0;
void expect(bool good, const std::string& what, double value = 0.0) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("FAILED %s (%.3g)\n", what.c_str(), value);
}

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kSentinel = -77.5;
std::mt19937_64 generator(11);

Doubles doubles(int64_t n, double value = kSentinel) {
  return Doubles(static_cast<size_t>(std::max<int64_t>(n, 1)), value);
}

// Orthonormal rows, count <= length (Gram-Schmidt, twice).
Reals orthonormal(int64_t count, int64_t length) {
  std::normal_distribution<double> normal;
  Reals q(static_cast<size_t>(count * length));
  for (Real& value : q) value = normal(generator);
  for (int64_t i = 0; i < count; ++i) {
    Real* row = q.data() + i * length;
    for (int round = 0; round < 2; ++round) {
      for (int64_t j = 0; j < i; ++j) {
        Real dot = 0;
        for (int64_t k = 0; k < length; ++k) dot += row[k] * q[static_cast<size_t>(j * length + k)];
        for (int64_t k = 0; k < length; ++k) row[k] -= dot * q[static_cast<size_t>(j * length + k)];
      }
    }
    Real norm = 0;
    for (int64_t k = 0; k < length; ++k) norm += row[k] * row[k];
    for (int64_t k = 0; k < length; ++k) row[k] /= std::sqrt(norm);
  }
  return q;
}

// n x d: two large singular values, the others from `ratio` down to a tenth of it.
Reals with_tail(int64_t n, int64_t d, Real ratio) {
  const int64_t m = std::min(n, d);
  const Reals u = orthonormal(m, n), v = orthonormal(m, d);
  Reals x(static_cast<size_t>(n * d), 0);
  for (int64_t r = 0; r < m; ++r) {
    const Real sigma = r < 2 ? 1 / static_cast<Real>(r + 1) : ratio * std::pow(Real(0.1), Real(r) / Real(m));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t f = 0; f < d; ++f) {
        x[static_cast<size_t>(i * d + f)] +=
            u[static_cast<size_t>(r * n + i)] * sigma * v[static_cast<size_t>(r * d + f)];
      }
    }
  }
  return x;
}

struct Reference {
  Real value = 0;
  Reals gradient;  // n x d
  double condition = 0.0;
};

// A spectral function of n x d rows and its gradient. Singular values up to `noise` of the largest are none.
Reference reference(Reals x, int64_t n, int64_t d, SpectralKind kind, Real noise) {
  const bool turned = n > d;
  const int64_t m = std::min(n, d), length = std::max(n, d);
  Reals y(static_cast<size_t>(m * length)), v(static_cast<size_t>(m * m), 0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t f = 0; f < d; ++f) {
      y[static_cast<size_t>(turned ? f * length + i : i * length + f)] = x[static_cast<size_t>(i * d + f)];
    }
  }
  for (int64_t i = 0; i < m; ++i) v[static_cast<size_t>(i * m + i)] = 1;
  for (int sweep = 0; sweep < 60; ++sweep) {
    bool rotated = false;
    for (int64_t p = 0; p < m; ++p) {
      for (int64_t q = p + 1; q < m; ++q) {
        Real pp = 0, qq = 0, pq = 0;
        for (int64_t k = 0; k < length; ++k) {
          const Real a = y[static_cast<size_t>(p * length + k)], b = y[static_cast<size_t>(q * length + k)];
          pp += a * a;
          qq += b * b;
          pq += a * b;
        }
        if (!(std::fabs(pq) > 1e-18L * std::sqrt(pp * qq))) continue;
        rotated = true;
        const Real z = (qq - pp) / (2 * pq), t = (z < 0 ? -1 : 1) / (std::fabs(z) + std::sqrt(1 + z * z));
        const Real cosine = 1 / std::sqrt(1 + t * t), sine = cosine * t;
        const auto turn = [&](Reals& rows, int64_t count) {
          for (int64_t k = 0; k < count; ++k) {
            Real &a = rows[static_cast<size_t>(p * count + k)], &b = rows[static_cast<size_t>(q * count + k)];
            const Real first = a;
            a = cosine * first - sine * b;
            b = sine * first + cosine * b;
          }
        };
        turn(y, length);
        turn(v, m);
      }
    }
    if (!rotated) break;
  }
  Reals sigma(static_cast<size_t>(m));
  Real largest = 0, smallest = 0;
  for (int64_t r = 0; r < m; ++r) {
    Real square = 0;
    for (int64_t k = 0; k < length; ++k) {
      square += y[static_cast<size_t>(r * length + k)] * y[static_cast<size_t>(r * length + k)];
    }
    sigma[static_cast<size_t>(r)] = std::sqrt(square);
    largest = std::max(largest, std::sqrt(square));
  }
  Doubles kept, weights(static_cast<size_t>(m));
  Reference out;
  smallest = largest;
  for (Real& s : sigma) {
    if (s <= noise * largest) s = 0;
    else smallest = std::min(smallest, s);
    kept.push_back(static_cast<double>(s));
    out.value += s;
  }
  const double value = spectral_value_and_weights(kind, kept.data(), m, weights.data());
  if (kind == SpectralKind::kEffectiveRank) out.value = value;
  out.condition = static_cast<double>(largest / smallest);
  out.gradient.assign(static_cast<size_t>(n * d), 0);
  for (int64_t r = 0; r < m; ++r) {
    const Real s = sigma[static_cast<size_t>(r)];
    if (s == 0) continue;
    for (int64_t k = 0; k < length; ++k) {
      const Real step = weights[static_cast<size_t>(r)] * y[static_cast<size_t>(r * length + k)] / s;
      for (int64_t i = 0; i < m; ++i) {
        out.gradient[static_cast<size_t>(turned ? k * d + i : i * d + k)] +=
            step * v[static_cast<size_t>(r * m + i)];
      }
    }
  }
  return out;
}

// Relative error of W X (rows_side) or X W against the gradient.
double gradient_error(const double* w, const Reals& x, int64_t n, int64_t d, bool rows_side,
                      const Reals& wanted) {
  Real wrong = 0, whole = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t f = 0; f < d; ++f) {
      Real sum = 0;
      const int64_t depth = rows_side ? n : d;
      for (int64_t k = 0; k < depth; ++k) {
        sum += rows_side ? w[i * n + k] * x[static_cast<size_t>(k * d + f)]
                         : x[static_cast<size_t>(i * d + k)] * w[k * d + f];
      }
      const Real expected = wanted[static_cast<size_t>(i * d + f)];
      wrong += (sum - expected) * (sum - expected);
      whole += expected * expected;
    }
  }
  return static_cast<double>(std::sqrt(wrong / whole));
}

void centre(Reals& x, int64_t n, int64_t d) {
  for (int64_t f = 0; f < d; ++f) {
    Real sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[static_cast<size_t>(i * d + f)];
    for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(i * d + f)] -= sum / static_cast<Real>(n);
  }
}

struct ClusterCase {
  const char* name;
  std::vector<int64_t> sizes;  // of the clusters of one group; a second group has the same
  int64_t dim;
  SpectralKind kind = SpectralKind::kNuclearNorm;
  bool rows_side = false;
  size_t shared_limit = size_t{227} << 10;  // little: large clusters go through memory
  bool want_w = true;
  bool exact = true;
};

struct ClusterResults {
  Doubles values, slots;
  bool same(const ClusterResults& o) const {
    const auto equal = [](const Doubles& a, const Doubles& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
    };
    return equal(values, o.values) && equal(slots, o.slots);
  }
};

// Cluster c has a tail from 10^-(c + 2); all of two rows and more are flagged but the first of a group.
template <class S>
void check_clusters(const ClusterCase& p) {
  const auto k = static_cast<int64_t>(p.sizes.size());
  const int64_t d = p.dim, groups = 2;
  int64_t group_rows = 0;
  for (const int64_t n : p.sizes) group_rows += n;
  const int64_t rows = groups * group_rows, width = p.rows_side ? group_rows : std::min(group_rows, d);
  const bool center = p.kind == SpectralKind::kNuclearNorm;
  std::vector<S> z(static_cast<size_t>(rows * d));
  Integers labels(static_cast<size_t>(rows));
  std::vector<Reals> matrices;
  for (int64_t g = 0; g < groups; ++g) {
    // Rows of the clusters in turn, as far as each goes.
    int64_t at = g * group_rows;
    std::vector<Integers> members(static_cast<size_t>(k));
    for (int64_t i = 0; at < (g + 1) * group_rows; ++i) {
      for (int64_t c = 0; c < k; ++c) {
        if (i >= p.sizes[static_cast<size_t>(c)]) continue;
        labels[static_cast<size_t>(at)] = c;
        members[static_cast<size_t>(c)].push_back(at++);
      }
    }
    for (int64_t c = 0; c < k; ++c) {
      const auto n = static_cast<int64_t>(members[static_cast<size_t>(c)].size());
      Reals x = with_tail(n, d, std::pow(Real(10), -static_cast<Real>(c + 2)));
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t f = 0; f < d; ++f) {
          S& to = z[static_cast<size_t>(members[static_cast<size_t>(c)][static_cast<size_t>(i)] * d + f)];
          to = from_double<S>(static_cast<double>(x[static_cast<size_t>(i * d + f)]));
          x[static_cast<size_t>(i * d + f)] = to_double(to);
        }
      }
      if (center) centre(x, n, d);
      matrices.push_back(x);
    }
  }
  const FeatureView<S> view{z.data(), groups, group_rows, d, group_rows * d, d, 1, nullptr};
  Integers offset(static_cast<size_t>(groups * (k + 1))), order(static_cast<size_t>(rows)),
      sizes(static_cast<size_t>(groups * k));
  Clusters clusters{rows, group_rows, k, 0, groups, labels.data(), offset.data(), order.data(), sizes.data()};
  std::vector<int> flags(static_cast<size_t>(groups * k), 1);
  for (int64_t item = 0; item < groups * k; ++item) {
    if (item % k == 0 || p.sizes[static_cast<size_t>(item % k)] < 2) flags[static_cast<size_t>(item)] = 0;
  }

  ClusterResults first;
  for (const uint64_t seed : {0, 1, 2}) {
    emulation::schedule_seed = seed;
    ClusterResults r;
    r.values = doubles(groups * k);
    r.slots = doubles(rows * width);
    run_cluster_index(clusters, nullptr);
    SteepClusters s;
    s.clusters = clusters;
    s.steep = flags.data();
    s.kind = p.kind;
    s.center = center;
    s.exact = p.exact;
    s.values = r.values.data();
    s.slots = {p.want_w ? r.slots.data() : nullptr, width, p.rows_side};
    const int64_t side = p.rows_side ? group_rows : std::min(group_rows, d);
    const SteepPlan plan = plan_steep(groups * k, side, d, p.shared_limit, 2, 0);
    Doubles space = doubles(plan.workspace() / 8, std::numeric_limits<double>::quiet_NaN());
    run_steep_clusters(view, s, plan, space.data(), nullptr);
    if (seed == 0) first = r;
    expect(r.same(first), std::string(p.name) + ": bits depend on the schedule");
  }
  for (int64_t item = 0; item < groups * k; ++item) {
    const int64_t g = item / k, c = item % k, n = p.sizes[static_cast<size_t>(c)];
    const std::string name = std::string(p.name) + ", cluster " + std::to_string(item);
    const double* slot =
        first.slots.data() + (g * group_rows + offset[static_cast<size_t>(g * (k + 1) + c)]) * width;
    const double value = first.values[static_cast<size_t>(item)];
    if (flags[static_cast<size_t>(item)] == 0) {
      expect(value == kSentinel && *slot == kSentinel, name + " was touched");
      continue;
    }
    const Reference wanted = reference(matrices[static_cast<size_t>(item)], n, d, p.kind, 1e-15L);
    if (p.exact) {
      const auto error = static_cast<double>(std::fabs(value - wanted.value) / wanted.value);
      expect(error < 1e-13, name + ": value", error);
    } else {
      expect(value == kSentinel, name + ": value was touched");
    }
    if (!p.want_w) {
      expect(*slot == kSentinel, name + ": slot was touched");
      continue;
    }
    const bool rows_side = p.rows_side || n <= d;
    const double error =
        gradient_error(slot, matrices[static_cast<size_t>(item)], n, d, rows_side, wanted.gradient);
    expect(error < 1e-13 + 10.0 * kEps * wanted.condition, name + ": gradient", error);
  }
}

// n x d rows, n > d, with a tail from `ratio` on.
template <class S>
void check_rank(int64_t n, int64_t d, double ratio, int splits, size_t shared_limit, bool want_w, bool center) {
  const std::string name = "rank of " + std::to_string(n) + " x " + std::to_string(d);
  Reals x = with_tail(n, d, ratio);
  std::vector<S> z(static_cast<size_t>(n * d));
  for (size_t i = 0; i < z.size(); ++i) {
    z[i] = from_double<S>(static_cast<double>(x[i]));
    x[i] = to_double(z[i]);
  }
  const FeatureView<S> view{z.data(), 1, n, d, n * d, d, 1, nullptr};
  Integers order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = i;
  Doubles means = doubles(d, 0.0);
  Real squares = 0;
  for (const Real value : x) squares += value * value;
  const auto before = static_cast<double>(squares);
  if (center) {
    Reals centred = x;
    centre(centred, n, d);
    for (int64_t f = 0; f < d; ++f) {
      means[static_cast<size_t>(f)] =
          static_cast<double>(x[static_cast<size_t>(f)] - centred[static_cast<size_t>(f)]);
    }
    for (int64_t i = 0; i < n * d; ++i) {
      x[static_cast<size_t>(i)] -= means[static_cast<size_t>(i % d)];
    }
  }
  const Reference wanted = reference(x, n, d, SpectralKind::kEffectiveRank, 1e-15L);
  for (const int flag : {1, 0}) {
    Doubles first;
    for (const uint64_t seed : {0, 1, 2}) {
      emulation::schedule_seed = seed;
      Doubles gram = doubles(d * d), g = doubles(d * d), value = doubles(1), space = doubles(steep_rank_space(d));
      Doubles moments = doubles(second_moment_workspace(d, splits) / 8);
      run_second_moment(view, 0, n, means.data(), splits, moments.data(), gram.data(), nullptr);
      SteepRank<S> s;
      s.r.n = n;
      s.r.dim = d;
      s.r.center = center;
      s.r.grams = gram.data();
      s.r.gram_stride = d * d;
      s.r.squares = center ? &before : nullptr;
      s.r.slabs = 1;
      s.r.values = value.data();
      s.steep = &flag;
      s.a = {view, order.data(), means.data(), n, false};
      s.exact = true;
      s.g = g.data();
      s.partials = moments.data();
      s.splits = splits;
      run_steep_rank(s, want_w, space.data(), shared_limit, nullptr);
      Doubles all = g;
      all.push_back(value[0]);
      if (seed == 0) first = all;
      expect(std::memcmp(all.data(), first.data(), all.size() * sizeof(double)) == 0,
             name + ": bits depend on the schedule");
    }
    if (flag == 0) {
      const bool untouched = std::all_of(first.begin(), first.end(), [](double v) { return v == kSentinel; });
      expect(untouched, name + " was touched");
      continue;
    }
    const auto error = static_cast<double>(std::fabs(first.back() - wanted.value) / wanted.value);
    expect(error < 1e-13, name + ": value", error);
    if (!want_w) continue;
    const double wrong = gradient_error(first.data(), x, n, d, false, wanted.gradient);
    expect(wrong < 1e-13 + 10.0 * kEps * wanted.condition, name + ": gradient", wrong);
  }
}

// What the shifted inverses say about the spectrum of a matrix of side 70, with `zeros` features that are zero.
void check_flag(double ratio, int64_t zeros, bool steep) {
  constexpr int64_t kRows = 90, kSide = 70;
  const int64_t live = kSide - zeros;
  const Reals x = with_tail(kRows, live, ratio);
  Doubles c = doubles(kSide * kSide, 0.0), f = doubles(kSide * kSide);
  for (int64_t i = 0; i < live; ++i) {
    for (int64_t j = 0; j < live; ++j) {
      Real sum = 0;
      for (int64_t r = 0; r < kRows; ++r) {
        sum += x[static_cast<size_t>(r * live + i)] * x[static_cast<size_t>(r * live + j)];
      }
      c[static_cast<size_t>(i * kSide + j)] = 3e5 * static_cast<double>(sum);
    }
  }
  double value = 0.0;
  int flag = -1;
  Doubles space = doubles(effective_rank_workspace(kSide, 4) / 8);
  emulation::schedule_seed = 5;
  run_effective_rank(c.data(), kSide, space.data(), 4, true, &value, f.data(), nullptr, &flag);
  expect(flag == (steep ? 1 : 0), "flag of a tail from " + std::to_string(std::log10(ratio)), flag);
}

// Eigenvalues in any order; whether one is too small beside the largest.
void check_is_steep() {
  const auto steep = [](Doubles values, int null, double floor) {
    bool found = false;
    emulation::schedule_seed = 3;
    emulation::run_grid(dim3(1), dim3(64), 0, [&] {
      static double sums[33];
      const bool own = block_is_steep(values.data(), static_cast<int>(values.size()), null, floor, 1e-6, sums);
      if (thread_id() == 0) found = own;
    });
    return found;
  };
  expect(!steep({1.0, 2e-6, 0.5}, 0, 0.0), "2e-6 is not steep");
  expect(steep({5e-7, 1.0, 0.5}, 0, 0.0), "5e-7 is steep");
  expect(!steep({5e-7, 1.0, 0.5}, 1, 0.0), "a known null is not steep");
  expect(steep({5e-7, 1.0, -1e-18}, 1, 0.0), "a negative one beside a known null is steep");
  expect(!steep({5e-19, 1e-12}, 0, 1e-5), "rounding is not steep");
  expect(!steep({5e-7, 1.0, std::nan("")}, 0, 0.0), "NaN is not steep");
  expect(!steep({0.0, 0.0}, 0, 0.0), "zeros are not steep");
  Doubles many = doubles(200, 1.0);
  many[199] = 1e-9;
  expect(steep(many, 0, 0.0), "one of 200 is steep");
}

}  // namespace

int main() {
  check_is_steep();
  for (const ClusterCase& p : std::vector<ClusterCase>{
           {"rows side", {5, 9, 7, 2, 12, 4, 8, 6, 3, 5, 7}, 20},
           {"features side", {15, 19, 17, 30, 22, 14, 18, 16, 13, 25}, 9},
           {"rows side beyond the features", {15, 19, 17, 30, 22, 14}, 9, SpectralKind::kNuclearNorm, true},
           {"a cluster of one row", {4, 1, 6, 1}, 5},
           {"in memory, rows side", {34, 33, 40, 36}, 60, SpectralKind::kNuclearNorm, false, size_t{64} << 10},
           {"in memory, features side",
            {60, 50, 90, 75, 3},
            48,
            SpectralKind::kNuclearNorm,
            false,
            size_t{64} << 10},
           {"in memory, medium", {2, 24, 90, 145}, 258, SpectralKind::kNuclearNorm, false, size_t{64} << 10},
           {"values alone", {5, 9, 7, 12}, 8, SpectralKind::kNuclearNorm, false, size_t{163} << 10, false},
           {"ranks", {15, 4, 17, 30, 22, 9, 12}, 12, SpectralKind::kEffectiveRank},
       }) {
    check_clusters<double>(p);
  }
  check_clusters<float>(
      {"float32", {12, 9, 7, 20, 15}, 10, SpectralKind::kNuclearNorm, false, size_t{227} << 10, true, false});
  check_rank<double>(110, 70, 1e-9, 3, size_t{227} << 10, true, false);
  check_rank<double>(100, 20, 1e-11, 1, size_t{12} << 10, true, false);
  check_rank<double>(90, 65, 1e-7, 2, size_t{227} << 10, false, true);
  check_rank<float>(100, 66, 1e-9, 2, size_t{227} << 10, true, true);
  check_flag(1e-4, 0, false);
  check_flag(1e-4, 3, false);
  check_flag(1e-7, 0, true);
  check_flag(1e-9, 3, true);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
