// Random calls of the CPU operators, forward and backward, for a fixed time or number of cases. Every call is
// checked: against plain definitions (reference.h), against identities of the gradient, and bit by bit against
// the same call with another number of threads. A case is a function of the seed and of its number alone:
//
//   fuzz --seconds 20 --seed 0      all cases from number 0 on
//   fuzz --seed 0 --case 1234       one of them again
//   fuzz --plant overrun            a fault made on purpose: overrun, overflow or race

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "inputs.h"
#include "reference.h"
#include "threads.h"

namespace fuzz {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

[[noreturn]] void fail(const std::string& what) { throw std::logic_error(what); }

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  text.precision(12);
  (text << ... << parts);
  fail(text.str());
}

// The project's promises by dtype, an order of magnitude apart from rounding, not from wrong results.
double value_tolerance(ScalarType type) { return type == ScalarType::Double ? 1e-8 : 1e-3; }
// Of collapsed features the promise for float32 is weaker.
bool collapsed(const Features& z) {
  return z.kind == Kind::kOutlier || z.kind == Kind::kNearlyEqual || z.kind == Kind::kSteep;
}
double gradient_tolerance(const Features& z, bool steep) {
  if (z.array.type == ScalarType::Double) return 1e-6;
  return z.array.type == ScalarType::Float && !collapsed(z) && !steep ? 1e-3 : 1e-2;
}

double scalar(const Tensor& t, int64_t i = 0) {
  return fetch(t.scalar_type(), static_cast<const char*>(t.const_data_ptr()) + i * bytes_of(t.scalar_type()));
}
int64_t label(const Tensor& t, int64_t i) { return static_cast<const int64_t*>(t.const_data_ptr())[i]; }

void same_bits(const Tensor& a, const Tensor& b, const char* what) {
  require(a.numel() == b.numel(), what, " has another size with other threads");
  const auto bytes = static_cast<size_t>(a.numel() * bytes_of(a.scalar_type()));
  require(bytes == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), bytes) == 0, what,
          " is not the same with other threads");
}

void near(double ours, double expected, double relative, double absolute, const char* what) {
  require(std::abs(ours - expected) <= relative * std::abs(expected) + absolute, what, " is ", ours,
          ", expected ", expected);
}

// One contiguous gradient in the dtype of the features, shape (b, n, d): its inner product with them, which by
// Euler's theorem is the degree of a homogeneous function times its value.
void check_gradient(const Tensor& grad, const Features& z, double expected, bool check_value, const char* what,
                    bool steep = false) {
  const int64_t count = grad.numel();
  require(grad.scalar_type() == z.array.type, what, " has another dtype");
  const Rows x = z.rows();
  double inner = 0.0, squares = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double g = scalar(grad, i);
    if (!z.finite) continue;
    // Gradients go with 1 / scale and 1 / avg_norm: those of small or nearly equal features leave float16's
    // range.
    const bool overflow = std::isinf(g) && z.array.type == ScalarType::Half;
    require(std::isfinite(g) || overflow || !z.moderate(), what, " is not finite for finite features");
    check_value = check_value && !overflow;
    inner += g * x.data[static_cast<size_t>(i)];
    squares += g * g;
  }
  if (!z.finite || !z.moderate() || !check_value) return;
  // Half-precision gradients lose their small entries.
  const double lost = z.array.type == ScalarType::Half ? 1e-7 * static_cast<double>(count) * 1e3 : 0.0;
  // The error of the gradient is promised relative to its norm.
  const double size = std::sqrt(squares * dot(x.data.data(), x.data.data(), count));
  const double allowed = gradient_tolerance(z, steep) * (size + std::abs(expected)) + lost + 1e-12;
  require(std::abs(inner - expected) <= allowed, what, " along the features is ", inner, ", expected ", expected,
          " +- ", allowed, "; features of kind ", static_cast<int>(z.kind), ", scale ", z.scale, ", ",
          bytes_of(z.array.type), " bytes, shape ", z.array.tensor.size(0), " x ", z.array.tensor.size(1), " x ",
          z.array.tensor.size(2));
}

