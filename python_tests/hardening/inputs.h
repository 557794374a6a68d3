// Random inputs: a counter-based generator, tensors over memory of exactly their extent, and features of many
// kinds in every dtype and layout.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "reference.h"

namespace fuzz {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    state_ += 0x9E3779B97F4A7C15u;
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  bool chance(double p) { return uniform() < p; }
  double normal() {
    return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(6.283185307179586 * uniform());
  }
  // Mostly small, now and then near `most`.
  int64_t size(int64_t most) {
    return std::clamp<int64_t>(static_cast<int64_t>(std::pow(static_cast<double>(most), uniform()) + 0.5), 1,
                               most);
  }

 private:
  uint64_t state_;
};

inline int64_t bytes_of(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Long ? 8 : type == ScalarType::Float ? 4 : 2;
}

inline void store(ScalarType type, double value, char* to) {
  if (type == ScalarType::Double) std::memcpy(to, &value, 8);
  if (type == ScalarType::Float) {
    const auto narrow = static_cast<float>(value);
    std::memcpy(to, &narrow, 4);
  }
  if (type == ScalarType::BFloat16) {
    const torch::headeronly::BFloat16 narrow(static_cast<float>(value));
    std::memcpy(to, &narrow, 2);
  }
  if (type == ScalarType::Half) {
    const torch::headeronly::Half narrow(static_cast<float>(value));
    std::memcpy(to, &narrow, 2);
  }
  if (type == ScalarType::Long) {
    const auto whole = static_cast<int64_t>(value);
    std::memcpy(to, &whole, 8);
  }
}

inline double fetch(ScalarType type, const char* from) {
  if (type == ScalarType::Double) {
    double value;
    std::memcpy(&value, from, 8);
    return value;
  }
  if (type == ScalarType::Float) {
    float value;
    std::memcpy(&value, from, 4);
    return static_cast<double>(value);
  }
  if (type == ScalarType::BFloat16) {
    torch::headeronly::BFloat16 value;
    std::memcpy(&value, from, 2);
    return static_cast<double>(static_cast<float>(value));
  }
  if (type == ScalarType::Half) {
    torch::headeronly::Half value;
    std::memcpy(&value, from, 2);
    return static_cast<double>(static_cast<float>(value));
  }
  int64_t value;
  std::memcpy(&value, from, 8);
  return static_cast<double>(value);
}

// A tensor of random strides over memory of its own that ends where its last element ends.
struct Array {
  std::vector<int64_t> shape, strides;
  ScalarType type;
  std::unique_ptr<char[]> memory;
  Tensor tensor;

  Array(std::vector<int64_t> sizes, ScalarType element, Random& random, bool may_expand)
      : shape(sizes), type(element) {
    strides.resize(shape.size());
    std::vector<size_t> order(shape.size());
    std::iota(order.begin(), order.end(), size_t{0});
    const bool plain = random.chance(0.4);
    if (!plain)
      for (size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
    int64_t step = plain ? 1 : random.between(1, 2), extent = 1;
    for (size_t i = order.size(); i-- > 0;) {
      const size_t axis = order[i];
      if (may_expand && !plain && random.chance(0.08)) {
        strides[axis] = 0;
        continue;
      }
      strides[axis] = step;
      extent += (shape[axis] - 1) * step;
      step = (step * shape[axis]) + (plain ? 0 : random.between(0, 3));
    }
    memory = std::make_unique<char[]>(static_cast<size_t>(extent * bytes_of(type)));
    // Zero dimensions have no strides to point at.
    tensor =
        torch::stable::from_blob(memory.get(), {shape.data(), shape.size()}, {strides.data(), strides.size()},
                                 torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
  }
  char* at(std::initializer_list<int64_t> index) const {
    int64_t offset = 0;
    size_t axis = 0;
    for (const int64_t i : index) offset += i * strides[axis++];
    return memory.get() + offset * bytes_of(type);
  }
};

inline const ScalarType kTypes[] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16,
                                    ScalarType::Half};

enum class Kind {
  kClusters,
  kNormal,
  kEqual,
  kZero,
  kSparse,
  kGrid,
  kRankOne,
  kOutlier,
  kNearlyEqual,
  kSteep,
  kCount
};

struct Features {
  Array array;
  Kind kind;
  double scale;
  bool finite;

