// Row statistics, k-means, clusters and the gradient's kernels against plain float64 loops, in emulation.
//
//   g++ -std=c++20 -O1 -DDSE_CUDA_EMULATION -Icsrc -Ipython_tests/cuda
//   python_tests/cuda/check_clusters_and_gradient.cpp && ./a.out
//
// The gradient is compared with central differences of a direct evaluation of the components. Every case runs
// under several schedules of threads, which have to give the same bits.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/backward.cuh"
#include "cuda/kmeans.cuh"

using namespace dse;
using namespace dse::cuda;
using Reals = std::vector<double>;
using Integers = std::vector<int64_t>;

namespace {

int checks = 0, failures = 0;
void expect(bool good, const char* what, double value = 0.0) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("FAILED %s (%.3g)\n", what, value);
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
std::vector<T> filled(int64_t n, T value) {
  return std::vector<T>(static_cast<size_t>(std::max<int64_t>(n, 1)), value);
}
Reals reals(int64_t n) { return filled(n, kNan); }
Integers integers(int64_t n) { return filled<int64_t>(n, -77); }
std::vector<unsigned char> bytes(int64_t n) { return filled<unsigned char>(n, 0xff); }

// Sum of the singular values of the n x d rows, by one-sided Jacobi rotations; `polar` receives U V^T.
double nuclear_norm(Reals a, int64_t n, int64_t d, Reals* polar = nullptr) {
  const auto at = [&](Reals& m, int64_t i, int64_t f) -> double& { return m[static_cast<size_t>(i * d + f)]; };
  Reals q = filled(n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) q[static_cast<size_t>(i * n + i)] = 1.0;
  for (int sweep = 0; sweep < 40; ++sweep) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j) {
        double aa = 0, bb = 0, ab = 0;
        for (int64_t f = 0; f < d; ++f) {
          aa += at(a, i, f) * at(a, i, f);
          bb += at(a, j, f) * at(a, j, f);
          ab += at(a, i, f) * at(a, j, f);
        }
        if (std::abs(ab) <= 1e-17 * std::sqrt(aa * bb) || ab == 0.0) continue;
        const double zeta = (bb - aa) / (2.0 * ab);
        const double t = (zeta < 0 ? -1.0 : 1.0) / (std::abs(zeta) + std::sqrt(1.0 + zeta * zeta));
        const double c = 1.0 / std::sqrt(1.0 + t * t), s = c * t;
        const auto turn = [&](double& x, double& y) {
          const double x0 = x;
          x = c * x0 - s * y;
          y = s * x0 + c * y;
        };
        for (int64_t f = 0; f < d; ++f) turn(at(a, i, f), at(a, j, f));
        for (int64_t r = 0; r < n; ++r)
          turn(q[static_cast<size_t>(i * n + r)], q[static_cast<size_t>(j * n + r)]);
      }
  }
  double total = 0.0, largest = 0.0;
  Reals sigma(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    double s = 0;
    for (int64_t f = 0; f < d; ++f) s += at(a, i, f) * at(a, i, f);
    sigma[static_cast<size_t>(i)] = std::sqrt(s);
    total += std::sqrt(s);
    largest = std::max(largest, std::sqrt(s));
  }
  if (polar == nullptr) return total;
  *polar = filled(n * d, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    if (sigma[static_cast<size_t>(i)] <= 1e-12 * largest) continue;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t f = 0; f < d; ++f)
        at(*polar, r, f) += q[static_cast<size_t>(i * n + r)] * at(a, i, f) / sigma[static_cast<size_t>(i)];
  }
  return total;
}

Reals centred_rows(const Reals& x, const Integers& rows, int64_t d) {
  Reals out;
  Reals mean = filled(d, 0.0);
  for (const int64_t r : rows)
    for (int64_t f = 0; f < d; ++f)
      mean[static_cast<size_t>(f)] += x[static_cast<size_t>(r * d + f)] / static_cast<double>(rows.size());
  for (const int64_t r : rows)
    for (int64_t f = 0; f < d; ++f)
      out.push_back(x[static_cast<size_t>(r * d + f)] - mean[static_cast<size_t>(f)]);
  return out;
}

struct Shape {
  int64_t images, positions, dim, group_images, local, global;
  Variant variant = Variant::kRegularizer;
  bool normalize = true;
  int kind = 0;  // of the features: random, 1 all rows equal, 2 four rows repeated, 3 one NaN, 4 a zero row
  int64_t shared_side = 72;
  int64_t rows() const { return images * positions; }
  int64_t group_rows() const { return group_images * positions; }
  int64_t groups() const { return (images + group_images - 1) / group_images; }
};

// Features with the positions innermost in memory.
template <class S>
struct Data {
  std::vector<S> storage;
  FeatureView<S> view;
  Reals z;  // rows x d

