#include "cpu/lazy_zeros.h"

#include <cstddef>
#include <cstdlib>
#include <new>

#include <sys/mman.h>

#include <torch/csrc/stable/ops.h>

namespace dse::cpu {

torch::stable::Tensor lazy_zeros(const std::vector<int64_t>& shape, torch::headeronly::ScalarType type) {
  const torch::stable::Device device(torch::headeronly::DeviceType::CPU);
  const int64_t item = type == torch::headeronly::ScalarType::Double ? 8 : 4;
  std::vector<int64_t> strides(shape.size(), 1);
  int64_t count = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = count;
    count *= shape[axis];
  }
  if (count == 0) return torch::stable::empty({shape.data(), shape.size()}, type, std::nullopt, device);
  const auto bytes = static_cast<size_t>(count * item);
#ifdef __SANITIZE_ADDRESS__
  // The heap's memory has watched ends; pages have not.
  void* data = std::calloc(1, bytes);
  if (data == nullptr) throw std::bad_alloc();
  return torch::stable::from_blob(data, {shape.data(), shape.size()}, {strides.data(), strides.size()}, device,
                                  type, [](void* memory) { std::free(memory); });
#else
  // Anonymous pages read as zero, and none exists before it is written.
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_NOHUGEPAGE
  madvise(data, bytes, MADV_NOHUGEPAGE);  // where the system gives them unasked
#endif
  return torch::stable::from_blob(data, {shape.data(), shape.size()}, {strides.data(), strides.size()}, device,
                                  type, [bytes](void* pages) { munmap(pages, bytes); });
#endif
}

}  // namespace dse::cpu
