// What a call would do, without doing it: while a thread records, launches and memory are noted and nothing is
// queued. The same host code then tells the plan of a call (plan.cu) that would otherwise run it, so that a plan
// cannot differ from what happens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dse::cuda {

struct Recording {
  struct Step {
    std::string name;  // of a kernel; "library: ..." for a product or a decomposition by torch
    unsigned grid[3] = {0, 0, 0};
    unsigned threads = 0;
    size_t shared_bytes = 0;  // dynamic
  };
  // Limits of the device that is planned for.
  int multiprocessors = 0;
  size_t shared_limit = 0;

  std::vector<Step> steps;
  // Bytes of working memory: now, and at the most.
  int64_t held = 0, peak = 0;
  void hold(int64_t bytes) {
    held += bytes;
    peak = held > peak ? held : peak;
  }

  // What this thread records into; null: calls run.
  static Recording*& current() {
    static thread_local Recording* recording = nullptr;
    return recording;
  }
};

// Records for as long as it lives.
class RecordingScope {
 public:
  explicit RecordingScope(Recording& recording) { Recording::current() = &recording; }
  ~RecordingScope() { Recording::current() = nullptr; }
  RecordingScope(const RecordingScope&) = delete;
  RecordingScope& operator=(const RecordingScope&) = delete;
};

// Notes a step of the library's; true where nothing is to be done.
inline bool recorded(const char* step) {
  if (Recording* r = Recording::current(); r != nullptr) {
    r->steps.push_back({step, {1, 1, 1}, 0, 0});
    return true;
  }
  return false;
}

}  // namespace dse::cuda