  explicit Data(const Shape& p) {
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal;
    storage.resize(static_cast<size_t>(p.rows() * p.dim));
    z = reals(p.rows() * p.dim);
    Reals centers = reals(4 * p.dim);
    for (double& c : centers) c = std::round(4.0 * normal(random)) * 0.25 + 1.0;
    for (int64_t i = 0; i < p.rows(); ++i)
      for (int64_t f = 0; f < p.dim; ++f) {
        const double center = centers[static_cast<size_t>(i * 5 % 4 * p.dim + f)];
        double value = center + normal(random);
        if (p.kind == 1) value = centers[static_cast<size_t>(f)] * 0.37;
        if (p.kind == 2) value = center;
        if (p.kind == 3 && i == p.rows() - 1 && f == 1) value = kNan;
        if (p.kind == 4 && i == 3) value = 0.0;
        S& at = storage[static_cast<size_t>((i / p.positions * p.dim + f) * p.positions + i % p.positions)];
        at = from_double<S>(value);
        z[static_cast<size_t>(i * p.dim + f)] = to_double(at);
      }
    view = {storage.data(), p.images, p.positions, p.dim, p.positions * p.dim, 1, p.positions, nullptr};
  }
};

template <class S>
using RealOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

struct Results {
  Integers local_labels, global_labels, nearest;
  Reals scale, centroids, norms, components, gradient, distance, mean_direction;
  Integers forms;

  bool same(const Results& o) const {
    const auto equal = [](const auto& a, const auto& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
    };
    return equal(local_labels, o.local_labels) && equal(global_labels, o.global_labels) &&
           equal(nearest, o.nearest) && equal(centroids, o.centroids) && equal(norms, o.norms) &&
           equal(components, o.components) && equal(gradient, o.gradient) && equal(forms, o.forms) &&
           equal(mean_direction, o.mean_direction);
  }
};

const double kUpstream[5] = {1.0, -0.4, -0.7, 0.9, 0.3};

