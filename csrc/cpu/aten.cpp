#include "cpu/aten.h"

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

// MKL blocks its factorizations by the number of threads that it might use, even where it then uses one. Torch
// exports this switch of the MKL inside it; where torch has another LAPACK the weak symbol is null.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace dse::cpu {
namespace {

// Within its scope MKL uses one thread, and the result of a call does not depend on torch.set_num_threads.
// Parallelism is this library's own: tasks of a fixed size.
class SerialMath {
 public:
  SerialMath() {
    if (MKL_Set_Num_Threads_Local != nullptr) previous_ = MKL_Set_Num_Threads_Local(1);
  }
  ~SerialMath() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(previous_);
  }
  SerialMath(const SerialMath&) = delete;
  SerialMath& operator=(const SerialMath&) = delete;

 private:
  int previous_ = 0;
};

using torch::headeronly::ScalarType;
using torch::stable::detail::from;
using torch::stable::detail::to;

const torch::stable::Device& cpu_device() {
  static const torch::stable::Device device(torch::headeronly::DeviceType::CPU);
  return device;
}

Tensor wrap(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
            ScalarType type) {
  const std::array<int64_t, 2> sizes{rows, cols};
  const std::array<int64_t, 2> strides{row_stride, col_stride};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.data(), 2}, {strides.data(), 2}, cpu_device(),
                                  type);
}

void matmul_out(const Matrix& a, const Matrix& b, void* out, int64_t ldo, ScalarType type) {
  const SerialMath serial;
  const Tensor ta = wrap(a.data, a.rows, a.cols, a.row_stride, a.col_stride, type);
  const Tensor tb = wrap(b.data, b.rows, b.cols, b.row_stride, b.col_stride, type);
  const Tensor tout = wrap(out, a.rows, b.cols, ldo, 1, type);
  std::array<StableIValue, 3> stack{from(ta), from(tb), from(tout)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // takes ownership of the returned handle
}

// Copies t (rows x cols, any strides) into a row-major array.
void copy_out(const Tensor& t, double* dst) {
  const int64_t rows = t.size(0), cols = t.size(1), rs = t.stride(0), cs = t.stride(1);
  const auto* src = static_cast<const double*>(t.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) dst[i * cols + j] = src[i * rs + j * cs];
}

template <typename S>
void copy_vector(const Tensor& t, double* dst) {
  const auto* src = static_cast<const S*>(t.const_data_ptr());
  const int64_t n = t.size(0), stride = t.stride(0);
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<double>(src[i * stride]);
}

}  // namespace

void matmul(const float*, const Matrix& a, const Matrix& b, float* out, int64_t ldo) {
  matmul_out(a, b, out, ldo, ScalarType::Float);
}

void matmul(const double*, const Matrix& a, const Matrix& b, double* out, int64_t ldo) {
  matmul_out(a, b, out, ldo, ScalarType::Double);
}

bool is_positive_definite(const float* g, int64_t n, int64_t ld) {
  const SerialMath serial;
  const Tensor matrix = wrap(g, n, n, ld, 1, ScalarType::Float);
  std::array<StableIValue, 3> stack{from(matrix), from(false), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linalg_cholesky_ex", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor factor = to<Tensor>(stack[0]);
  const Tensor info = to<Tensor>(stack[1]);
  return *static_cast<const int32_t*>(info.const_data_ptr()) == 0;
}

void thin_svd(const double* a, int64_t m, int64_t n, int64_t ld, double* u, double* s, double* vh) {
  const SerialMath serial;
  const Tensor matrix = wrap(a, m, n, ld, 1, ScalarType::Double);
  std::array<StableIValue, 3> stack{from(matrix), from(false), from(std::optional<std::string>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_svd", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor tu = to<Tensor>(stack[0]);
  const Tensor ts = to<Tensor>(stack[1]);
  const Tensor tv = to<Tensor>(stack[2]);
  if (u != nullptr) copy_out(tu, u);
  copy_vector<double>(ts, s);
  if (vh != nullptr) copy_out(tv, vh);
}

void qr_triangle(const double* a, int64_t m, int64_t n, int64_t ld, double* r) {
  const SerialMath serial;
  const Tensor matrix = wrap(a, m, n, ld, 1, ScalarType::Double);
  std::array<StableIValue, 2> stack{from(matrix), from(std::string("r"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_qr", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor q = to<Tensor>(stack[0]);
  copy_out(to<Tensor>(stack[1]), r);
}

}  // namespace dse::cpu
