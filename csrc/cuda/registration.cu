// Registers the CUDA kernels with torch.

#include <torch/csrc/stable/library.h>

#include "cuda/operators.h"

STABLE_TORCH_LIBRARY_IMPL(dse_ext, CUDA, m) { DSE_REGISTER_OPERATORS(m, cuda); }
