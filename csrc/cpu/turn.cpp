#include "cpu/turn.h"

#include <algorithm>

#include "cpu/processor.h"
#include "cpu/vectors.h"

#define DSE_KERNELS "cpu/turn.kernels.h"
#include "cpu/every_isa.h"

namespace dse::cpu {

void turn(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out, int64_t ldo) {
  DSE_CALL_BY_ISA(turn, in, ld, rows, columns, out, ldo);
}
void turn(const double* in, int64_t ld, int64_t rows, int64_t columns, double* out, int64_t ldo) {
  DSE_CALL_BY_ISA(turn, in, ld, rows, columns, out, ldo);
}
void mirror(float* a, int64_t ld, int64_t first, int64_t row_end, int64_t n) {
  DSE_CALL_BY_ISA(mirror, a, ld, first, row_end, n);
}
void mirror(double* a, int64_t ld, int64_t first, int64_t row_end, int64_t n) {
  DSE_CALL_BY_ISA(mirror, a, ld, first, row_end, n);
}

}  // namespace dse::cpu