void all_nan(const Tensor& t, const char* what) {
  for (int64_t i = 0; i < t.numel(); ++i)
    require(std::isnan(scalar(t, i)), what, " has a number for features that are not finite");
}

struct Threads {
  int first, second;
};

template <typename Call>
auto twice(const Threads& threads, const Call& call) {
  set_threads(threads.first);
  auto one = call();
  set_threads(threads.second);
  auto two = call();
  return std::pair(std::move(one), std::move(two));
}

Array seed_tensor(Random& random) {
  Array seed({1}, ScalarType::Long, random, false);
  store(seed.type, static_cast<double>(random.below(int64_t{1} << 40)), seed.at({0}));
  return seed;
}

bool group_finite(const Rows& x, int64_t first, int64_t n) {
  for (int64_t i = first; i < first + n; ++i)
    for (int64_t f = 0; f < x.d; ++f)
      if (!std::isfinite(x.row(i)[f])) return false;
  return true;
}

// --- the operators ---------------------------------------------------------------------------------

void try_kmeans(Random& random, const Threads& threads) {
  const int64_t groups = random.size(5), n = random.size(180), d = random.size(70);
  const Features x = random_features(random, groups, n, d);
  const Array seed = seed_tensor(random);
  const int64_t k = random.chance(0.1) ? n + random.between(0, 3) : random.size(30), found = std::min(k, n);
  const int64_t iterations = random.between(1, 25);
  const auto [a, b] =
      twice(threads, [&] { return dse::cpu::kmeans_op(x.array.tensor, k, seed.tensor, iterations, 1e-4); });
  const auto& [centroids, labels, inertia] = a;
  same_bits(centroids, std::get<0>(b), "centroids");
  same_bits(labels, std::get<1>(b), "labels");
  same_bits(inertia, std::get<2>(b), "inertia");
  const Rows rows = x.rows();
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t own = label(labels, g * n + i);
      require(own >= 0 && own < found, "label ", own, " of ", found);
    }
    if (!group_finite(rows, g * n, n)) {
      require(std::isnan(scalar(inertia, g)), "inertia is a number for features that are not finite");
      continue;
    }
    if (!x.moderate()) continue;
    double total = 0.0, extent = 0.0, row_size = 0.0;
    const bool wide = x.array.type == ScalarType::Double;
    for (int64_t i = g * n; i < (g + 1) * n; ++i) {
      extent = std::max(extent, distance(rows.row(i), rows.row(g * n), d));
      row_size = std::max(row_size, dot(rows.row(i), rows.row(i), d));
    }
    for (int64_t i = g * n; i < (g + 1) * n; ++i) {
      double best = kInfinity, own = 0.0;
      for (int64_t c = 0; c < found; ++c) {
        double squares = 0.0;
        for (int64_t f = 0; f < d; ++f) {
          const double step = rows.row(i)[f] - scalar(centroids, (g * found + c) * d + f);
          squares += step * step;
        }
        if (c == label(labels, i)) own = squares;
        best = std::min(best, squares);
      }
      // Rounding of squared distances goes with the square of the cloud's extent.
      require(own <= best + (wide ? 1e-11 : 1e-4) * extent * extent +
                         (wide ? 0.0 : 1e-5 * dot(rows.row(i), rows.row(i), d)),
              "row ", i, " is at ", own, " from its centroid and at ", best, " from another one");
      total += own;
    }
    near(scalar(inertia, g), total, wide ? 1e-8 : 1e-3,
         static_cast<double>(n) * ((wide ? 1e-13 : 1e-6) * extent * extent + (wide ? 1e-20 : 1e-10) * row_size),
         "inertia");
  }
}

