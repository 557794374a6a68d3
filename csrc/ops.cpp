// Defines the operators (common/schemas.h), and nothing else.

#include "common/schemas.h"

STABLE_TORCH_LIBRARY(dse_ext, m) { dse::define_operators(m); }
