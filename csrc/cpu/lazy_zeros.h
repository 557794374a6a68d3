// Tensors of zeros whose pages are not in memory before they are written.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace dse::cpu {

// A contiguous float32 or float64 CPU tensor. The slots that the forward pass leaves for the backward pass have
// room for the worst case, of which a few percent may be used: only those cost memory and time. In small pages:
// large ones are zeroed whole, which threads wait for.
torch::stable::Tensor lazy_zeros(const std::vector<int64_t>& shape, torch::headeronly::ScalarType type);

}  // namespace dse::cpu