void try_nuclear_norms(Random& random, const Threads& threads) {
  const int64_t groups = random.size(4), n = random.size(150), d = random.size(60), k = random.size(9);
  const Features x = random_features(random, groups, n, d);
  const Array labels = random_labels(random, groups, n, k);
  const auto [a, b] =
      twice(threads, [&] { return dse::cpu::cluster_nuclear_norms(x.array.tensor, labels.tensor, k, true); });
  const auto& [norms, saved, form] = a;
  same_bits(norms, std::get<0>(b), "norms");
  same_bits(saved, std::get<1>(b), "saved");
  Array upstream({groups, k}, random.chance(0.5) ? norms.scalar_type() : ScalarType::Double, random, true);
  double expected = 0.0;
  const Rows rows = x.rows();
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < k; ++c) store(upstream.type, random.normal(), upstream.at({g, c}));
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < k; ++c) {
      const double ours = scalar(norms, g * k + c);
      if (!group_finite(rows, g * n, n)) {
        require(std::isnan(ours), "norm is a number for features that are not finite");
        continue;
      }
      require(std::isfinite(ours) || !x.moderate(), "norm is not finite");
      expected += ours * fetch(upstream.type, upstream.at({g, c}));
      if (!x.moderate()) continue;
      std::vector<int64_t> members;
      for (int64_t i = 0; i < n; ++i)
        if (fetch(labels.type, labels.at({g, i})) == static_cast<double>(c)) members.push_back(g * n + i);
      if (members.size() < 2) {
        require(ours == 0.0, "norm of fewer than two rows is ", ours);
        continue;
      }
      if (members.size() > 60) continue;  // the plain decomposition takes long
      double unsure = 0.0;
      const double norm = nuclear_norm(select(rows, members), &unsure);
      near(ours, norm, value_tolerance(x.array.type), unsure, "norm");
    }
  }
  const auto [grad, again] = twice(threads, [&] {
    return dse::cpu::cluster_nuclear_norms_backward(upstream.tensor, x.array.tensor, labels.tensor, saved, form);
  });
  same_bits(grad, again, "gradient of norms");
  check_gradient(grad, x, expected, true, "gradient of norms");
}

void try_effective_rank(Random& random, const Threads& threads) {
  const int64_t count = random.size(5), n = random.size(300), d = random.size(110);
  const Features x = random_features(random, count, n, d);
  const bool center = random.chance(0.5);
  const auto [a, b] = twice(threads, [&] { return dse::cpu::effective_rank(x.array.tensor, center, true); });
  const auto& [ranks, saved, form] = a;
  same_bits(ranks, std::get<0>(b), "ranks");
  same_bits(saved, std::get<1>(b), "saved");
  const Rows rows = x.rows();
  bool plain = true, steep = false;
  for (int64_t p = 0; p < count; ++p) {
    const double ours = scalar(ranks, p);
    if (!group_finite(rows, p * n, n)) {
      require(std::isnan(ours), "rank is a number for features that are not finite");
      continue;
    }
    require(std::isfinite(ours) && ours >= 0.0 && ours <= static_cast<double>(std::min(n, d)) * (1.0 + 1e-6),
            "rank ", ours, " of a matrix of ", n, " x ", d);
    if (!x.moderate() || std::min(n, d) > 40) continue;
    std::vector<int64_t> members(static_cast<size_t>(n));
    std::iota(members.begin(), members.end(), p * n);
    double smallest = 1.0;
    const double expected = effective_rank(select(rows, members), center, &smallest);
    // Singular values near the rounding of the features: no value is right.
    if (smallest > 1e-10) near(ours, expected, value_tolerance(x.array.type), 0.0, "rank");
    plain = plain && smallest > 1e-6;
    steep = steep || smallest < 1e-2;
  }
  Array upstream({count}, ranks.scalar_type(), random, true);
  for (int64_t p = 0; p < count; ++p) store(upstream.type, random.normal(), upstream.at({p}));
  const auto [grad, again] = twice(threads, [&] {
    return dse::cpu::effective_rank_backward(upstream.tensor, x.array.tensor, saved, form, center);
  });
  same_bits(grad, again, "gradient of ranks");
  check_gradient(grad, x, 0.0, plain, "gradient of ranks", steep);
}

