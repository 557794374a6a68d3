// Checks of cuda/eigen.cuh and cuda/image_kernel.cuh on the CPU, against plain float64 references:
//   g++ -std=c++20 -O1 -Wno-unknown-pragmas -DDSE_CUDA_EMULATION -I csrc -I python_tests/cuda ... &&
//   ./check_image_kernel
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cuda/image_kernel.cuh"

namespace {

using namespace dse::cuda;
using Matrix = std::vector<double>;  // row-major

int checks = 0, failures = 0;

void expect(bool good, const char* what, double value) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("FAILED: %s: %g\n", what, value);
}

// One-sided Jacobi: sum of the singular values of x (n x d), and U V^T over those above `floor` relative to the
// largest.
double polar(Matrix x, int n, int d, double floor, Matrix* factor) {
  // Rows of `a` are orthogonalized; v collects the rotations. The shorter side is that of the rows.
  const bool turned = n > d;
  const int rows = turned ? d : n, columns = turned ? n : d;
  Matrix a(x.size()), v(static_cast<size_t>(rows * rows), 0.0);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < d; ++j) a[turned ? j * n + i : i * d + j] = x[i * d + j];
  for (int i = 0; i < rows; ++i) v[i * rows + i] = 1.0;
  for (int sweep = 0; sweep < 60; ++sweep) {
    double worst = 0.0;
    for (int p = 0; p < rows; ++p) {
      for (int q = p + 1; q < rows; ++q) {
        double pp = 0.0, qq = 0.0, pq = 0.0;
        for (int j = 0; j < columns; ++j) {
          pp += a[p * columns + j] * a[p * columns + j];
          qq += a[q * columns + j] * a[q * columns + j];
          pq += a[p * columns + j] * a[q * columns + j];
        }
        if (std::abs(pq) <= 1e-300 || std::abs(pq) <= 1e-16 * std::sqrt(pp * qq)) continue;
        worst = std::max(worst, std::abs(pq) / std::sqrt(pp * qq));
        const double zeta = (qq - pp) / (2.0 * pq);
        const double t = (zeta < 0 ? -1.0 : 1.0) / (std::abs(zeta) + std::sqrt(1.0 + zeta * zeta));
        const double c = 1.0 / std::sqrt(1.0 + t * t), s = c * t;
        const auto turn = [&](Matrix& m, int width) {
          for (int j = 0; j < width; ++j) {
            const double low = m[p * width + j], high = m[q * width + j];
            m[p * width + j] = c * low - s * high;
            m[q * width + j] = s * low + c * high;
          }
        };
        turn(a, columns);
        turn(v, rows);
      }
    }
    if (worst < 1e-15) break;
  }
  Matrix sigma(static_cast<size_t>(rows), 0.0);
  double sum = 0.0, largest = 0.0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) sigma[i] += a[i * columns + j] * a[i * columns + j];
    sigma[i] = std::sqrt(sigma[i]);
    largest = std::max(largest, sigma[i]);
  }
  factor->assign(x.size(), 0.0);
  for (int i = 0; i < rows; ++i) {
    if (!(sigma[i] > floor * largest)) continue;
    sum += sigma[i];
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < columns; ++j) {
        (*factor)[turned ? j * d + r : r * d + j] += v[i * rows + r] * a[i * columns + j] / sigma[i];
      }
  }
  return sum;
}

__global__ void eigen_kernel(double* matrix, int m, double* values, double* w, double* value, bool in_shared,
                             int null, dse::SpectralKind kind) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  const int ld = eigen_ld(m);
  double* a = in_shared ? scratch + eigen_scratch(m) + 40 : matrix;
  for (int i = thread_id(); i < m * ld; i += block_threads()) a[i] = matrix[i];
  block_sync();
  block_eigen(a, m, ld, values, scratch, true);
  for (int i = thread_id(); i < m * ld; i += block_threads()) matrix[i] = a[i];
  block_sync();
  const double result = block_spectral(kind, a, values, m, ld, null, 0.0, w, m, scratch);
  if (thread_id() == 0) *value = result;
}