template <class S>
Results run(const Shape& p, const Data<S>& data, const Reals& external) {
  using C = RealOf<S>;
  const int64_t rows = p.rows(), d = p.dim, groups = p.groups(), group_rows = p.group_rows();
  Results r;
  r.scale = reals(rows);
  int finite = -1;
  run_row_scales(data.view, p.normalize, r.scale.data(), &finite, rows, nullptr);
  FeatureView<S> x = data.view;
  x.row_scale = r.scale.data();

  const int64_t seed = 12345;
  const auto label = [&](int64_t problem_rows, int64_t problems, int64_t k, RngPurpose purpose,
                         double* centroids) {
    Integers labels = integers(rows);
    KMeansArgs<S> a;
    a.x = x;
    a.unit_rows = p.normalize;
    a.rows = problem_rows;
    a.problems = problems;
    a.k = k;
    a.seed = &seed;
    a.purpose = purpose;
    a.finite = &finite;
    a.labels = labels.data();
    a.centroids = centroids;
    auto space = bytes(kmeans_workspace(problems, problem_rows, d, k));
    run_kmeans(a, space.data(), nullptr);
    return labels;
  };
  const int64_t local = std::min(p.local, p.positions), global = std::min(p.global, group_rows);
  r.local_labels = label(p.positions, p.images, local, RngPurpose::kLocalKMeans, nullptr);
  r.centroids = reals(groups * global * d);
  r.global_labels = label(group_rows, groups, global, RngPurpose::kGlobalKMeans, r.centroids.data());
  auto centroids = filled<C>(groups * global * d, C(0));
  run_store_centroids(r.centroids.data(), groups * global * d, &finite, groups * global * d, centroids.data(),
                      nullptr);

  struct Part {
    Clusters c;
    Integers offset, order, sizes;
    Reals norms, slots;
    Integers forms;
    ClusterSlots where;
  } part[2];
  const auto set_up = [&](Part& q, int64_t own_rows, int64_t count, int64_t k, const Integers& labels) {
    q.offset = integers(count * (k + 1));
    q.order = integers(rows);
    q.sizes = integers(count * k);
    q.norms = reals(count * k);
    q.forms = integers(count * k);
    q.slots = reals(rows * std::min(own_rows, d));
    q.where = {q.slots.data(), std::min(own_rows, d), false};
    q.c = {rows, own_rows, k, 0, count, labels.data(), q.offset.data(), q.order.data(), q.sizes.data()};
    run_cluster_index(q.c, nullptr);
    ClusterNormArgs<S> a;
    a.x = x;
    a.clusters = q.c;
    a.slots = q.where;
    a.want_w = true;
    a.norms = q.norms.data();
    a.forms = q.forms.data();
    a.gram_blocks = 5;
    a.eigen.shared_side = p.shared_side;
    a.eigen.large_blocks = 2;
    auto space = bytes(cluster_norms_workspace(count * k, own_rows, d, a.eigen));
    run_cluster_norms(a, space.data(), nullptr);
  };
  set_up(part[0], p.positions, p.images, local, r.local_labels);
  set_up(part[1], group_rows, groups, global, r.global_labels);
  r.norms = part[0].norms;
  r.norms.insert(r.norms.end(), part[1].norms.begin(), part[1].norms.end());
  r.forms = part[0].forms;
  r.forms.insert(r.forms.end(), part[1].forms.begin(), part[1].forms.end());

  Reals mean = reals(d);
  r.mean_direction = reals(d);
  double average = kNan;
  {
    auto space = bytes(average_norm_workspace(rows, d));
    run_average_norm(x, mean.data(), r.mean_direction.data(), &average, space.data(), nullptr);
    double again = kNan;
    run_average_norm(x, mean.data(), nullptr, &again, space.data(), nullptr);
    expect(std::memcmp(&again, &average, sizeof(double)) == 0, "avg_norm without directions");
  }
  r.nearest = integers(rows);
  r.distance = reals(rows);
  NearestArgs<C> near;
  near.centroids = centroids.data();
  near.labels = r.global_labels.data();
  near.group_rows = group_rows;
  near.k = global;
  near.nearest = r.nearest.data();
  near.distance = r.distance.data();
  run_nearest_centroid(x, near, nullptr);
  Reals inter_sums = reals(groups);
  Integers inter_terms = integers(groups);
  run_inter_terms(r.distance.data(), r.nearest.data(), rows, group_rows, global, p.variant, part[1].offset.data(),
                  part[1].order.data(), inter_sums.data(), inter_terms.data(), nullptr);
  const double rank = 2.5;
  r.components = reals(5);
  int64_t saved_finite = -1;
  ComponentArgs c;
  c.variant = p.variant;
  c.dim = d;
  c.images = p.images;
  c.groups = groups;
  c.local_clusters = local;
  c.global_clusters = global;
  c.local_norms = part[0].norms.data();
  c.local_sizes = part[0].sizes.data();
  c.global_norms = part[1].norms.data();
  c.global_sizes = part[1].sizes.data();
  c.inter_sums = inter_sums.data();
  c.inter_terms = inter_terms.data();
  c.average = &average;
  c.ranks = &rank;
  c.rank_divisor = 2.0;
  c.finite = &finite;
  c.saved = r.components.data();
  c.saved_finite = &saved_finite;
  C value[5];
  run_components(c, ComponentOutputs<C>{{value, value + 1, value + 2, value + 3, value + 4}}, nullptr);
  for (int i = 0; i < 5; ++i) {
    const double kept = r.components[static_cast<size_t>(i)];
    expect(kept != kept ? value[i] != value[i] : value[i] == static_cast<C>(kept), "components");
  }

  Reals weights = reals(kGradientWeights), local_weights = reals(p.images * local),
        global_weights = reals(groups * global);
  C upstream[10];
  for (int i = 0; i < 5; ++i) upstream[2 * i] = static_cast<C>(kUpstream[i]);
  GradientWeightArgs<C> w;
  w.upstream = upstream;
  w.stride = 2;
  w.components = r.components.data();
  w.variant = p.variant;
  w.rows = rows;
  w.dim = d;
  w.images = p.images;
  w.local_clusters = local;
  w.groups = groups;
  w.group_rows = group_rows;
  w.global_clusters = global;
  w.rank_divisor = 2.0;
  w.local_sizes = part[0].sizes.data();
  w.global_sizes = part[1].sizes.data();
  w.nearest = r.nearest.data();
  w.weights = weights.data();
  w.local_weights = local_weights.data();
  w.global_weights = global_weights.data();
  run_gradient_weights(w, nullptr);
  auto out = filled<S>(rows * d, from_double<S>(77.0));
  for (int64_t g = 0; g < groups; ++g) {  // a group at a time
    const int64_t begin = g * group_rows, end = std::min(rows, begin + group_rows);
    Reals sum(external.begin() + begin * d, external.begin() + end * d);
    const auto add = [&](const Part& q, int64_t first, int64_t count, const Reals& own_weights) {
      ClusterGradientArgs<S> a;
      a.x = x;
      a.clusters = q.c;
      a.clusters.group_begin = first;
      a.clusters.groups = count;
      a.slots = q.where;
      a.slots.data += begin * a.slots.width;
      a.weights = own_weights.data();
      a.accumulator = sum.data();
      a.blocks = 3;
      auto space = bytes(cluster_gradient_workspace(a.clusters.items(), d));
      run_cluster_gradient(a, space.data(), nullptr);
    };
    add(part[0], g * p.group_images, std::min(p.group_images, p.images - g * p.group_images), local_weights);
    add(part[1], g, 1, global_weights);
    FinishArgs<S, C> f;
    f.x = x;
    f.variant = p.variant;
    f.normalize = p.normalize;
    f.row_begin = begin;
    f.row_end = end;
    f.group_rows = group_rows;
    f.k = global;
    f.labels = r.global_labels.data();
    f.sizes = part[1].sizes.data();
    f.centroids = centroids.data();
    f.nearest = r.nearest.data();
    f.distance = r.distance.data();
    f.mean = mean.data();
    f.mean_direction = r.mean_direction.data();
    f.weights = weights.data();
    f.accumulator = sum.data();
    f.finite = &saved_finite;
    f.out = out.data();
    run_finish_rows(f, nullptr);
  }
  for (const S v : out) r.gradient.push_back(to_double(v));
  for (int64_t i = 0; i < groups * global * d; ++i)
    r.centroids[static_cast<size_t>(i)] = static_cast<double>(centroids[static_cast<size_t>(i)]);
  return r;
}