// Radii, separations and spread of rows with given labels, by their definitions.
struct Parts {
  double inter, image, batch, average;
};

double radius(const Rows& rows, const std::vector<int64_t>& members, bool paper, double* unsure) {
  const double spread = static_cast<double>(members.size() - 1);
  const double scale = paper ? 1.0 / spread : 1.0 / std::sqrt(std::max(spread, static_cast<double>(rows.d)));
  return scale * nuclear_norm(select(rows, members), unsure);
}

std::vector<std::vector<int64_t>> members_of(const Tensor& labels, int64_t first, int64_t n, int64_t k) {
  std::vector<std::vector<int64_t>> out(static_cast<size_t>(k));
  for (int64_t i = first; i < first + n; ++i) out[static_cast<size_t>(label(labels, i))].push_back(i);
  return out;
}

Parts measure(const Rows& x, int64_t images, int64_t positions, int64_t group, int64_t local_k, int64_t global_k,
              const Tensor& local, const Tensor& global, const Tensor& centroids, bool paper) {
  Parts out{0.0, 0.0, 0.0, 0.0};
  const Vector mean = mean_row(x);
  for (int64_t i = 0; i < x.n; ++i)
    out.average += distance(x.row(i), mean.data(), x.d) / static_cast<double>(x.n);
  double unsure = 0.0;
  int64_t images_counted = 0, batch_terms = 0, inter_terms = 0;
  for (int64_t b = 0; b < images; ++b) {
    double total = 0.0;
    int64_t terms = 0;
    for (const auto& members : members_of(local, b * positions, positions, local_k)) {
      if (members.size() < 2) continue;
      total += radius(x, members, paper, &unsure);
      ++terms;
    }
    if (terms == 0) continue;
    out.image += total / static_cast<double>(terms);
    ++images_counted;
  }
  for (int64_t g = 0; g * group < images; ++g) {
    const int64_t first = g * group * positions, n = std::min(group, images - g * group) * positions;
    const auto clusters = members_of(global, first, n, global_k);
    for (const auto& members : clusters) {
      if (members.size() < 2) continue;
      out.batch += radius(x, members, paper, &unsure);
      ++batch_terms;
    }
    std::vector<int64_t> present;
    for (int64_t c = 0; c < global_k; ++c)
      if (std::isfinite(scalar(centroids, (g * global_k + c) * x.d))) present.push_back(c);
    if (present.size() < 2) continue;
    double total = 0.0;
    for (const auto& members : clusters) {
      double squares = 0.0;
      for (const int64_t i : members) {
        double best = kInfinity;
        for (const int64_t c : present) {
          if (c == label(global, i)) continue;
          double square = 0.0;
          for (int64_t f = 0; f < x.d; ++f) {
            const double step = x.row(i)[f] - scalar(centroids, (g * global_k + c) * x.d + f);
            square += step * step;
          }
          best = std::min(best, square);
        }
        total += std::sqrt(best) / static_cast<double>(n);
        squares += best;
      }
      if (!paper || members.empty()) continue;
      out.inter += squares / static_cast<double>(members.size());
      ++inter_terms;
    }
    if (paper) continue;
    out.inter += total;
    ++inter_terms;
  }
  if (images_counted > 0) out.image /= static_cast<double>(images_counted);
  if (batch_terms > 0) out.batch /= static_cast<double>(batch_terms);
  if (inter_terms > 0) out.inter /= static_cast<double>(inter_terms);
  return out;
}

