// Registers the CPU kernels with torch.

#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"

STABLE_TORCH_LIBRARY_IMPL(dse_ext, CPU, m) { DSE_REGISTER_OPERATORS(m, cpu); }
