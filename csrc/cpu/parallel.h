// Tasks over torch's thread pool, and the buffers that they work in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

namespace dse::cpu {

#ifdef DSE_THREADS_ALWAYS
inline constexpr int64_t kWorthThreads = 0;  // builds that look for races: threads at every size
#else
inline constexpr int64_t kWorthThreads = 1 << 20;
#endif

// Calls fn(task, worker) once for every task in [0, n). Which worker takes which task is decided at run time,
// so a task's result must not depend on its worker: the outcome is then the same for any number of threads.
//
// `work` is the number of multiply-adds of all tasks together. Where that is little the caller runs them alone:
// waking a thread costs microseconds on an idle machine and a time slice on a busy one.
template <typename Fn>
void for_each_task(int64_t n, int64_t work, const Fn& fn) {
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

// The same for tasks of equal size over data that a loop of such calls goes through again and again: a worker has
// its own fn(task, worker) in each, whose data is in its cache, and takes others' only when it is done with them.
template <typename Fn>
void for_each_own_task(int64_t n, int64_t work, const Fn& fn) {
  const int64_t workers = work < kWorthThreads ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), n);
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };
  std::vector<Counter> counters(static_cast<size_t>(workers));
  for_each_task(workers, work, [&](int64_t, int64_t worker) {
    for (int64_t i = 0; i < workers; ++i) {
      const int64_t owner = (worker + i) % workers;
      std::atomic<int64_t>& next = counters[static_cast<size_t>(owner)].next;
      const auto take = [&] { return owner + workers * next.fetch_add(1, std::memory_order_relaxed); };
      for (int64_t task = take(); task < n; task = take()) fn(task, worker);
    }
  });
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

// While it lives, numbers too small for their exponent (subnormals) are zero for this thread. Rows of inverses
// fade away from the diagonal and come to that; on Intel's processors an instruction that meets one takes a
// hundred times as long.
class NoSubnormals {
 public:
#if defined(__x86_64__)
  NoSubnormals() : before_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(before_ | kFlushResults | kFlushInputs);
  }
  ~NoSubnormals() { __builtin_ia32_ldmxcsr(before_); }
  NoSubnormals(const NoSubnormals&) = delete;
  NoSubnormals& operator=(const NoSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kFlushInputs = 0x40;
  unsigned before_;
#endif
};

// Threads for work in many short phases, too short to wake anybody for: whoever waits for the next one spins.
// A phase has kParts parts, which any of the threads take; there may be helpers or none, they may be late, leave
// or never come, and nobody waits for one that has not taken a part.
class Crew {
 public:
  static constexpr int64_t kParts = 4;

  // No helpers will ever come.
  bool is_alone() const { return alone_; }

  // Calls fn(part) for every part in [0, kParts); fn must not throw. Not for helpers.
  template <typename Fn>
  void run(const Fn& fn) {
    if (alone_) {
      for (int64_t part = 0; part < kParts; ++part) fn(part);
      return;
    }
    context_ = &fn;
    call_ = [](const void* context, int64_t part) { (*static_cast<const Fn*>(context))(part); };
    done_.store(0, std::memory_order_relaxed);
    const uint64_t phase = phase_.load(std::memory_order_relaxed) + 1;
    phase_.store(phase, std::memory_order_release);
    take_parts(phase, 0);
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < kParts; ++spins) wait(spins);
  }

  // Calls main(crew) on this thread, with the other threads as helpers where there are any and `work`
  // multiply-adds are worth it. Without subnormals, in all of them.
  template <typename Main>
  static void gather(int64_t work, const Main& main) {
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), kParts);
    Crew crew;
    if (work < kWorthThreads || workers < 2) {
      crew.alone_ = true;
      [[maybe_unused]] const NoSubnormals guard;
      main(crew);
      return;
    }
    std::exception_ptr failure;
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const NoSubnormals guard;
      for (int64_t worker = begin; worker < end; ++worker) {
        if (worker > 0) {
          crew.help(worker * kParts / workers);
          continue;
        }
        try {
          main(crew);
        } catch (...) {
          failure = std::current_exception();
        }
        crew.phase_.store(kEnd, std::memory_order_release);
      }
    });
    if (failure) std::rethrow_exception(failure);
  }

 private:
  static constexpr uint64_t kEnd = ~uint64_t{0};
  // Of a phase, until a thread gives its time slice to others that want the processor, and until a helper leaves.
  static constexpr int64_t kSpins = 2000, kPatience = 200000;

  static void wait(int64_t spins) {
    if (spins > kSpins) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void help(int64_t first) {
    uint64_t seen = 0;
    for (int64_t spins = 0; spins < kPatience; ++spins) {
      const uint64_t phase = phase_.load(std::memory_order_acquire);
      if (phase == kEnd) return;
      if (phase == seen) {
        wait(spins);
        continue;
      }
      seen = phase;
      spins = 0;
      take_parts(phase, first);
    }
  }

  // A part that was taken keeps the phase open until it is done, and with it what the phase consists of. One
  // whose phase is over is never taken: then all parts have its number, or a later one.
  void take_parts(uint64_t phase, int64_t first) {
    for (int64_t i = 0; i < kParts; ++i) {
      const int64_t part = (first + i) % kParts;
      std::atomic<uint64_t>& taken = taken_[part].phase;
      uint64_t before = taken.load(std::memory_order_relaxed);
      if (before >= phase || !taken.compare_exchange_strong(before, phase, std::memory_order_acq_rel)) continue;
      call_(context_, part);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  struct alignas(64) Taken {
    std::atomic<uint64_t> phase{0};
  };

  bool alone_ = false;
  const void* context_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  Taken taken_[kParts];
  alignas(64) std::atomic<uint64_t> phase_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

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
      // Large ones in large pages, where the system has them: they are new in every call, and cost a fault a
      // page.
      constexpr size_t kLarge = size_t{1} << 21;
      const size_t size = static_cast<size_t>(n) * sizeof(T), align = size >= kLarge ? kLarge : 64;
      const size_t bytes = (size + align - 1) / align * align;
      data_ = static_cast<T*>(std::aligned_alloc(align, bytes));
#ifdef MADV_HUGEPAGE
      if (data_ != nullptr && align == kLarge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
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