  double value(int64_t b, int64_t i, int64_t f) const { return fetch(array.type, array.at({b, i, f})); }
  // What the kernels see, rounded to the dtype.
  Rows rows() const {
    const int64_t n = array.shape[1], d = array.shape[2];
    Rows out(array.shape[0] * n, d);
    for (int64_t i = 0; i < out.n; ++i)
      for (int64_t f = 0; f < d; ++f) out.row(i)[f] = value(i / n, i % n, f);
    return out;
  }
  // Within the range in which gradients, which go with 1 / scale, have room in the dtype.
  bool moderate() const { return scale > 1e-3 && scale < 1e3; }
};

inline double random_scale(Random& random, ScalarType type) {
  if (random.chance(0.75)) return 1.0;
  // Up to near the largest and down to subnormal numbers of the dtype.
  const double least = type == ScalarType::Half ? 1e-7 : type == ScalarType::Double ? 1e-150 : 1e-42;
  const double most = type == ScalarType::Half ? 8e3 : type == ScalarType::Double ? 1e120 : 1e36;
  return std::exp(std::log(least) + random.uniform() * (std::log(most) - std::log(least)));
}

inline Features random_features(Random& random, int64_t b, int64_t n, int64_t d) {
  const ScalarType type = kTypes[random.below(4)];
  Features out{Array({b, n, d}, type, random, true),
               static_cast<Kind>(random.below(static_cast<int64_t>(Kind::kCount))), random_scale(random, type),
               true};
  Vector direction(static_cast<size_t>(d));
  for (double& value : direction) value = random.normal();
  Rows means(4, d);
  for (double& value : means.data) value = 2.0 * random.normal();
  for (int64_t image = 0; image < b; ++image) {
    for (int64_t i = 0; i < n; ++i) {
      const double along = random.normal();
      const int64_t cluster = random.below(4);
      const bool dead = random.chance(0.3), outlier = image == b - 1 && i == n - 1;
      for (int64_t f = 0; f < d; ++f) {
        const double noise = random.normal(), own = direction[static_cast<size_t>(f)];
        double value = 0.0;
        switch (out.kind) {
          case Kind::kClusters: value = means.row(cluster)[f] + 0.3 * noise; break;
          case Kind::kNormal: value = noise; break;
          case Kind::kEqual: value = own; break;
          case Kind::kZero: value = 0.0; break;
          case Kind::kSparse: value = dead || f % 3 == 0 ? 0.0 : noise; break;
          case Kind::kGrid: value = std::round(noise); break;
          case Kind::kRankOne: value = along * own; break;
          case Kind::kOutlier: value = outlier ? 1000.0 * noise : own + 0.1 * noise; break;
          case Kind::kNearlyEqual: value = own + 1e-3 * noise; break;
          case Kind::kSteep: value = noise * std::exp2(-static_cast<double>(f % 24)); break;
          case Kind::kCount: break;
        }
        store(type, value * out.scale, out.array.at({image, i, f}));
      }
    }
  }
  if (random.chance(0.06)) {
    const double bad[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                          -std::numeric_limits<double>::infinity()};
    store(type, bad[random.below(3)], out.array.at({random.below(b), random.below(n), random.below(d)}));
  }
  for (const double value : out.rows().data) out.finite = out.finite && std::isfinite(value);
  return out;
}

inline Array random_labels(Random& random, int64_t b, int64_t n, int64_t k) {
  Array out({b, n}, ScalarType::Long, random, true);
  const bool few = random.chance(0.3);
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = 0; j < n; ++j)
      store(out.type, static_cast<double>(random.below(few ? std::min<int64_t>(k, 2) : k)), out.at({i, j}));
  return out;
}

}  // namespace fuzz
