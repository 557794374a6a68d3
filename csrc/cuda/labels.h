// Labels that the caller brings.
#pragma once

#include "cuda/host.h"

namespace dse::cuda {

// Contiguous labels (rows x columns) in `to`. Labels outside 0 .. k - 1 are an error; that takes a
// wait for the device, which is left out while the stream is being captured into a graph.
void copy_given_labels(Call& call, const Tensor& labels, const Tensor& features, int64_t rows, int64_t columns,
                       int64_t k, const char* argument, int64_t* to);

// What a kernel may rely on: labels in 0 .. k - 1 (the nearest of these otherwise), and 0 where *finite is 0.
void settle_labels(Call& call, int64_t* labels, int64_t count, int64_t k, const int* finite);

}  // namespace dse::cuda
