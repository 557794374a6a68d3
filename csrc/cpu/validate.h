// Checks of an operator's arguments; every message names the argument, what was given and what is accepted.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace dse::cpu {

template <typename... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const torch::stable::Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i > 0 ? ", " : "") << t.size(i);
  out << ')';
  return out.str();
}

inline void require_cpu(const torch::stable::Tensor& t, const char* argument) {
  if (!t.is_cpu()) reject(argument, " must be on the CPU, the device of the features.");
}

inline void require_three_axes(const torch::stable::Tensor& t, const char* argument, const char* axes) {
  if (t.dim() != 3) reject(argument, " must have shape ", axes, ", got ", shape_of(t), ".");
  if (t.numel() == 0) reject(argument, " must have no empty axis, got shape ", shape_of(t), ".");
}

inline void require_features(const torch::stable::Tensor& t, const char* argument, const char* axes) {
  require_cpu(t, argument);
  require_three_axes(t, argument, axes);
}

inline void require_at_least(int64_t value, int64_t least, const char* argument) {
  if (value < least) reject(argument, " must be >= ", least, ", got ", value, ".");
}

inline void require_label_shape(const torch::stable::Tensor& t, int64_t rows, int64_t columns,
                                const char* argument) {
  if (t.scalar_type() != torch::headeronly::ScalarType::Long) reject(argument, " must be an int64 tensor.");
  if (t.dim() != 2 || t.size(0) != rows || t.size(1) != columns) {
    reject(argument, " must have shape (", rows, ", ", columns, "), got ", shape_of(t), ".");
  }
}

// An int64 tensor of the given shape with entries in [0, k).
inline void require_labels(const torch::stable::Tensor& t, int64_t rows, int64_t columns, int64_t k,
                           const char* argument) {
  require_cpu(t, argument);
  require_label_shape(t, rows, columns, argument);
  const auto* data = static_cast<const int64_t*>(t.const_data_ptr());
  const int64_t s0 = t.stride(0), s1 = t.stride(1);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t label = data[i * s0 + j * s1];
      if (label < 0 || label >= k) {
        reject(argument, " must lie in [0, ", k, "), got ", label, " at (", i, ", ", j, ").");
      }
    }
  }
}

// The one int64 of a seed tensor.
inline void require_seed(const torch::stable::Tensor& seed) {
  if (seed.scalar_type() != torch::headeronly::ScalarType::Long || seed.numel() != 1) {
    reject("seed must be an int64 tensor of one element, got shape ", shape_of(seed), ".");
  }
}

inline uint64_t seed_value(const torch::stable::Tensor& seed) {
  require_cpu(seed, "seed");
  require_seed(seed);
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

}  // namespace dse::cpu
