#include "cpu/products.h"

#include <algorithm>
#include <type_traits>

#include "cpu/processor.h"
#include "cpu/vectors.h"

#define DSE_KERNELS "cpu/products.kernels.h"
#include "cpu/every_isa.h"

namespace dse::cpu {

#define DSE_FOR_TYPE(T)                                                                                       \
  void row_dots(const T* a, int64_t m, const T* b, int64_t k, int64_t ld, T* out, int64_t ldo) {              \
    DSE_CALL_BY_ISA(row_dots, a, m, b, k, ld, out, ldo);                                                      \
  }                                                                                                           \
  void squared_distances(const T* a, const T* b, int64_t ld, const int64_t* rows, int64_t count, T* out) {    \
    DSE_CALL_BY_ISA(squared_distances, a, b, ld, rows, count, out);                                           \
  }                                                                                                           \
  void tn_accumulate(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T alpha, T* const* out, \
                     int64_t m, int64_t n) {                                                                  \
    DSE_CALL_BY_ISA(tn_accumulate, a, lda, b, ldb, depth, alpha, out, m, n);                                  \
  }                                                                                                           \
  void nn_accumulate(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo,    \
                     int64_t m, int64_t n) {                                                                  \
    DSE_CALL_BY_ISA(nn_accumulate, a, lda, b, ldb, depth, out, ldo, m, n);                                    \
  }                                                                                                           \
  void tn_product_upper(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t rows, T* c, int64_t ldc,    \
                        int64_t i0, int64_t i1, int64_t j0, int64_t j1) {                                     \
    DSE_CALL_BY_ISA(tn_product_upper, a, lda, b, ldb, rows, c, ldc, i0, i1, j0, j1);                          \
  }                                                                                                           \
  void panel_gram_upper(const T* panels, int64_t rows, double* c, int64_t ldc, int64_t i0, int64_t i1,        \
                        int64_t j0, int64_t j1) {                                                             \
    DSE_CALL_BY_ISA(panel_gram_upper, panels, rows, c, ldc, i0, i1, j0, j1);                                  \
  }
DSE_FOR_TYPE(float)
DSE_FOR_TYPE(double)

}  // namespace dse::cpu
