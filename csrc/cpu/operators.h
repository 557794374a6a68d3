// The CPU kernels of every operator of csrc/common/schemas.h.
#pragma once

#include "common/operators.h"

namespace dse::cpu {

DSE_DECLARE_OPERATORS

}  // namespace dse::cpu