void check_eigen(int m, int rank, bool ties, dse::SpectralKind kind) {
  std::mt19937_64 random(static_cast<uint64_t>(m * 100 + rank));
  std::normal_distribution<double> normal;
  const int ld = eigen_ld(m);
  Matrix x(static_cast<size_t>(m * std::max(rank, 1)), 0.0), gram(static_cast<size_t>(m * ld), 0.0);
  for (double& value : x) value = rank > 0 ? normal(random) : 0.0;
  if (ties) {  // orthogonal rows of equal length
    for (int i = 0; i < m; ++i)
      for (int r = 0; r < rank; ++r) x[i * rank + r] = i == r ? 3.0 : 0.0;
  }
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < m; ++j)
      for (int r = 0; r < rank; ++r) gram[i * ld + j] += x[i * rank + r] * x[j * rank + r];
  Matrix first_w;
  double first = 0.0;
  for (uint64_t seed = 0; seed < 3; ++seed) {
    dse::emulation::schedule_seed = seed;
    Matrix vectors = gram, values(static_cast<size_t>(m)), w(static_cast<size_t>(m * m));
    double value = 0.0;
    launch(
        DSE_KERNEL(eigen_kernel),
        {dim3(1), dim3(128), sizeof(double) * static_cast<size_t>(eigen_scratch(m) + 40 + m * ld + m), nullptr},
        vectors.data(), m, values.data(), w.data(), &value, seed != 2, m - rank, kind);
    if (seed > 0) {
      expect(value == first && w == first_w, "same bits whatever the order of threads", value - first);
      continue;
    }
    first = value;
    first_w = w;
    double orthogonal = 0.0;
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < m; ++j) {
        double dot = i == j ? -1.0 : 0.0;
        for (int r = 0; r < m; ++r) dot += vectors[i * ld + r] * vectors[j * ld + r];
        orthogonal = std::max(orthogonal, std::abs(dot));
      }
    expect(orthogonal < 1e-13, "orthogonal vectors", orthogonal);
    Matrix factor;
    const double nuclear = rank > 0 ? polar(x, m, rank, 1e-10, &factor) : 0.0;
    if (kind == dse::SpectralKind::kNuclearNorm) {
      expect(std::abs(value - nuclear) <= 1e-12 * nuclear, "nuclear norm", value - nuclear);
      double worst = 0.0;
      for (int i = 0; i < m; ++i)
        for (int r = 0; r < rank; ++r) {
          double sum = -factor[i * rank + r];
          for (int j = 0; j < m; ++j) sum += w[i * m + j] * x[j * rank + r];
          worst = std::max(worst, std::abs(sum));
        }
      expect(worst < 1e-9, "W X is the polar factor", worst);
      continue;
    }
    // The effective rank does not change with the length of X: <W X, X> = 0.
    double along = 0.0, size = 0.0;
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < m; ++j) along += w[i * m + j] * gram[i * ld + j], size += std::abs(w[i * m + j]);
    expect(std::abs(along) <= 1e-10 * (1.0 + size), "W is orthogonal to scaling", along);
    expect(value >= (rank > 0 ? 1.0 - 1e-12 : 0.0) && value <= rank + 1e-9, "effective rank in range", value);
    if (ties) expect(std::abs(value - rank) < 1e-11 * rank, "effective rank of equal values", value);
  }
}

