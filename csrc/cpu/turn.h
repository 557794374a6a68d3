// Transposes.
#pragma once

#include <cstdint>

namespace dse::cpu {

// out (columns x ldo) = transpose of `rows` rows of `columns` elements. Rows are filled up with zeros to a
// multiple of eight, for which ldo has room.
void turn(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out, int64_t ldo);
void turn(const double* in, int64_t ld, int64_t rows, int64_t columns, double* out, int64_t ldo);

// Copies what lies above the diagonal, rows first .. row_end and columns to n, to below it; `first` is a multiple
// of eight.
void mirror(float* a, int64_t ld, int64_t first, int64_t row_end, int64_t n);
void mirror(double* a, int64_t ld, int64_t first, int64_t row_end, int64_t n);

}  // namespace dse::cpu
