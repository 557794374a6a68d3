// What is computed: the definitions that every backend shares. No torch, no device code, no allocation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "common/portability.h"

namespace dse {

// The three published definitions of DSE; docs/definitions.md sets them side by side.
enum class Variant : int { kRegularizer = 0, kEvaluation = 1, kPaper = 2 };

inline bool parse_variant(std::string_view name, Variant* out) {
  if (name == "regularizer") *out = Variant::kRegularizer;
  else if (name == "evaluation") *out = Variant::kEvaluation;
  else if (name == "paper") *out = Variant::kPaper;
  else return false;
  return true;
}

// A batch of B images with N positions of d features, cut into groups of consecutive images for the global
// clusters. The last group may be smaller.
struct Problem {
  int64_t images = 0;        // B
  int64_t positions = 0;     // N
  int64_t dim = 0;           // d
  int64_t group_images = 1;  // images in a full group
  int64_t local_clusters = 1;
  int64_t global_clusters = 1;
  Variant variant = Variant::kRegularizer;
  bool normalize = true;

  int64_t rows() const { return images * positions; }
  int64_t groups() const { return (images + group_images - 1) / group_images; }
  int64_t group_begin(int64_t g) const { return g * group_images * positions; }
  int64_t group_end(int64_t g) const { return std::min((g + 1) * group_images, images) * positions; }
};

// Scale s(n, d) of a cluster's nuclear norm, n >= 2.
DSE_HOST_DEVICE inline double radius_scale(Variant variant, int64_t n, int64_t d) {
  const double spread = static_cast<double>(n - 1);
  if (variant == Variant::kPaper) return 1.0 / spread;
  return 1.0 / std::sqrt(spread > static_cast<double>(d) ? spread : static_cast<double>(d));
}

// Divisor that every variant but the paper's applies to the two distances: avg_norm.
DSE_HOST_DEVICE inline bool divides_by_avg_norm(Variant variant) { return variant != Variant::kPaper; }

// F.normalize's floor for a row norm.
inline constexpr double kNormFloor = 1e-12;

// What a saved_* slot holds for one matrix, see common/spectral.h.
enum class SavedForm : int64_t {
  kNone = 0,
  kGramSide = 1,
  kPolar = 2,
  // kGramSide on the CPU: for a product with the rows as their 16-bit rounding has them; in 16 bits; and both.
  kRoundedGramSide = 3,
  kShortGramSide = 4,
  kRoundedShortGramSide = 5
};

}  // namespace dse