// ---- plain evaluations ----

Reals scaled(const Shape& p, const Reals& z) {
  Reals x = z;
  if (!p.normalize) return x;
  for (int64_t i = 0; i < p.rows(); ++i) {
    double s = 0;
    for (int64_t f = 0; f < p.dim; ++f)
      s += z[static_cast<size_t>(i * p.dim + f)] * z[static_cast<size_t>(i * p.dim + f)];
    for (int64_t f = 0; f < p.dim; ++f) x[static_cast<size_t>(i * p.dim + f)] /= std::max(std::sqrt(s), 1e-12);
  }
  return x;
}

// Rows of one problem in the coordinates of the CPU path.
struct PlainKMeans {
  Integers labels;
  Reals centroids;
  double inertia = 0.0;

  PlainKMeans(const Reals& x, int64_t first, int64_t n, int64_t d, int64_t k, bool unit, RngStream rng,
              int64_t max_iters = 20, double tol = 1e-4) {
    const auto row = [&](int64_t i, int64_t f) { return x[static_cast<size_t>((first + i) * d + f)]; };
    Reals shift = filled(d, 0.0), pts = reals(n * d), c = reals(k * d), sums = filled(k * d, 0.0);
    const int64_t sample = std::min<int64_t>(n, 16);
    double most = 1.0;
    for (int64_t f = 0; f < d; ++f) {
      for (int64_t s = 1; s < sample; ++s) shift[static_cast<size_t>(f)] += row(s * n / sample, f) - row(0, f);
      shift[static_cast<size_t>(f)] = row(0, f) + shift[static_cast<size_t>(f)] / static_cast<double>(sample);
    }
    if (!unit) {
      most = 0.0;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t f = 0; f < d; ++f)
          most = std::max(most, std::abs(row(i, f) - shift[static_cast<size_t>(f)]));
    }
    const double scale = most > 0.0 ? std::exp2(std::floor(std::log2(most))) : 1.0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t f = 0; f < d; ++f)
        pts[static_cast<size_t>(i * d + f)] = (row(i, f) - shift[static_cast<size_t>(f)]) / scale;
    const auto square = [&](const double* a, const double* b) {
      double s = 0;
      for (int64_t f = 0; f < d; ++f) s += (a[f] - b[f]) * (a[f] - b[f]);
      return s;
    };
    Reals near = filled(n, std::numeric_limits<double>::infinity());
    int64_t chosen = rng.below(0, n);
    for (int64_t j = 0;; ++j) {
      std::copy_n(&pts[static_cast<size_t>(chosen * d)], d, &c[static_cast<size_t>(j * d)]);
      if (j + 1 == k) break;
      double total = 0, running = 0;
      for (int64_t i = 0; i < n; ++i) {
        double& own = near[static_cast<size_t>(i)];
        own = std::min(own, square(&pts[static_cast<size_t>(i * d)], &c[static_cast<size_t>(j * d)]));
        total += own;
      }
      const auto draw = static_cast<uint32_t>(j + 1);
      if (!(total > 0)) {
        chosen = rng.below(draw, n);
        continue;
      }
      const double target = rng.uniform(draw) * total;
      chosen = -1;
      int64_t last = 0;
      for (int64_t i = 0; i < n && chosen < 0; ++i) {
        if (near[static_cast<size_t>(i)] > 0) last = i;
        running += near[static_cast<size_t>(i)];
        if (running > target) chosen = i;
      }
      if (chosen < 0) chosen = last;
    }
    labels = integers(n);
    Integers before = filled<int64_t>(n, -1);
    const auto assign = [&] {
      for (int64_t i = 0; i < n; ++i) {
        double best = 0;
        for (int64_t j = 0; j < k; ++j) {
          double half = 0, dot = 0;
          for (int64_t f = 0; f < d; ++f) {
            const double v = c[static_cast<size_t>(j * d + f)];
            half += v * v;
            dot += v * pts[static_cast<size_t>(i * d + f)];
          }
          const double value = 0.5 * half - dot;
          if (j == 0 || value < best) {
            best = value;
            labels[static_cast<size_t>(i)] = j;
          }
        }
      }
    };
    for (int64_t t = 0; t < max_iters; ++t) {
      assign();
      Integers counts = filled<int64_t>(k, 0);
      Reals own = reals(n);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t now = labels[static_cast<size_t>(i)], was = before[static_cast<size_t>(i)];
        ++counts[static_cast<size_t>(now)];
        own[static_cast<size_t>(i)] = square(&pts[static_cast<size_t>(i * d)], &c[static_cast<size_t>(now * d)]);
        for (int64_t f = 0; f < d && now != was; ++f) {
          sums[static_cast<size_t>(now * d + f)] += pts[static_cast<size_t>(i * d + f)];
          if (was >= 0) sums[static_cast<size_t>(was * d + f)] -= pts[static_cast<size_t>(i * d + f)];
        }
      }
      double moved = 0;
      for (int64_t j = 0; j < k; ++j) {
        const double* replacement = nullptr;
        if (counts[static_cast<size_t>(j)] == 0) {
          const auto far = std::max_element(own.begin(), own.end());
          replacement = &pts[static_cast<size_t>((far - own.begin()) * d)];
          *far = -1;
        }
        for (int64_t f = 0; f < d; ++f) {
          double& at = c[static_cast<size_t>(j * d + f)];
          const double value = replacement != nullptr
                                   ? replacement[f]
                                   : sums[static_cast<size_t>(j * d + f)] *
                                         (1.0 / static_cast<double>(counts[static_cast<size_t>(j)]));
          moved += (value - at) * (value - at);
          at = value;
        }
      }
      before = labels;
      if (std::sqrt(moved) * scale < tol) break;
    }
    assign();
    for (int64_t i = 0; i < n; ++i)
      inertia +=
          square(&pts[static_cast<size_t>(i * d)], &c[static_cast<size_t>(labels[static_cast<size_t>(i)] * d)]);
    inertia *= scale * scale;
    for (int64_t j = 0; j < k * d; ++j)
      centroids.push_back(shift[static_cast<size_t>(j % d)] + c[static_cast<size_t>(j)] * scale);
  }
};

