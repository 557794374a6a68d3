#include "cpu/features.h"

#include <stdexcept>

namespace dse::cpu {

DType dtype_of(const torch::stable::Tensor& t, const char* argument) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      throw std::runtime_error(std::string(argument) +
                               " must be a float64, float32, bfloat16 or float16 tensor.");
  }
}

Features Features::of(const torch::stable::Tensor& t, const char* argument) {
  Features f;
  f.data = static_cast<const char*>(t.const_data_ptr());
  f.dtype = dtype_of(t, argument);
  f.element_size = static_cast<int64_t>(t.element_size());
  f.outer = t.size(0);
  f.inner = t.size(1);
  f.dim = t.size(2);
  f.stride_outer = t.stride(0);
  f.stride_inner = t.stride(1);
  f.stride_dim = t.stride(2);
  return f;
}

}  // namespace dse::cpu
