// The kernels of turn.h for one instruction set: see every_isa.h.

namespace dse::cpu::DSE_ISA {
namespace {

// out = transpose of eight rows of eight, of which `in` reads from the first.
template <typename T>
DSE_INLINE void transpose_eight(const T* in, int64_t ld, T* out, int64_t ldo) {
  if constexpr (sizeof(T) == 4) {
    using Eight = Vec<T, 32>;
    const auto store = [](T* to, const Eight& own)
                           __attribute__((always_inline)) { *reinterpret_cast<Eight*>(to) = own; };
    Eight r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = *reinterpret_cast<const Eight*>(in + i * ld);
    for (int i = 0; i < 4; ++i) {  // halves of rows four apart
      s[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      s[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int h = 0; h < 8; h += 4) {
      for (int i = 0; i < 2; ++i) {  // pairs of rows two apart
        r[h + i] = __builtin_shufflevector(s[h + i], s[h + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[h + i + 2] = __builtin_shufflevector(s[h + i], s[h + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
      for (int i = 0; i < 4; i += 2) {  // neighbours
        store(out + (h + i) * ldo, __builtin_shufflevector(r[h + i], r[h + i + 1], 0, 8, 2, 10, 4, 12, 6, 14));
        store(out + (h + i + 1) * ldo,
              __builtin_shufflevector(r[h + i], r[h + i + 1], 1, 9, 3, 11, 5, 13, 7, 15));
      }
    }
  } else {
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 8; ++i) out[j * ldo + i] = in[i * ld + j];
  }
}

template <typename T>
void turn(const T* in, int64_t ld, int64_t rows, int64_t columns, T* out, int64_t ldo) {
  constexpr int64_t kStep = 8;
  const int64_t whole = columns / kStep * kStep;
  for (int64_t i = 0; i < rows; i += kStep) {
    int64_t j = 0;
    if (i + kStep <= rows)
      for (; j < whole; j += kStep) transpose_eight(in + i * ld + j, ld, out + j * ldo + i, ldo);
    for (; j < columns; ++j)
      for (int64_t r = 0; r < kStep; ++r) out[j * ldo + i + r] = i + r < rows ? in[(i + r) * ld + j] : T(0);
  }
}

template <typename T>
void mirror(T* a, int64_t ld, int64_t first, int64_t row_end, int64_t n) {
  constexpr int64_t kStep = 8;
  for (int64_t i0 = first; i0 < row_end; i0 += kStep) {
    const int64_t i1 = std::min(row_end, i0 + kStep);
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = i + 1; j < std::min(n, i0 + kStep); ++j) a[j * ld + i] = a[i * ld + j];
    int64_t j = i0 + kStep;
    if (i1 - i0 == kStep)
      for (; j + kStep <= n; j += kStep) transpose_eight(a + i0 * ld + j, ld, a + j * ld + i0, ld);
    for (; j < n; ++j)
      for (int64_t i = i0; i < i1; ++i) a[j * ld + i] = a[i * ld + j];
  }
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