// Follows csrc/cpu/kmeans.cpp in coordinates centred about the rows' mean.
std::vector<int64_t> reference_kmeans(const Matrix& x, int n, int d, int k, int max_iters, double tol,
                                      const dse::RngStream& rng) {
  Matrix points = x, centroids(static_cast<size_t>(k * d)), nearest(static_cast<size_t>(n), 1e300);
  for (int f = 0; f < d; ++f) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += x[i * d + f] - x[f];
    for (int i = 0; i < n; ++i) points[i * d + f] = x[i * d + f] - x[f] - sum / n;
  }
  const auto distance = [&](int i, int c) {
    double sum = 0.0;
    for (int f = 0; f < d; ++f) sum += std::pow(points[i * d + f] - centroids[c * d + f], 2);
    return sum;
  };
  int64_t chosen = rng.below(0, n);
  for (int c = 0;; ++c) {
    std::copy_n(points.begin() + chosen * d, d, centroids.begin() + c * d);
    if (c + 1 == k) break;
    double total = 0.0;
    for (int i = 0; i < n; ++i) {
      nearest[i] = std::min(nearest[i], distance(i, c));
      total += nearest[i];
    }
    const auto draw = static_cast<uint32_t>(c + 1);
    if (!(total > 0.0)) {
      chosen = rng.below(draw, n);
      continue;
    }
    const double target = rng.uniform(draw) * total;
    double running = 0.0;
    int64_t last = 0;
    chosen = -1;
    for (int i = 0; i < n; ++i) {
      if (nearest[i] > 0.0) last = i;
      running += nearest[i];
      if (running > target && chosen < 0) chosen = i;
    }
    if (chosen < 0) chosen = last;
  }
  std::vector<int64_t> labels(static_cast<size_t>(n));
  const auto assign = [&] {
    for (int i = 0; i < n; ++i) {
      double best = 0.0;
      for (int c = 0; c < k; ++c) {
        const double value = distance(i, c);
        if (c > 0 && !(value < best)) continue;
        best = value;
        labels[i] = c;
      }
    }
  };
  for (int iteration = 0; iteration < max_iters; ++iteration) {
    assign();
    Matrix own(static_cast<size_t>(n)), old = centroids;
    for (int i = 0; i < n; ++i) own[i] = distance(i, static_cast<int>(labels[i]));
    double shift = 0.0;
    for (int c = 0; c < k; ++c) {
      const auto count = static_cast<double>(std::count(labels.begin(), labels.end(), c));
      if (count == 0) {
        const auto far = std::max_element(own.begin(), own.end()) - own.begin();
        own[far] = -1.0;
        std::copy_n(points.begin() + far * d, d, centroids.begin() + c * d);
      } else {
        for (int f = 0; f < d; ++f) {
          double sum = 0.0;
          for (int i = 0; i < n; ++i) sum += labels[i] == c ? points[i * d + f] : 0.0;
          centroids[c * d + f] = sum / count;
        }
      }
      for (int f = 0; f < d; ++f) shift += std::pow(centroids[c * d + f] - old[c * d + f], 2);
    }
    if (std::sqrt(shift) < tol) break;
  }
  assign();
  return labels;
}

template <class S>
S element(double x) {
  return from_double<S>(x);
}

enum class Kind { kPlain, kBlobs, kTight, kEqual, kFewPoints, kZeroRows, kTiny, kNaN };

struct Case {
  const char* name;
  int images, n, d, k;
  Kind kind = Kind::kPlain;
  bool normalize = true, given = false, turned = false, labels_match = true;
  size_t shared_limit = 227 << 10;
  double norm_error = 1e-10, gradient_error = 1e-7;
};