void try_dse(Random& random, const Threads& threads) {
  const int64_t images = random.size(12), positions = random.size(40), d = random.size(60);
  const Features z = random_features(random, images, positions, d);
  const Array seed = seed_tensor(random);
  const char* variants[] = {"regularizer", "evaluation", "paper"};
  const std::string variant = variants[random.below(3)];
  const bool normalize = random.chance(0.6), paper = variant == "paper";
  const int64_t local_k = random.size(6), global_k = random.size(26), group = random.size(10);
  std::optional<Array> local, global;
  std::optional<Tensor> local_tensor, global_tensor, centroid_tensor;
  if (random.chance(0.3)) local_tensor = local.emplace(random_labels(random, images, positions, local_k)).tensor;
  if (random.chance(0.3))
    global_tensor = global.emplace(random_labels(random, images, positions, global_k)).tensor;
  const int64_t group_images = std::min(group, images), groups = (images + group_images - 1) / group_images;
  std::optional<Array> given;
  if (random.chance(0.2)) {
    given.emplace(std::vector<int64_t>{groups, global_k, d}, kTypes[random.below(4)], random, true);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < global_k; ++c)
        for (int64_t f = 0; f < d; ++f)
          store(given->type, random.normal() * (normalize ? 0.3 : 1.0), given->at({g, c, f}));
    centroid_tensor = given->tensor;
  }
  const auto call = [&](bool save) {
    return dse::cpu::dse_components(z.array.tensor, seed.tensor, variant, local_k, global_k, group, normalize, 12,
                                    1e-4, local_tensor, global_tensor, centroid_tensor, save);
  };
  const auto [a, b] = twice(threads, [&] { return call(true); });
  const auto& [inter, image, batch, rank, average, local_labels, global_labels, centroids, saved_local,
               saved_global, saved_dim, saved_rows, saved_index] = a;
  const Tensor* components[] = {&inter, &image, &batch, &rank, &average};
  const Tensor* others[] = {&std::get<0>(b), &std::get<1>(b), &std::get<2>(b), &std::get<3>(b), &std::get<4>(b)};
  for (int i = 0; i < 5; ++i) same_bits(*components[i], *others[i], "component");
  same_bits(local_labels, std::get<5>(b), "local labels");
  same_bits(global_labels, std::get<6>(b), "global labels");
  same_bits(saved_rows, std::get<11>(b), "saved rows");
  const auto unsaved = call(false);
  same_bits(inter, std::get<0>(unsaved), "m_inter without a gradient");
  same_bits(image, std::get<1>(unsaved), "m_intra_image without a gradient");

  const int64_t local_found = local ? local_k : std::min(local_k, positions);
  const int64_t global_found = centroids.size(1);
  for (int64_t i = 0; i < images * positions; ++i) {
    require(label(local_labels, i) >= 0 && label(local_labels, i) < local_found, "local label out of range");
    require(label(global_labels, i) >= 0 && label(global_labels, i) < global_found, "global label out of range");
  }
  for (const Tensor* component : components) {
    const double value = scalar(*component);
    if (!z.finite) require(std::isnan(value), "component is a number for features that are not finite");
    else require((std::isfinite(value) && value >= 0.0) || (!z.moderate() && !normalize), "component is ", value);
  }

  // avg_norm of unit rows that differ by rounding alone is rounding, and what is divided by it too.
  Rows x = z.rows();
  if (z.finite && z.moderate()) {
    if (normalize) {
      for (int64_t i = 0; i < x.n; ++i) {
        const double norm = std::max(std::sqrt(dot(x.row(i), x.row(i), d)), 1e-12);
        for (int64_t f = 0; f < d; ++f) x.row(i)[f] /= norm;
      }
    }
    const Parts parts = measure(x, images, positions, group_images, local_found, global_found, local_labels,
                                global_labels, centroids, paper);
    const double size = root_mean_square(x), limit = value_tolerance(z.array.type);
    near(scalar(average), parts.average, limit, 1e-13 * size, "avg_norm");
    if (parts.average > 1e-9 * size) {
      const double unit = paper ? 1.0 : 1.0 / parts.average, rounding = 1e-11 * size * unit;
      near(scalar(image), parts.image * unit, limit, rounding, "m_intra_image");
      near(scalar(batch), parts.batch * unit, limit, rounding, "m_intra_batch");
      // The nearest centroid is found by squares, whose rounding is that of the rows' squares.
      const double squares = 1e-14 * size * size;
      near(scalar(inter), parts.inter * unit, limit,
           paper ? squares : squares / std::max(parts.inter, 1e-7 * size) * unit, "m_inter");
    }
    if (variant != "evaluation" && std::min(x.n, d) <= 24) {
      double smallest = 1.0;
      double expected = effective_rank(x, false, &smallest);
      if (!paper) expected /= static_cast<double>(std::min(x.n, d));
      if (smallest > 1e-10) near(scalar(rank), expected, limit, 0.0, "m_dim");
    }
  }

  const bool distances = random.chance(0.5);
  double weights[5];
  Array upstream({5}, random.chance(0.5) ? inter.scalar_type() : ScalarType::Double, random, true);
  for (int64_t i = 0; i < 5; ++i)
    store(upstream.type, i == 0 && !distances ? 0.0 : random.normal(), upstream.at({i}));
  for (int64_t i = 0; i < 5; ++i) weights[i] = fetch(upstream.type, upstream.at({i}));
  const auto [grad, again] = twice(threads, [&] {
    return dse::cpu::dse_components_backward(upstream.tensor, z.array.tensor, local_labels, global_labels,
                                             centroids, saved_local, saved_global, saved_dim, saved_rows,
                                             saved_index, variant, local_found, group, normalize);
  });
  same_bits(grad, again, "gradient");
  if (!z.finite) all_nan(grad, "gradient");
  // Of lengths, radii and avg_norm have degree 1; divided by avg_norm, 0; the rank has 0; normalized features
  // leave nothing. Centroids are constants: distances to them are not homogeneous.
  double expected = 0.0;
  const bool homogeneous = normalize || weights[0] == 0.0;
  if (!normalize)
    expected =
        weights[4] * scalar(average) + (paper ? weights[1] * scalar(image) + weights[2] * scalar(batch) : 0.0);
  check_gradient(grad, z, expected, homogeneous, "gradient");
}