// The components (m_dim apart) with given labels and centroids.
Reals plain_components(const Shape& p, const Reals& x, const Results& r) {
  const int64_t d = p.dim, rows = p.rows(), group_rows = p.group_rows();
  const int64_t local = std::min(p.local, p.positions), global = std::min(p.global, group_rows);
  Reals mean = filled(d, 0.0);
  for (int64_t i = 0; i < rows * d; ++i)
    mean[static_cast<size_t>(i % d)] += x[static_cast<size_t>(i)] / static_cast<double>(rows);
  double average = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    double s = 0;
    for (int64_t f = 0; f < d; ++f)
      s += std::pow(x[static_cast<size_t>(i * d + f)] - mean[static_cast<size_t>(f)], 2);
    average += std::sqrt(s) / static_cast<double>(rows);
  }
  const auto members = [&](const Integers& labels, int64_t first, int64_t n, int64_t c) {
    Integers out;
    for (int64_t i = first; i < std::min(first + n, rows); ++i)
      if (labels[static_cast<size_t>(i)] == c) out.push_back(i);
    return out;
  };
  const auto radius = [&](const Integers& own) {
    const auto n = static_cast<int64_t>(own.size());
    return nuclear_norm(centred_rows(x, own, d), n, d) * radius_scale(p.variant, n, d);
  };
  double image = 0, images = 0, batch = 0, clusters = 0, inter = 0, terms = 0;
  for (int64_t b = 0; b < p.images; ++b) {
    double sum = 0, count = 0;
    for (int64_t c = 0; c < local; ++c) {
      const Integers own = members(r.local_labels, b * p.positions, p.positions, c);
      if (own.size() < 2) continue;
      sum += radius(own);
      ++count;
    }
    if (count == 0) continue;
    image += sum / count;
    ++images;
  }
  for (int64_t g = 0; g < p.groups(); ++g) {
    const auto n = static_cast<double>(std::min(group_rows, rows - g * group_rows));
    double whole = 0;
    bool has_terms = false;
    for (int64_t c = 0; c < global; ++c) {
      const Integers own = members(r.global_labels, g * group_rows, group_rows, c);
      double squares = 0;
      for (const int64_t i : own) {
        double best = -1;
        for (int64_t j = 0; j < global; ++j) {
          double s = 0;
          for (int64_t f = 0; f < d; ++f)
            s += std::pow(
                x[static_cast<size_t>(i * d + f)] - r.centroids[static_cast<size_t>((g * global + j) * d + f)],
                2);
          if (j != c && s <= 1e300 && (best < 0 || s < best)) best = s;
        }
        if (best < 0) continue;
        has_terms = true;
        squares += best;
        whole += std::sqrt(best);
      }
      if (has_terms && p.variant == Variant::kPaper && !own.empty()) {
        inter += squares / static_cast<double>(own.size());
        ++terms;
      }
      if (own.size() < 2) continue;
      batch += radius(own);
      ++clusters;
    }
    if (has_terms && p.variant != Variant::kPaper) {
      inter += whole / n;
      ++terms;
    }
  }
  const double by = divides_by_avg_norm(p.variant) ? (average > 0 ? 1 / average : 0) : 1.0;
  return {terms > 0 ? inter / terms * by : 0, images > 0 ? image / images * by : 0,
          clusters > 0 ? batch / clusters * by : 0, 1.25, average};
}