template <class S>
void check_image(const Case& t) {
  const int rows = t.images * t.n, n = t.n, d = t.d, k = t.k;
  std::mt19937_64 random(static_cast<uint64_t>(n * 1000 + d));
  std::normal_distribution<double> normal;
  Matrix z(static_cast<size_t>(rows * d));
  for (int i = 0; i < rows; ++i) {
    const int blob = static_cast<int>(random() % static_cast<uint64_t>(k));
    for (int f = 0; f < d; ++f) {
      double value = normal(random);
      if (t.kind == Kind::kBlobs) value = 0.3 * value + 2.0 * std::sin(blob * 7 + f * (blob + 1));
      if (t.kind == Kind::kTight) value = 1e-3 * value + std::sin(blob * 7 + f * (blob + 1));
      if (t.kind == Kind::kEqual) value = 0.1 * (f + 1);
      if (t.kind == Kind::kFewPoints) value = 0.1 * ((f + blob % 2) % 5);
      if (t.kind == Kind::kZeroRows && i % 3 == 0) value = 0.0;
      if (t.kind == Kind::kTiny) value *= 1e-200;
      if (t.kind == Kind::kNaN && i == 1 && f == 0) value = NAN;
      z[i * d + f] = value;
    }
  }
  std::vector<S> data(z.size());
  for (int i = 0; i < rows; ++i)
    for (int f = 0; f < d; ++f) {
      const S value = element<S>(z[i * d + f]);
      data[t.turned ? (i / n * d + f) * n + i % n : i * d + f] = value;
      z[i * d + f] = to_double(value);
    }
  std::vector<int64_t> given(static_cast<size_t>(rows));
  for (int64_t& label : given) label = static_cast<int64_t>(random() % static_cast<uint64_t>(k));

  const ImagePlan plan = plan_image(t.images, n, d, t.shared_limit, 1);
  std::vector<int64_t> first_labels;
  Matrix first_norms, first_slots;
  for (uint64_t order = 0; order < 3; ++order) {
    dse::emulation::schedule_seed = order;
    Matrix scale(static_cast<size_t>(rows)), norms(static_cast<size_t>(t.images * k), -1.0);
    Matrix slots(static_cast<size_t>(rows * n), 0.0), space(static_cast<size_t>(plan.workspace()) + 1, NAN);
    std::vector<int64_t> labels = given, sizes(static_cast<size_t>(t.images * k)), forms = sizes;
    const int64_t seed = 11;
    int finite = 1;
    ImageArguments<S> args;
    args.x = {data.data(), t.images, n, d, static_cast<int64_t>(n) * d, t.turned ? 1 : d, t.turned ? n : 1};
    args.local_clusters = k;
    args.normalize = t.normalize;
    args.seed = &seed;
    args.labels_given = t.given;
    args.row_scale = scale.data();
    args.finite = &finite;
    args.labels = labels.data();
    args.sizes = sizes.data();
    args.norms = norms.data();
    args.forms = forms.data();
    args.slots = order < 2 ? slots.data() : nullptr;
    args.workspace = space.data();
    run_image_kernel<S>(args, plan, nullptr);
    expect(finite == (t.kind == Kind::kNaN ? 0 : 1), "finite", finite);
    if (t.kind == Kind::kNaN) {
      for (int64_t label : labels) expect(label >= 0 && label < k, "label in range", static_cast<double>(label));
      return;
    }
    if (order > 0) {
      expect(labels == first_labels, "same labels whatever the order of threads", 0.0);
      if (order == 1) expect(norms == first_norms && slots == first_slots, "same bits", 0.0);
      for (size_t i = 0; i < norms.size(); ++i) {  // without vectors rotations are the same
        expect(norms[i] == first_norms[i], "same norms without vectors", norms[i] - first_norms[i]);
      }
      continue;
    }
    first_labels = labels;
    first_norms = norms;
    first_slots = slots;
    double norm_worst = 0.0, gradient_worst = 0.0;
    for (int image = 0; image < t.images; ++image) {
      Matrix x(static_cast<size_t>(n * d));
      for (int i = 0; i < n; ++i) {
        double largest = 0.0, squares = 0.0;
        for (int f = 0; f < d; ++f) largest = std::max(largest, std::abs(z[(image * n + i) * d + f]));
        for (int f = 0; f < d && largest > 0; ++f) squares += std::pow(z[(image * n + i) * d + f] / largest, 2);
        const double norm = largest * std::sqrt(squares);
        const double expected = t.normalize ? 1.0 / std::max(norm, 1e-12) : 1.0;
        expect(std::abs(scale[image * n + i] / expected - 1.0) < 1e-13, "row scale", scale[image * n + i]);
        for (int f = 0; f < d; ++f) x[i * d + f] = z[(image * n + i) * d + f] * scale[image * n + i];
      }
      const int64_t* label = labels.data() + image * n;
      if (!t.given) {
        const auto reference = reference_kmeans(
            x, n, d, k, 20, 1e-4, {11, dse::RngPurpose::kLocalKMeans, static_cast<uint64_t>(image)});
        int different = 0;
        for (int i = 0; i < n; ++i) different += reference[i] != label[i] ? 1 : 0;
        if (t.labels_match) expect(different == 0, "labels as on the CPU", different);
        bool same_sets = true;
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < i; ++j) {
            same_sets = same_sets && (label[i] == label[j]) == (reference[i] == reference[j]);
          }
        expect(same_sets, "the same rows together as on the CPU", 0.0);
      }
      int offset = 0;
      for (int c = 0; c < k; ++c) {
        std::vector<int> members;
        for (int i = 0; i < n; ++i)
          if (label[i] == c) members.push_back(i);
        const auto m = static_cast<int>(members.size());
        expect(sizes[image * k + c] == m, "size", m);
        expect(forms[image * k + c] == (m > 1 ? 1 : 0), "form", static_cast<double>(forms[image * k + c]));
        Matrix xc(static_cast<size_t>(m * d)), factor;
        double magnitude = 0.0;
        for (int f = 0; f < d; ++f) {
          double sum = 0.0;
          for (int i : members) sum += x[i * d + f] - x[members[0] * d + f], magnitude += std::abs(x[i * d + f]);
          for (int i = 0; i < m; ++i) xc[i * d + f] = x[members[i] * d + f] - x[members[0] * d + f] - sum / m;
        }
        const double reference = m > 1 ? polar(xc, m, d, 1e-9, &factor) : 0.0;
        const double got = norms[image * k + c];
        const double unit = reference > 1e-12 * magnitude ? reference : 1.0;
        norm_worst = std::max(norm_worst, std::abs(got - reference) / unit);
        if (m > 1) {
          const double* w = slots.data() + (image * n + offset) * n;
          double difference = 0.0, size = 0.0;
          for (int i = 0; i < m; ++i)
            for (int f = 0; f < d; ++f) {
              double sum = 0.0;
              for (int j = 0; j < m; ++j) sum += w[i * m + j] * xc[j * d + f];
              difference += std::pow(sum - factor[i * d + f], 2);
              size += std::pow(factor[i * d + f], 2);
            }
          gradient_worst = std::max(gradient_worst, std::sqrt(difference / std::max(size, 1e-300)));
        }
        offset += m;
      }
    }
    std::printf("%-28s threads %3d norms %.1e gradient %.1e\n", t.name, plan.threads, norm_worst, gradient_worst);
    expect(norm_worst <= t.norm_error, t.name, norm_worst);
    expect(gradient_worst <= t.gradient_error, t.name, gradient_worst);
  }
}

}  // namespace

