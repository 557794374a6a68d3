// The CUDA kernels of every operator of csrc/common/schemas.h.
#pragma once

#include "common/operators.h"

namespace dse::cuda {

DSE_DECLARE_OPERATORS

}  // namespace dse::cuda
