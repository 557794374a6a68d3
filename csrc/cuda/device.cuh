// What every kernel family builds on: launches, warp and block primitives, float64 tensor-core products and
// conversions. Real CUDA under nvcc; with DSE_CUDA_EMULATION the same sources run on the CPU (tests).
//
// All sums have an order that the problem alone fixes: equal inputs give equal bits.
#pragma once

#ifdef DSE_CUDA_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/recording.h"

namespace dse::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// A kernel and its name in the source.
template <class... P>
struct Kernel {
  void (*function)(P...);
  const char* name;
};
template <class... P>
Kernel<P...> named_kernel(void (*function)(P...), const char* name) {
  return {function, name};
}
#define DSE_KERNEL(...) ::dse::cuda::named_kernel((__VA_ARGS__), #__VA_ARGS__)

// Queues the kernel on the stream and returns. An empty grid is no launch.
template <class... P, class... A>
void launch(const Kernel<P...>& kernel, const Launch& where, A&&... arguments) {
  if (where.grid.x == 0 || where.grid.y == 0 || where.grid.z == 0) return;
  if (Recording* r = Recording::current(); r != nullptr) {
    r->steps.push_back(
        {kernel.name, {where.grid.x, where.grid.y, where.grid.z}, where.block.x, where.shared_bytes});
    return;
  }
#ifdef DSE_CUDA_EMULATION
  dse::emulation::run_grid(where.grid, where.block, where.shared_bytes, [&] { kernel.function(arguments...); });
#else
  // Above 48 KB, static shared memory included, a kernel has to opt in.
  constexpr size_t kWithoutAsking = 32 << 10;
  if (where.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.function),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(where.shared_bytes)),
          "cudaFuncSetAttribute");
  }
  kernel.function<<<where.grid, where.block, where.shared_bytes, where.stream>>>(std::forward<A>(arguments)...);
  check(cudaGetLastError(), "kernel launch");
#endif
}

// The launch's shared_bytes, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef DSE_CUDA_EMULATION
  return dse::emulation::machine().shared;
#else
  extern __shared__ __align__(16) unsigned char dse_dynamic_shared[];
  return dse_dynamic_shared;
#endif
}

#ifdef DSE_CUDA_EMULATION
inline void block_sync(std::source_location where = std::source_location::current()) { __syncthreads(where); }
inline void warp_sync(std::source_location where = std::source_location::current()) {
  __syncwarp(kAllLanes, where);
}
// Whether any thread of the block says yes; a barrier.
inline bool block_any(bool yes, std::source_location where = std::source_location::current()) {
  return __syncthreads_or(yes ? 1 : 0, where) != 0;
}
#else
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ bool block_any(bool yes) { return __syncthreads_or(yes ? 1 : 0) != 0; }
#endif

// Thread within the block (1-d blocks), lane within the warp, warp within the block.
__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int block_warps() { return static_cast<int>(blockDim.x) / kWarp; }

// Exchanges within a warp; every lane takes part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T value, unsigned delta) {
  return __shfl_down_sync(kAllLanes, value, delta);
}
template <class T>
__device__ __forceinline__ T shuffle_idx(T value, int source) {
  return __shfl_sync(kAllLanes, value, source);
}
// int64_t is long on Linux, for which CUDA has no overload of its own width on every host.
__device__ __forceinline__ int64_t shuffle_xor(int64_t value, int mask) {
  return static_cast<int64_t>(__shfl_xor_sync(kAllLanes, static_cast<long long>(value), mask));
}
__device__ __forceinline__ int64_t shuffle_down(int64_t value, unsigned delta) {
  return static_cast<int64_t>(__shfl_down_sync(kAllLanes, static_cast<long long>(value), delta));
}
__device__ __forceinline__ int64_t shuffle_idx(int64_t value, int source) {
  return static_cast<int64_t>(__shfl_sync(kAllLanes, static_cast<long long>(value), source));
}

// Every lane receives the total: a butterfly, whose two operands each step are the same for both partners.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
__device__ __forceinline__ double warp_max(double value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const double other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Every thread of the block receives the total, or the largest value. The block has whole warps; `scratch` holds
// 33 doubles in shared memory, free for reuse on return.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (lane_id() == 0) scratch[warp_id()] = value;
  block_sync();
  value = warp_sum(lane_id() < block_warps() ? scratch[lane_id()] : 0.0);
  block_sync();
  return value;
}
__device__ __forceinline__ double block_max(double value, double* scratch) {
  value = warp_max(value);
  if (lane_id() == 0) scratch[warp_id()] = value;
  block_sync();
  value = warp_max(scratch[lane_id() < block_warps() ? lane_id() : 0]);
  block_sync();
  return value;
}

// One warp: C (8 x 8) += A (8 x 4) B (4 x 8) in float64 on the tensor cores. Lane l holds A[l / 4][l % 4],
// B[l % 4][l / 4] and C[l / 4][2 * (l % 4) + i], i = 0, 1.
__device__ __forceinline__ void mma_f64(double (&c)[2], double a, double b) {
#ifdef DSE_CUDA_EMULATION
  const std::array<uint64_t, 32> left = dse::emulation::exchange(dse::emulation::to_bits(a), dse_here::current());
  const auto& right = dse::emulation::exchange(dse::emulation::to_bits(b), dse_here::current());
  const auto row = static_cast<size_t>(lane_id() / 4);
  for (size_t i = 0; i < 2; ++i) {
    const size_t column = 2 * static_cast<size_t>(lane_id() % 4) + i;
    for (size_t k = 0; k < 4; ++k) {
      c[i] = std::fma(dse::emulation::from_bits<double>(left[row * 4 + k]),
                      dse::emulation::from_bits<double>(right[column * 4 + k]), c[i]);
    }
  }
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
#endif
}

__device__ __forceinline__ double to_double(double x) { return x; }
__device__ __forceinline__ double to_double(float x) { return static_cast<double>(x); }
__device__ __forceinline__ double to_double(__nv_bfloat16 x) { return static_cast<double>(__bfloat162float(x)); }
__device__ __forceinline__ double to_double(__half x) { return static_cast<double>(__half2float(x)); }

// Half precision by way of float32, as on the CPU.
template <class S>
__device__ __forceinline__ S from_double(double x);
template <>
__device__ __forceinline__ double from_double<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ float from_double<float>(double x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_double<__nv_bfloat16>(double x) {
  return __float2bfloat16(static_cast<float>(x));
}
template <>
__device__ __forceinline__ __half from_double<__half>(double x) {
  return __float2half(static_cast<float>(x));
}

}  // namespace dse::cuda