int main() {
  using dse::SpectralKind;
  for (int m : {1, 2, 3, 5, 33, 65, 100}) {
    check_eigen(m, m, false, SpectralKind::kEffectiveRank);
    check_eigen(m, (m + 1) / 2, false, SpectralKind::kNuclearNorm);
    check_eigen(m, (m + 1) / 2, true, SpectralKind::kEffectiveRank);
    check_eigen(m, 0, false, SpectralKind::kNuclearNorm);
  }
  for (int rank : {2, 3, 20}) check_eigen(100, rank, false, SpectralKind::kNuclearNorm);
  check_image<double>({.name = "one row", .images = 2, .n = 1, .d = 5, .k = 1});
  check_image<double>({.name = "k = N", .images = 2, .n = 5, .d = 3, .k = 5});
  check_image<double>({.name = "plain", .images = 3, .n = 20, .d = 33, .k = 3});
  check_image<double>({.name = "not normalized, turned",
                       .images = 2,
                       .n = 40,
                       .d = 24,
                       .k = 4,
                       .normalize = false,
                       .turned = true});
  check_image<double>({.name = "more rows than features", .images = 2, .n = 60, .d = 8, .k = 3});
  check_image<double>({.name = "many clusters", .images = 1, .n = 70, .d = 40, .k = 20});
  check_image<double>({.name = "labels given", .images = 2, .n = 49, .d = 64, .k = 3, .given = true});
  check_image<double>({.name = "workspace", .images = 2, .n = 100, .d = 48, .k = 2, .shared_limit = 76 << 10});
  check_image<double>(
      {.name = "workspace, small", .images = 1, .n = 80, .d = 48, .k = 3, .shared_limit = 58 << 10});
  check_image<double>({.name = "equal rows",
                       .images = 1,
                       .n = 17,
                       .d = 12,
                       .k = 3,
                       .kind = Kind::kEqual,
                       .norm_error = 0.0,
                       .gradient_error = 0.0});
  // Fewer points than clusters: centroids coincide, and rounding decides which of them gets the rows.
  check_image<double>({.name = "few points",
                       .images = 1,
                       .n = 30,
                       .d = 12,
                       .k = 4,
                       .kind = Kind::kFewPoints,
                       .labels_match = false,
                       .norm_error = 1e-7});
  check_image<double>({.name = "zero rows", .images = 1, .n = 33, .d = 40, .k = 2, .kind = Kind::kZeroRows});
  check_image<double>({.name = "tiny rows",
                       .images = 1,
                       .n = 20,
                       .d = 16,
                       .k = 1,
                       .kind = Kind::kTiny,
                       .normalize = true,
                       .norm_error = 1e-7});
  check_image<double>({.name = "NaN", .images = 2, .n = 20, .d = 16, .k = 3, .kind = Kind::kNaN});
  check_image<double>(
      {.name = "tight clusters, float64", .images = 1, .n = 49, .d = 64, .k = 3, .kind = Kind::kTight});
  check_image<float>({.name = "float32", .images = 2, .n = 49, .d = 66, .k = 3});
  check_image<float>(
      {.name = "tight clusters, float32", .images = 1, .n = 49, .d = 64, .k = 3, .kind = Kind::kTight});
  check_image<__nv_bfloat16>(
      {.name = "bfloat16, N = 196", .images = 1, .n = 196, .d = 128, .k = 3, .kind = Kind::kBlobs});
  check_image<__half>({.name = "float16, N = 256", .images = 1, .n = 256, .d = 20, .k = 5, .kind = Kind::kBlobs});
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
