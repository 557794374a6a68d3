// Takes the place of torch's two functions for threads in a program that is linked with it: std::thread, which
// ThreadSanitizer sees through, where OpenMP's own synchronization would be invisible to it and every handover
// look like a race. The work is cut as torch cuts it: one range for each thread, and none inside another.

#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <latch>
#include <thread>
#include <vector>

#include <torch/csrc/stable/c/shim.h>

namespace {
std::atomic<int> thread_count{1};
thread_local bool inside = false;
}  // namespace

namespace fuzz {
void set_threads(int count) { thread_count = count; }
}  // namespace fuzz

extern "C" AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = static_cast<uint32_t>(thread_count.load());
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc function,
                                             void* context) {
  const int64_t most = std::min<int64_t>(thread_count, (end - begin + grain - 1) / std::max<int64_t>(grain, 1));
  if (inside || most < 2) {
    function(begin, end, context);
    return AOTI_TORCH_SUCCESS;
  }
  const int64_t share = (end - begin + most - 1) / most;
  // All start at the same moment: tasks that take no time overlap too.
  std::latch start((end - begin + share - 1) / share);
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += share) {
    threads.emplace_back([=, &start] {
      inside = true;
      start.arrive_and_wait();
      function(from, std::min(end, from + share), context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
