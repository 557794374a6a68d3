// Where the time goes, for `benchmarks/stages.py`: it builds the kernels with DSE_STAGE_TIMES and reads a file.
#pragma once

#ifdef DSE_STAGE_TIMES

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace dse::cpu {

// Seconds by stage, summed over threads, written to the file $DSE_STAGE_FILE when the process ends.
class StageTimes {
 public:
  static StageTimes& instance() {
    static StageTimes times;
    return times;
  }
  void add(const char* stage, double seconds) {
    const std::lock_guard<std::mutex> lock(mutex_);
    seconds_[stage] += seconds;
  }
  ~StageTimes() {
    const char* path = std::getenv("DSE_STAGE_FILE");
    std::FILE* file = path != nullptr ? std::fopen(path, "w") : nullptr;
    if (file == nullptr) return;
    for (const auto& [stage, seconds] : seconds_) std::fprintf(file, "%s\t%.9f\n", stage.c_str(), seconds);
    std::fclose(file);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, double> seconds_;
};

class StageTimer {
 public:
  explicit StageTimer(const char* stage) : stage_(stage), start_(std::chrono::steady_clock::now()) {}
  ~StageTimer() {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
    StageTimes::instance().add(stage_, elapsed.count());
  }

 private:
  const char* stage_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace dse::cpu

#define DSE_STAGE(stage) const ::dse::cpu::StageTimer dse_stage_timer(stage)
#else
#define DSE_STAGE(stage) static_cast<void>(0)
#endif
