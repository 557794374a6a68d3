// What the CUDA operators' host code shares: the stream and the limits of the device, working memory, views of
// tensors, and checks of arguments.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/validate.h"
#include "cuda/device.cuh"
#include "cuda/features.cuh"
#include "cuda/heuristics.h"

namespace dse::cuda {

using cpu::reject;
using cpu::shape_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// On the device of the features; `t` may be the features themselves.
inline void require_device(const Tensor& t, const Tensor& features, const char* argument) {
#ifndef DSE_CUDA_EMULATION
  if (!features.is_cuda() && Recording::current() == nullptr) {
    reject("the features must be on a CUDA device if any other argument is.");
  }
#endif
  if (t.is_cpu() != features.is_cpu() || t.get_device_index() != features.get_device_index()) {
    reject(argument, " must be on the device of the features.");
  }
}

// Tensors of a call that is recorded have no memory (they are on torch's meta device).
template <class T>
T* data_of(const Tensor& t) {
  return Recording::current() != nullptr ? nullptr : static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* const_data_of(const Tensor& t) {
  return Recording::current() != nullptr ? nullptr : static_cast<const T*>(t.const_data_ptr());
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

// The device and the current stream of one call; memory that it borrows goes back to torch's allocator at the
// end, in the order of the stream.
class Call {
 public:
  explicit Call(const Tensor& features) : like_(features) {
    part_bytes_ = part_bytes(features.numel() * static_cast<int64_t>(features.element_size()));
    if (const Recording* r = Recording::current(); r != nullptr) {
      multiprocessors = r->multiprocessors;
      shared_limit = r->shared_limit;
      return;
    }
#ifdef DSE_CUDA_EMULATION
    multiprocessors = 2;
    shared_limit = size_t{227} << 10;
#else
    const int32_t device = features.get_device_index();
    guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(device);
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    shared_limit = static_cast<size_t>(bytes);
#endif
  }

  // `count` elements, 256-byte aligned.
  template <class T>
  T* borrow(int64_t count) {
    constexpr int64_t kAlign = 256;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)) + kAlign;
    if (Recording* r = Recording::current(); r != nullptr) {
      r->hold(bytes);
      return nullptr;
    }
    borrowed_.push_back(empty(like_, {bytes}, ScalarType::Byte));
    const auto at = reinterpret_cast<uintptr_t>(borrowed_.back().mutable_data_ptr());
    return reinterpret_cast<T*>((at + kAlign - 1) / kAlign * kAlign);
  }
  void* borrow_bytes(int64_t bytes) { return borrow<unsigned char>(bytes); }

  // What is borrowed while it lives goes back at its end: later work on the stream may take it over.
  class Scope {
   public:
    explicit Scope(Call& call) : call_(call), borrowed_(call.borrowed_.size()), held_(held()) {}
    ~Scope() {
      call_.borrowed_.resize(borrowed_, call_.like_);
      if (Recording* r = Recording::current(); r != nullptr) r->held = held_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    static int64_t held() { return Recording::current() != nullptr ? Recording::current()->held : 0; }

    Call& call_;
    size_t borrowed_;
    int64_t held_;
  };

  // A tensor of working memory.
  Tensor temporary(std::vector<int64_t> shape, ScalarType type) {
    const Tensor t = empty(like_, std::move(shape), type);
    if (Recording* r = Recording::current(); r != nullptr) {
      r->hold(t.numel() * static_cast<int64_t>(t.element_size()));
    }
    return t;
  }

  // How many of `count` items, with working memory of `bytes` each, are taken at a time.
  int64_t part_of(int64_t count, int64_t bytes) const {
    return std::clamp<int64_t>(part_bytes_ / std::max<int64_t>(bytes, 1), 1, std::max<int64_t>(count, 1));
  }

  // About how much working memory a call takes at a time, in bytes.
  int64_t budget() const { return part_bytes_; }

  void clear(void* at, int64_t bytes) const {
    if (bytes == 0 || recorded("clear memory")) return;
    check(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
  }
  void copy(void* to, const void* from, int64_t bytes) const {
    if (bytes == 0 || recorded("copy memory")) return;
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync");
  }

  cudaStream_t stream = nullptr;
  int multiprocessors = 0;
  size_t shared_limit = 0;

 private:
  Tensor like_;
  int64_t part_bytes_ = 0;
  std::vector<Tensor> borrowed_;
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
};

template <class S>
FeatureView<S> view_of(const Tensor& t) {
  return {const_data_of<S>(t), t.size(0), t.size(1), t.size(2), t.stride(0), t.stride(1), t.stride(2), nullptr};
}

// Element of the features on the device, and the type of what is computed from them.
template <class S>
struct Types {
  using Feature = S;
  using Real = std::conditional_t<sizeof(S) == 8, double, float>;
};
template <class C>
inline constexpr ScalarType kRealType = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;

template <class Body>
auto with_types(const Tensor& t, const char* argument, const Body& body) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return body(Types<double>{});
    case ScalarType::Float: return body(Types<float>{});
    case ScalarType::BFloat16: return body(Types<__nv_bfloat16>{});
    case ScalarType::Half: return body(Types<__half>{});
    default: reject(argument, " must be a float64, float32, bfloat16 or float16 tensor.");
  }
}

// out = a b, matrices or batches of them, by torch's library.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (recorded("library: matrix product")) return;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  const char* name = a.dim() == 2 ? "aten::mm" : "aten::bmm";
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  static_cast<void>(torch::stable::detail::to<Tensor>(stack[0]));  // out again: its reference is ours to drop
}

// A tensor's numbers in another type, without gaps.
inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  const Tensor cast = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}

inline const int64_t* seed_of(const Tensor& seed, const Tensor& features) {
  require_device(seed, features, "seed");
  cpu::require_seed(seed);
  return const_data_of<int64_t>(seed);
}

}  // namespace dse::cuda
