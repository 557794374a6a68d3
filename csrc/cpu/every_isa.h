// Includes the file that DSE_KERNELS names once for every instruction set, with
//   DSE_ISA           the namespace that its functions go to,
//   DSE_VECTOR_BYTES  the width of a vector register (of two, in the baseline),
//   DSE_WHOLE_VECTORS whether a vector is one register: not in the baseline, nor where AVX-512 is emulated.
// No include guard. A function's target has to be known where its source is read: vectors are split into what the
// target has before anything is inlined, and neither target_clones nor inlining into a function of another target
// puts them together again.

#define DSE_ISA baseline
#define DSE_VECTOR_BYTES 32
#define DSE_WHOLE_VECTORS 0
#include DSE_KERNELS
#undef DSE_ISA
#undef DSE_VECTOR_BYTES
#undef DSE_WHOLE_VECTORS

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DSE_HAS_ISAS 1

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define DSE_ISA avx2
#define DSE_VECTOR_BYTES 32
#define DSE_WHOLE_VECTORS 1
#include DSE_KERNELS
#undef DSE_ISA
#undef DSE_VECTOR_BYTES
#undef DSE_WHOLE_VECTORS
#pragma GCC pop_options

#pragma GCC push_options
#ifdef DSE_EMULATE_AVX512  // the code of wide vectors, on a processor that has none
#pragma GCC target("arch=x86-64-v3")
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#define DSE_ISA avx512
#define DSE_VECTOR_BYTES 64
#ifdef DSE_EMULATE_AVX512
#define DSE_WHOLE_VECTORS 0
#else
#define DSE_WHOLE_VECTORS 1
#endif
#include DSE_KERNELS
#undef DSE_ISA
#undef DSE_VECTOR_BYTES
#undef DSE_WHOLE_VECTORS
#pragma GCC pop_options
#endif

#undef DSE_KERNELS
