// Passes over one tridiagonal matrix for eight shifts at once, for one instruction set: see every_isa.h and
// tridiagonal_traces.cpp.

namespace dse::cpu::DSE_ISA {
namespace {

// What a register holds of the eight: comparisons of wider vectors go element by element.
constexpr int kPart = DSE_VECTOR_BYTES / sizeof(double);
constexpr int kParts = 8 / kPart;
typedef double Part __attribute__((vector_size(DSE_VECTOR_BYTES), aligned(8), may_alias));

// below[s] = how many eigenvalues are less than at[s]: as many as there are negative pivots (Sylvester).
void count_below(int64_t n, const double* diagonal, const double* couplings, double least, const double* at,
                 double* below) {
  const Part* x = reinterpret_cast<const Part*>(at);
  Part* count = reinterpret_cast<Part*>(below);
  Part pivot[kParts];
  for (int q = 0; q < kParts; ++q) {
    pivot[q] = diagonal[0] - x[q];
    count[q] = pivot[q] < 0.0 ? Part{} + 1.0 : Part{};
  }
  for (int64_t i = 1; i < n; ++i) {
    const double own = diagonal[i], square = couplings[i - 1] * couplings[i - 1];
    for (int q = 0; q < kParts; ++q) {
      // A pivot that vanishes has either sign.
      const Part size = pivot[q] < 0.0 ? -pivot[q] : pivot[q];
      pivot[q] = own - x[q] - square / (size < least ? Part{} - least : pivot[q]);
      count[q] += pivot[q] < 0.0 ? Part{} + 1.0 : Part{};
    }
  }
}

// Pivots from the top, T + s = L D L^T; the last entry of the inverse is that of D, and every other diagonal
// entry follows from the next one's.
void inverse_traces(int64_t n, const double* diagonal, const double* couplings, const double* shift,
                    double* inverses, double* traces) {
  const Part* s = reinterpret_cast<const Part*>(shift);
  Part* inverse = reinterpret_cast<Part*>(inverses);
  for (int q = 0; q < kParts; ++q) inverse[q] = 1.0 / (diagonal[0] + s[q]);
  for (int64_t i = 1; i < n; ++i) {
    const double own = diagonal[i], square = couplings[i - 1] * couplings[i - 1];
    for (int q = 0; q < kParts; ++q)
      inverse[i * kParts + q] = 1.0 / (own + s[q] - square * inverse[(i - 1) * kParts + q]);
  }
  Part entry[kParts], trace[kParts];
  for (int q = 0; q < kParts; ++q) trace[q] = entry[q] = inverse[(n - 1) * kParts + q];
  for (int64_t i = n - 2; i >= 0; --i) {
    const double square = couplings[i] * couplings[i];
    for (int q = 0; q < kParts; ++q) {
      const Part own = inverse[i * kParts + q];
      entry[q] = own + own * own * square * entry[q];
      trace[q] += entry[q];
    }
  }
  for (int q = 0; q < kParts; ++q) reinterpret_cast<Part*>(traces)[q] = trace[q];
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
