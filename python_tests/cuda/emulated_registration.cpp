// The CUDA operators on CPU tensors (emulation.h), as torch.ops.dse_ext_emulated.*.

#include "common/schemas.h"
#include "cuda/device.cuh"
#include "cuda/operators.h"

namespace {

// Threads run in a random order between barriers.
[[maybe_unused]] const uint64_t seed = dse::emulation::schedule_seed = 7;

}  // namespace

STABLE_TORCH_LIBRARY(dse_ext_emulated, m) { dse::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(dse_ext_emulated, CPU, m) { DSE_REGISTER_OPERATORS(m, cuda); }
