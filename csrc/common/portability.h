// The few macros that let one source be compiled by g++, clang and nvcc.
#pragma once

#ifdef __CUDACC__
#define DSE_HOST_DEVICE __host__ __device__
#else
#define DSE_HOST_DEVICE
#endif