// Calls that have to be refused.
void try_refusals(Random& random, const Threads& threads) {
  set_threads(threads.first);
  const int64_t b = random.size(4), n = random.size(9), d = random.size(9), k = random.size(5);
  const Features x = random_features(random, b, n, d);
  Array labels = random_labels(random, b, n, k);
  const Array seed = seed_tensor(random);
  const int64_t wrong[] = {-1, k, std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
  const int64_t bad = wrong[random.below(4)];
  std::memcpy(labels.at({random.below(b), random.below(n)}), &bad, 8);
  const auto refused = [](const char* what, const auto& call) {
    try {
      call();
    } catch (const std::runtime_error& error) {
      require(std::string(error.what()).size() > 10, what, " is refused without a reason");
      return;
    }
    fail(std::string(what) + " is accepted");
  };
  refused("a label out of range",
          [&] { dse::cpu::cluster_nuclear_norms(x.array.tensor, labels.tensor, k, true); });
  refused("a local label out of range", [&] {
    dse::cpu::dse_components(x.array.tensor, seed.tensor, "paper", k, k, 1, true, 5, 1e-4, labels.tensor, {}, {},
                             true);
  });
  refused("a global label out of range", [&] {
    dse::cpu::dse_components(x.array.tensor, seed.tensor, "paper", k, k, 1, true, 5, 1e-4, {}, labels.tensor, {},
                             true);
  });
  refused("no clusters", [&] { dse::cpu::kmeans_op(x.array.tensor, -random.below(3), seed.tensor, 5, 1e-4); });
  refused("a seed of many numbers", [&] {
    dse::cpu::kmeans_op(x.array.tensor, 1, Array({2}, ScalarType::Long, random, false).tensor, 5, 1e-4);
  });
}

// Phases of a crew: every part once, none before the phase begins or after it ends, and the main thread's error
// is the caller's.
void try_crew(Random& random, const Threads& threads) {
  using dse::cpu::Crew;
  set_threads(static_cast<int>(random.chance(0.2) ? threads.first : threads.second));
  const int64_t phases = random.between(1, 200), fails_at = random.chance(0.2) ? random.below(phases) : phases;
  int64_t done[Crew::kParts] = {}, sum = 0, expected = 0;  // plain: a phase's end is what makes them visible
  bool thrown = false;
  try {
    Crew::gather(random.chance(0.2) ? 0 : int64_t{1} << 30, [&](Crew& crew) {
      for (int64_t phase = 0; phase < phases; ++phase) {
        if (phase == fails_at) throw std::runtime_error("on purpose");
        const int64_t delay = random.below(50);
        crew.run([&](int64_t part) {
          volatile int64_t spent = 0;
          for (int64_t i = 0; i < delay * part; ++i) spent = spent + 1;
          done[part] += phase + part;
        });
        for (int64_t part = 0; part < Crew::kParts; ++part) {
          sum += done[part];
          done[part] = 0;
          expected += phase + part;
        }
      }
    });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  require(thrown == (fails_at < phases), "a crew loses its main thread's error");
  require(sum == expected, "a crew's phases leave ", sum, " instead of ", expected);
}

using Try = void (*)(Random&, const Threads&);
constexpr Try kTries[] = {try_dse,      try_dse, try_kmeans, try_nuclear_norms, try_effective_rank,
                          try_refusals, try_crew};
constexpr int64_t kKinds = sizeof(kTries) / sizeof(kTries[0]);

bool run_case(uint64_t seed, int64_t number) {
  Random mixer(seed ^ (static_cast<uint64_t>(number) * 0xD6E8FEB86659FD93u));
  Random random(mixer.bits());
  const Threads threads{static_cast<int>(random.between(1, 4)), static_cast<int>(random.between(2, 4))};
  const int64_t kind = number % kKinds;
  try {
    kTries[kind](random, threads);
  } catch (const std::exception& error) {
    std::printf("FAILED --seed %llu --case %lld (operator %lld): %s\n", static_cast<unsigned long long>(seed),
                static_cast<long long>(number), static_cast<long long>(kind), error.what());
    return false;
  }
  return true;
}

// Faults made on purpose, in the project's own buffers and tasks: a sanitizer that misses them watches nothing.
int plant_fault(const std::string& fault) {
  dse::cpu::Buffer<double> buffer(10);
  std::fill_n(buffer.data(), 10, 1.0);
  volatile int64_t index = 10;
  if (fault == "overrun") return buffer[index] > 0.0 ? 0 : 1;
  if (fault == "overflow") {
    index = std::numeric_limits<int64_t>::max();
    const int64_t next = index + 1;
    return next < 0 ? 0 : 1;
  }
  if (fault == "race") {
    set_threads(2);
    dse::cpu::for_each_task(1000, int64_t{1} << 30, [&](int64_t task, int64_t) {
      volatile double* cell = buffer.data();
      for (int i = 0; i < 1000; ++i) *cell = static_cast<double>(task);
    });
    return 0;
  }
  std::fprintf(stderr, "unknown fault %s\n", fault.c_str());
  return 2;
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  double seconds = 20.0;
  uint64_t seed = 0;
  int64_t only = -1, most = std::numeric_limits<int64_t>::max();
  std::string plant;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--seconds") seconds = std::atof(argv[i + 1]);
    else if (name == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    else if (name == "--plant") plant = argv[i + 1];
    else if (name == "--case") only = std::atoll(argv[i + 1]);
    else if (name == "--cases") most = std::atoll(argv[i + 1]);
    else return std::fprintf(stderr, "unknown option %s\n", argv[i]), 2;
  }
  if (!plant.empty()) return fuzz::plant_fault(plant);
  if (only >= 0) return fuzz::run_case(seed, only) ? 0 : 1;
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0.0;
  int64_t cases = 0, failed = 0;
  while (elapsed < seconds && cases < most && failed < 10) {
    failed += fuzz::run_case(seed, cases++) ? 0 : 1;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  std::printf("%lld cases in %.1f seconds, %lld failed\n", static_cast<long long>(cases), elapsed,
              static_cast<long long>(failed));
  return failed == 0 ? 0 : 1;
}