template <class S>
void check(const Shape& p, const char* name, double component_tolerance, double gradient_tolerance) {
  const Data<S> data(p);
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  Reals external = reals(p.rows() * p.dim);
  for (double& v : external) v = 0.01 * normal(random);
  dse::emulation::schedule_seed = 0;
  const Results r = run(p, data, external);
  for (const uint64_t seed : {1u, 77u}) {
    dse::emulation::schedule_seed = seed;
    expect(r.same(run(p, data, external)), "same bits under another schedule");
  }
  dse::emulation::schedule_seed = 0;
  if (p.kind == 3) {
    for (const double v : r.components) expect(v != v, "NaN components");
    for (const double v : r.gradient) expect(v != v, "NaN gradient");
    for (const int64_t l : r.global_labels) expect(l == 0, "labels of NaN");
    std::printf("%-28s NaN everywhere\n", name);
    return;
  }
  const Reals x = scaled(p, data.z);
  const int64_t d = p.dim;
  // A zero row is as far from every row of length 1: rounding decides there.
  if (std::is_same_v<S, double> && p.kind != 4) {
    int64_t differ = 0;
    const auto compare = [&](const Integers& labels, int64_t n, int64_t k, RngPurpose purpose) {
      for (int64_t g = 0; g * n < p.rows(); ++g) {
        const int64_t own = std::min(n, p.rows() - g * n);
        const PlainKMeans plain(x, g * n, own, d, std::min(k, own), p.normalize,
                                {12345, purpose, static_cast<uint64_t>(g)});
        for (int64_t i = 0; i < own; ++i)
          differ += plain.labels[static_cast<size_t>(i)] != labels[static_cast<size_t>(g * n + i)] ? 1 : 0;
      }
    };
    compare(r.local_labels, p.positions, std::min(p.local, p.positions), RngPurpose::kLocalKMeans);
    compare(r.global_labels, p.group_rows(), std::min(p.global, p.group_rows()), RngPurpose::kGlobalKMeans);
    expect(differ == 0, "k-means labels", static_cast<double>(differ));
  }
  const Reals plain = plain_components(p, x, r);
  double worst = 0.0;
  for (size_t i = 0; i < 5; ++i) {
    worst = std::max(worst, std::abs(r.components[i] - plain[i]) / std::max(std::abs(plain[i]), 1e-3));
  }
  expect(worst <= component_tolerance || p.kind == 1, "components", worst);
  double error = 0.0, size = 0.0;
  if (p.kind == 1 || p.kind == 2) {  // no derivative there
    for (const double v : r.gradient) expect(std::abs(v) < 1e3, "finite gradient", v);
  } else {
    const auto objective = [&](const Reals& z) {
      const Reals at = scaled(p, z), c = plain_components(p, at, r);
      double sum = 0.0;
      for (size_t i = 0; i < 5; ++i)
        if (i != 3) sum += static_cast<double>(static_cast<RealOf<S>>(kUpstream[i])) * c[i];
      for (size_t i = 0; i < at.size(); ++i) sum += external[i] * at[i];
      return sum;
    };
    for (int sample = 0; sample < 14; ++sample) {
      const auto i = static_cast<size_t>(random() % static_cast<uint64_t>(p.rows() * d));
      if (p.kind == 4 && static_cast<int64_t>(i) / d == 3) continue;
      Reals up = data.z, down = data.z;
      const double h = 1e-5;
      up[i] += h;
      down[i] -= h;
      const double slope = (objective(up) - objective(down)) / (2 * h);
      error += std::pow(slope - r.gradient[i], 2);
      size += slope * slope;
    }
    error = std::sqrt(error / size);
    expect(error <= gradient_tolerance, "gradient", error);
    if (p.kind == 4) {
      for (int64_t f = 0; f < d && p.normalize; ++f)
        expect(r.gradient[static_cast<size_t>(3 * d + f)] == 0.0, "gradient of a zero row");
    }
  }
  if (p.kind == 1) {
    for (const size_t i : {0, 1, 2, 4}) expect(r.components[i] == 0.0, "equal rows", r.components[i]);
    for (const double v : r.mean_direction) expect(v == 0.0, "direction of equal rows", v);
  }
  std::printf("%-28s components %.1e gradient %.1e\n", name, worst, error);
}

