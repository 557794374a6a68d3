// Tasks over torch's thread pool, and the buffers that they work in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

#include <torch/csrc/stable/ops.h>

namespace dse::cpu {

// Calls fn(task, worker) once for every task in [0, n). Which worker takes which task is decided at run time,
// so a task's result must not depend on its worker: the outcome is then the same for any number of threads.
//
// `work` is the number of multiply-adds of all tasks together. Where that is little the caller runs them alone:
// waking a thread costs microseconds on an idle machine and a time slice on a busy one.
template <typename Fn>
void for_each_task(int64_t n, int64_t work, const Fn& fn) {
#ifdef DSE_THREADS_ALWAYS
  constexpr int64_t kWorthThreads = 0;  // builds that look for races: threads at every size
#else
  constexpr int64_t kWorthThreads = 1 << 20;
#endif
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), n);
  if (work < kWorthThreads || workers < 2) {
    for (int64_t task = 0; task < n; ++task) fn(task, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  // Relaxed: the counter shares out numbers and orders nothing else; the end of parallel_for does.
  const auto take = [&next] { return next.fetch_add(1, std::memory_order_relaxed); };
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = take(); task < n && !failed.load(std::memory_order_relaxed); task = take()) {
        try {
          fn(task, worker);
        } catch (...) {
          // Exceptions do not cross torch's C interface; the first one is kept and thrown below.
          if (!failed.exchange(true)) failure = std::current_exception();
        }
      }
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// Upper bound on the worker indices that for_each_task passes on.
inline int64_t max_workers() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// fn(problem, worker) for independent problems: one after the other on each thread, or, where there are fewer
// problems than threads, with all threads inside each.
template <typename Fn>
void for_each_problem(int64_t n, int64_t work, const Fn& fn) {
  if (n >= max_workers()) {
    for_each_task(n, work, fn);
    return;
  }
  for (int64_t problem = 0; problem < n; ++problem) fn(problem, 0);
}

// A growing 64-byte-aligned array of T whose content is undefined after reserve().
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { reserve(n); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), capacity_(other.capacity_) {
    other.data_ = nullptr;
    other.capacity_ = 0;
  }
  ~Buffer() { std::free(data_); }

  T* reserve(int64_t n) {
#ifdef __SANITIZE_ADDRESS__
    // Of exactly this size, and new each time: overruns and pointers from before are seen.
    std::free(data_);
    data_ = nullptr;
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, static_cast<size_t>(n) * sizeof(T)) != 0) {
      throw std::bad_alloc();
    }
    capacity_ = n;
#endif
    if (n > capacity_) {
      std::free(data_);
      const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
      capacity_ = n;
    }
    return data_;
  }
  T* reserve_zeroed(int64_t n) {
    reserve(n);
    std::memset(static_cast<void*>(data_), 0, static_cast<size_t>(n) * sizeof(T));
    return data_;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace dse::cpu
