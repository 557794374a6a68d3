#include "cuda/labels.h"

#include "cuda/tiles.cuh"

namespace dse::cuda {
namespace {

constexpr int kThreads = 256;

// found[0]: index of the first label outside 0 .. k - 1, or -1; found[1]: that label. One block.
__global__ __launch_bounds__(kThreads) void find_bad_label_kernel(const int64_t* labels, int64_t count, int64_t k,
                                                                  int64_t* found) {
  __shared__ double scratch[33];
  double own = static_cast<double>(count);
  for (int64_t i = thread_id(); i < count; i += kThreads) {
    if (labels[i] >= 0 && labels[i] < k) continue;
    own = static_cast<double>(i);
    break;
  }
  const auto first = static_cast<int64_t>(-block_max(-own, scratch));
  if (thread_id() != 0) return;
  found[0] = first < count ? first : -1;
  found[1] = first < count ? labels[first] : 0;
}

__global__ __launch_bounds__(kThreads) void settle_labels_kernel(int64_t* labels, int64_t count, int64_t k,
                                                                 const int* finite) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_id();
  if (i >= count) return;
  const int64_t label = labels[i] < 0 ? 0 : labels[i] < k ? labels[i] : k - 1;
  labels[i] = *finite != 0 ? label : 0;
}

bool can_wait(cudaStream_t stream) {
  if (Recording::current() != nullptr) return false;
#ifdef DSE_CUDA_EMULATION
  static_cast<void>(stream);
  return true;
#else
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusNone;
#endif
}

}  // namespace

void copy_given_labels(Call& call, const Tensor& labels, const Tensor& features, int64_t rows, int64_t columns,
                       int64_t k, const char* argument, int64_t* to) {
  require_device(labels, features, argument);
  cpu::require_label_shape(labels, rows, columns, argument);
  const Tensor flat = torch::stable::contiguous(labels);
  const int64_t count = rows * columns;
  call.copy(to, const_data_of<int64_t>(flat), count * static_cast<int64_t>(sizeof(int64_t)));
  if (!can_wait(call.stream)) return;
  auto* found = call.borrow<int64_t>(2);
  launch(DSE_KERNEL(find_bad_label_kernel), {dim3(1), kThreads, 0, call.stream}, to, count, k, found);
  int64_t seen[2] = {-1, 0};
  check(cudaMemcpyAsync(seen, found, sizeof(seen), cudaMemcpyDeviceToHost, call.stream), "cudaMemcpyAsync");
#ifndef DSE_CUDA_EMULATION
  check(cudaStreamSynchronize(call.stream), "cudaStreamSynchronize");
#endif
  if (seen[0] < 0) return;
  reject(argument, " must lie in [0, ", k, "), got ", seen[1], " at (", seen[0] / columns, ", ",
         seen[0] % columns, ").");
}

void settle_labels(Call& call, int64_t* labels, int64_t count, int64_t k, const int* finite) {
  launch(DSE_KERNEL(settle_labels_kernel), {grid_of(ceil_div(count, kThreads)), kThreads, 0, call.stream}, labels,
         count, k, finite);
}

}  // namespace dse::cuda