// The operators on their own: k-means with its inertia, one group not finite; nuclear norms and their gradient.
template <class S>
void check_operators(int64_t groups, int64_t n, int64_t d, int64_t k, int64_t shared_side, double tolerance) {
  Shape p{groups, n, d, 1, 1, 1, Variant::kRegularizer, false};
  p.kind = 3;
  const Data<S> data(p);
  auto finite = filled<int>(groups, -1);
  run_row_scales(data.view, false, nullptr, finite.data(), n, nullptr);
  for (int64_t g = 0; g < groups; ++g)
    expect(finite[static_cast<size_t>(g)] == (g + 1 < groups ? 1 : 0), "flag of a group");
  const int64_t seed = -9;
  Integers labels = integers(groups * n);
  Reals centroids = reals(groups * k * d), inertia = reals(groups);
  KMeansArgs<S> a;
  a.x = data.view;
  a.rows = n;
  a.problems = groups;
  a.k = k;
  a.seed = &seed;
  a.finite = finite.data();
  a.finite_stride = 1;
  a.labels = labels.data();
  a.centroids = centroids.data();
  a.inertia = inertia.data();
  auto space = bytes(kmeans_workspace(groups, n, d, k));
  run_kmeans(a, space.data(), nullptr);
  double worst = 0.0;
  int64_t differ = 0;
  for (int64_t g = 0; g + 1 < groups; ++g) {
    const PlainKMeans plain(data.z, g * n, n, d, k, false,
                            {static_cast<uint64_t>(seed), RngPurpose::kKMeansOp, static_cast<uint64_t>(g)});
    for (int64_t i = 0; i < n; ++i)
      differ += plain.labels[static_cast<size_t>(i)] != labels[static_cast<size_t>(g * n + i)] ? 1 : 0;
    for (int64_t i = 0; i < k * d; ++i)
      worst = std::max(worst, std::abs(plain.centroids[static_cast<size_t>(i)] -
                                       centroids[static_cast<size_t>(g * k * d + i)]));
    worst = std::max(worst, std::abs(plain.inertia / inertia[static_cast<size_t>(g)] - 1.0));
  }
  expect(differ == 0, "k-means operator: labels", static_cast<double>(differ));
  expect(worst < 1e-11, "k-means operator: centroids and inertia", worst);
  expect(std::isnan(inertia.back()) && std::isnan(centroids.back()) && labels.back() == 0, "k-means of NaN");

  Integers offset = integers(groups * (k + 1)), order = integers(groups * n), sizes = integers(groups * k);
  labels[1] = k;  // in no cluster
  Reals norms = reals(groups * k), slots = reals(groups * n * std::min(n, d));
  Integers forms = integers(groups * k);
  ClusterNormArgs<S> c;
  c.x = data.view;
  c.clusters = {groups * n, n, k, 0, groups, labels.data(), offset.data(), order.data(), sizes.data()};
  c.slots = {slots.data(), std::min(n, d), false};
  c.want_w = true;
  c.finite = finite.data();
  c.norms = norms.data();
  c.forms = forms.data();
  c.eigen.shared_side = shared_side;
  c.eigen.large_blocks = 2;
  run_cluster_index(c.clusters, nullptr);
  auto work = bytes(cluster_norms_workspace(groups * k, n, d, c.eigen));
  run_cluster_norms(c, work.data(), nullptr);
  Reals values_only = reals(groups * k), scratch = reals(groups * n * std::min(n, d));
  ClusterNormArgs<S> v = c;
  v.slots.data = scratch.data();
  v.want_w = false;
  v.norms = values_only.data();
  v.forms = nullptr;
  run_cluster_norms(v, work.data(), nullptr);

  std::vector<RealOf<S>> upstream;
  for (int64_t i = 0; i < groups * k; ++i)
    upstream.push_back(static_cast<RealOf<S>>(0.5 + 0.1 * static_cast<double>(i)));
  Reals weights = reals(groups * k), sum = filled(groups * n * d, 0.0);
  run_read_weights(upstream.data(), groups, k, k, 1, weights.data(), nullptr);
  ClusterGradientArgs<S> b;
  b.x = data.view;
  b.clusters = c.clusters;
  b.slots = c.slots;
  b.weights = weights.data();
  b.accumulator = sum.data();
  auto more = bytes(cluster_gradient_workspace(groups * k, d));
  run_cluster_gradient(b, more.data(), nullptr);
  auto out = filled<S>(groups * n * d, from_double<S>(77.0));
  run_store_rows(sum.data(), groups, n, d, forms.data(), k, out.data(), nullptr);

  double value_error = 0.0, error = 0.0, size = 0.0;
  for (int64_t g = 0; g + 1 < groups; ++g)
    for (int64_t cluster = 0; cluster < k; ++cluster) {
      Integers own;
      for (int64_t i = 0; i < n; ++i)
        if (labels[static_cast<size_t>(g * n + i)] == cluster) own.push_back(g * n + i);
      const auto item = static_cast<size_t>(g * k + cluster);
      if (own.size() < 2) {
        expect(norms[item] == 0.0 && forms[item] == 0, "norm of less than two rows");
        continue;
      }
      Reals polar;
      const double norm = nuclear_norm(centred_rows(data.z, own, d), static_cast<int64_t>(own.size()), d, &polar);
      value_error =
          std::max({value_error, std::abs(norms[item] / norm - 1), std::abs(values_only[item] / norm - 1)});
      for (size_t i = 0; i < own.size(); ++i)
        for (int64_t f = 0; f < d; ++f) {
          const double want =
              polar[i * static_cast<size_t>(d) + static_cast<size_t>(f)] * static_cast<double>(upstream[item]);
          error += std::pow(to_double(out[static_cast<size_t>(own[i] * d + f)]) - want, 2);
          size += want * want;
        }
    }
  error = std::sqrt(error / size);
  expect(value_error < 1e-9, "nuclear norms", value_error);
  expect(error < tolerance, "gradient of nuclear norms", error);
  expect(std::isnan(norms.back()) && forms.back() == -1 && std::isnan(to_double(out.back())), "norms of NaN");
  std::printf("operators (%ld, %ld, %ld) k=%ld    centroids %.1e norms %.1e gradient %.1e\n", groups, n, d, k,
              worst, value_error, error);
}

// Given centroids: padding of a small last group, rows assigned to them, absent ones.
void check_given() {
  const int64_t k = 3, d = 5;
  Reals given = {1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0};
  const FeatureView<double> view{given.data(), 2, k, d, k * d, d, 1, nullptr};
  Reals out = reals(2 * k * d);
  const int finite = 1;
  run_load_centroids(view, int64_t{2}, int64_t{4}, &finite, out.data(), nullptr);
  expect(out[0] == 1.0 && out[24] == 1.0 && out[25] == std::numeric_limits<double>::infinity(),
         "given centroids");
  Reals z = filled<double>(6 * d, 0.1);
  for (int64_t i = 0; i < 6; ++i) z[static_cast<size_t>(i * d + (i < 4 ? 2 - i % 3 : i - 1))] = 2.0;
  Integers nearest = integers(6), assigned = integers(6);
  NearestArgs<double> near;
  near.centroids = out.data();
  near.group_rows = 4;
  near.k = k;
  near.nearest = nearest.data();
  near.assigned = assigned.data();
  run_nearest_centroid(FeatureView<double>{z.data(), 6, 1, d, d, d, 1, nullptr}, near, nullptr);
  expect(assigned == Integers{2, 1, 0, 2, 0, 1} && nearest == assigned, "rows assigned to given centroids");
  std::fill(out.begin() + d, out.begin() + k * d, std::numeric_limits<double>::infinity());
  run_nearest_centroid(FeatureView<double>{z.data(), 6, 1, d, d, d, 1, nullptr}, near, nullptr);
  expect(nearest[0] == -1 && assigned[0] == 0, "a single centroid");
}

}  // namespace

int main() {
  using bf16 = __nv_bfloat16;
  check<double>({3, 10, 12, 2, 3, 4}, "float64", 1e-12, 1e-6);
  check<double>({3, 10, 12, 2, 3, 4, Variant::kPaper}, "float64 paper", 1e-12, 1e-6);
  check<double>({2, 40, 7, 1, 2, 3, Variant::kEvaluation, false}, "float64 n > d, not normalized", 1e-12, 1e-6);
  check<double>({3, 9, 33, 2, 3, 5, Variant::kRegularizer, true, 4}, "float64 zero row", 1e-12, 1e-6);
  check<double>({3, 9, 10, 2, 3, 5, Variant::kRegularizer, true, 1}, "float64 equal rows", 1e-12, 1e-6);
  check<double>({2, 12, 10, 2, 6, 7, Variant::kRegularizer, false, 2}, "float64 four rows", 1e-9, 1e-6);
  check<double>({1, 1, 4, 1, 3, 5}, "float64 one row", 1e-12, 1e-6);
  check<double>({2, 5, 4, 1, 3, 40, Variant::kRegularizer, true, 3}, "float64 NaN", 1e-12, 1e-6);
  check<float>({2, 12, 40, 2, 3, 4}, "float32", 1e-6, 1e-5);
  check<bf16>({2, 20, 40, 1, 3, 4, Variant::kRegularizer, true, 0, 3}, "bfloat16, slots", 1e-6, 1e-2);
  check<__half>({2, 12, 40, 2, 3, 4, Variant::kPaper}, "float16", 1e-6, 1e-2);
  check_operators<double>(3, 150, 12, 35, 72, 1e-8);
  check_operators<double>(2, 60, 45, 2, 4, 1e-8);
  check_operators<bf16>(2, 130, 45, 2, 4, 1e-2);
  check_given();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
