// Passes over a symmetric matrix for one instruction set: see every_isa.h and tridiagonal.cpp.

namespace dse::cpu::DSE_ISA {
namespace {

// Vectors of eight elements, or of four where eight float64 do not fit a register.
template <typename T>
using Lane = Vec<T, sizeof(T) == 8 ? DSE_VECTOR_BYTES : 32>;
template <typename T>
constexpr int64_t kWidth = sizeof(Lane<T>) / sizeof(T);

template <typename T>
DSE_INLINE Lane<T> load(const T* p) {
  return *reinterpret_cast<const Lane<T>*>(p);
}
template <typename T>
DSE_INLINE void store(T* p, const Lane<T>& v) {
  *reinterpret_cast<Lane<T>*>(p) = v;
}

template <typename T>
DSE_INLINE T horizontal_sum(const Lane<T>& v) {
  if constexpr (kWidth<T> == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
}

// The four sums, in the order of horizontal_sum().
template <typename T>
DSE_INLINE Vec<T, 4 * sizeof(T)> horizontal_sums(const Lane<T>& a, const Lane<T>& b, const Lane<T>& c,
                                                 const Lane<T>& d) {
  using Four = Vec<T, 4 * sizeof(T)>;
  if constexpr (kWidth<T> == 4) {
    return (Four{a[0], b[0], c[0], d[0]} + Four{a[2], b[2], c[2], d[2]}) +
           (Four{a[1], b[1], c[1], d[1]} + Four{a[3], b[3], c[3], d[3]});
  } else {
    const auto halves = [](const Lane<T>& v) {
      return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    };
    const Four ha = halves(a), hb = halves(b), hc = halves(c), hd = halves(d);
    const Four ab = __builtin_shufflevector(ha, hb, 0, 4, 1, 5) + __builtin_shufflevector(ha, hb, 2, 6, 3, 7);
    const Four cd = __builtin_shufflevector(hc, hd, 0, 4, 1, 5) + __builtin_shufflevector(hc, hd, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  }
}

// A vector that two instructions use: the compiler would load it for each of them.
template <typename V>
DSE_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if DSE_WHOLE_VECTORS
  asm("" : "+x"(v));
#endif
}

// y = A v for a symmetric matrix, of which the entries above the diagonal and the whole diagonal blocks of kWidth
// are read, once each: what rows first .. last of them contribute to columns `first` and on. `first` and `last`
// are multiples of eight, or `last` is n.
template <typename T>
void symmetric_product(const T* a, int64_t ld, int64_t first, int64_t last, int64_t n, const T* v, T* y) {
  constexpr int64_t w = kWidth<T>;
  const int64_t end = (n + w - 1) / w * w;
  for (int64_t i = first; i < end; ++i) y[i] = T(0);
  for (int64_t i = first; i < last; i += w) {
    const int64_t rows = std::min(w, n - i);
    const T* row = a + i * ld;
    if (rows < w) {  // the last rows: their diagonal block is all there is
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = i; j < n; ++j) y[i + r] += row[r * ld + j] * v[j];
      break;
    }
    const Lane<T> own = load(v + i);
    // Four rows at a time: their sums and what one step reads stay in registers.
    for (int64_t h = 0; h < w; h += 4) {
      const T* r0 = row + h * ld;
      const T* r1 = r0 + ld;
      const T* r2 = r1 + ld;
      const T* r3 = r2 + ld;
      const T v0 = v[i + h], v1 = v[i + h + 1], v2 = v[i + h + 2], v3 = v[i + h + 3];
      Lane<T> s0 = load(r0 + i) * own, s1 = load(r1 + i) * own, s2 = load(r2 + i) * own, s3 = load(r3 + i) * own;
      for (int64_t j = i + w; j < end; j += w) {
        const Lane<T> vj = load(v + j);
        Lane<T> a0 = load(r0 + j), a1 = load(r1 + j), a2 = load(r2 + j), a3 = load(r3 + j);
        keep_in_register(a0);
        keep_in_register(a1);
        keep_in_register(a2);
        keep_in_register(a3);
        s0 += a0 * vj;
        s1 += a1 * vj;
        s2 += a2 * vj;
        s3 += a3 * vj;
        store(y + j, (((load(y + j) + a0 * v0) + a1 * v1) + a2 * v2) + a3 * v3);
      }
      using Four = Vec<T, 4 * sizeof(T)>;
      *reinterpret_cast<Four*>(y + i + h) += horizontal_sums<T>(s0, s1, s2, s3);
    }
  }
}

// y -= sum_q left[q] b_q + right[q] c_q over columns begin .. end, b_q = b + q * ld.
template <typename T>
void subtract_pairs(int64_t count, const T* left, const T* b, const T* right, const T* c, int64_t ld,
                    int64_t begin, int64_t end, T* y) {
  constexpr int64_t w = kWidth<T>;
  int64_t q = 0;
  for (; q + 4 <= count; q += 4) {
    const T* b0 = b + q * ld;
    const T* c0 = c + q * ld;
    const T l0 = left[q], l1 = left[q + 1], l2 = left[q + 2], l3 = left[q + 3];
    const T r0 = right[q], r1 = right[q + 1], r2 = right[q + 2], r3 = right[q + 3];
    for (int64_t j = begin; j < end; j += w) {
      const Lane<T> low =
          l0 * load(b0 + j) + l1 * load(b0 + ld + j) + l2 * load(b0 + 2 * ld + j) + l3 * load(b0 + 3 * ld + j);
      const Lane<T> high =
          r0 * load(c0 + j) + r1 * load(c0 + ld + j) + r2 * load(c0 + 2 * ld + j) + r3 * load(c0 + 3 * ld + j);
      store(y + j, load(y + j) - (low + high));
    }
  }
  for (; q < count; ++q) {
    for (int64_t j = begin; j < end; j += w)
      store(y + j, load(y + j) - (left[q] * load(b + q * ld + j) + right[q] * load(c + q * ld + j)));
  }
}

// out[q] = <b_q, v> over columns begin .. end.
template <typename T>
void dots(int64_t count, const T* b, int64_t ld, const T* v, int64_t begin, int64_t end, T* out) {
  constexpr int64_t w = kWidth<T>;
  int64_t q = 0;
  for (; q + 4 <= count; q += 4) {
    const T* b0 = b + q * ld;
    Lane<T> s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int64_t j = begin; j < end; j += w) {
      const Lane<T> vj = load(v + j);
      s0 += load(b0 + j) * vj;
      s1 += load(b0 + ld + j) * vj;
      s2 += load(b0 + 2 * ld + j) * vj;
      s3 += load(b0 + 3 * ld + j) * vj;
    }
    *reinterpret_cast<Vec<T, 4 * sizeof(T)>*>(out + q) = horizontal_sums<T>(s0, s1, s2, s3);
  }
  for (; q < count; ++q) {
    Lane<T> s = {};
    for (int64_t j = begin; j < end; j += w) s += load(b + q * ld + j) * load(v + j);
    out[q] = horizontal_sum<T>(s);
  }
}

// The operands of an update from `rows` of V and, `rows` behind them, of W: behind these -W, then -V. Columns
// first .. last; V is copied from v_rows where that is not null.
template <typename T>
void fill_operands(T* pair, int64_t ld, int64_t rows, const T* v_rows, int64_t first, int64_t last) {
  for (int64_t i = 0; i < rows; ++i) {
    T* v = pair + i * ld;
    T* w = v + rows * ld;
    T* minus_w = w + rows * ld;
    T* minus_v = minus_w + rows * ld;
    if (v_rows != nullptr)
      for (int64_t j = first; j < last; ++j) v[j] = v_rows[i * ld + j];
    for (int64_t j = first; j < last; ++j) minus_w[j] = -w[j];
    for (int64_t j = first; j < last; ++j) minus_v[j] = -v[j];
  }
}

// sum += other, of `rows` rows.
template <typename T>
void add_rows(int64_t rows, const T* other, int64_t ld, int64_t first, int64_t last, T* sum) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = first; j < last; ++j) sum[i * ld + j] += other[i * ld + j];
}

// --- f(T), of which a shift is a lane: `wide` of them, a multiple of eight.

using Reals = Vec<double, DSE_VECTOR_BYTES>;
constexpr int64_t kReals = DSE_VECTOR_BYTES / sizeof(double);
constexpr int64_t kBlockReals = kBlock / kReals;

DSE_INLINE Reals load_reals(const double* p) { return *reinterpret_cast<const Reals*>(p); }
DSE_INLINE void store_reals(double* p, const Reals& v) { *reinterpret_cast<Reals*>(p) = v; }

// Inverses of the pivots of T + s = L D L^T: inverse[i * wide + s].
void invert_pivots(int64_t n, int64_t wide, const double* diagonal, const double* off, const double* shift,
                   double* inverse) {
  for (int64_t s = 0; s < wide; s += kReals) {
    const Reals own = load_reals(shift + s);
    Reals before = 1.0 / (diagonal[0] + own);
    store_reals(inverse + s, before);
    for (int64_t i = 1; i < n; ++i) {
      before = 1.0 / (diagonal[i] + own - off[i - 1] * off[i - 1] * before);
      store_reals(inverse + i * wide + s, before);
    }
  }
}

// Rows k0 .. k0 + rows of the inverses, from the last one up. Every row is a multiple of the next one to the
// right of the diagonal: ratio[i * wide + s], its diagonal entry is entry[i * wide + s]. ratios: those to the row
// below the block, weighted; reach: that of the first row. `corner` is the diagonal entry below the block, and
// becomes that of its first row.
template <typename T>
void shifted_ratios(int64_t wide, int64_t k0, int64_t rows, int64_t n, const double* off, const double* inverse,
                    const double* weight, double* corner, double* ratio, double* entry, double* reach,
                    T* ratios) {
  for (int64_t s = 0; s < wide; s += kReals) {
    Reals along = Reals{} + 1.0, diagonal = load_reals(corner + s);
    const Reals own = load_reals(weight + s);
    for (int64_t i = rows - 1; i >= 0; --i) {
      const Reals pivot = load_reals(inverse + (k0 + i) * wide + s);
      const Reals step = k0 + i + 1 < n ? -off[k0 + i] * pivot : Reals{};
      along *= step;
      diagonal = pivot + step * step * diagonal;
      store_reals(ratio + i * wide + s, step);
      store_reals(entry + i * wide + s, diagonal);
      const Reals scaled = own * along;
      for (int64_t l = 0; l < kReals; ++l) ratios[i * wide + s + l] = static_cast<T>(scaled[l]);
    }
    store_reals(corner + s, diagonal);
    store_reals(reach + s, along);
  }
}

// From these, f(T) within the block, into `block` (kBlock x kBlock) on and above the diagonal. The row below the
// block of every inverse, in `turned` (ld apart), becomes the block's first one.
template <typename T>
void shifted_rows(int64_t shifts, int64_t wide, int64_t k0, int64_t rows, const double* weight,
                  const double* ratio, const double* entry, const double* reach, double* block, T* turned,
                  int64_t ld) {
  Reals index[kBlockReals];
  for (int64_t v = 0; v < kBlockReals; ++v)
    for (int64_t l = 0; l < kReals; ++l) index[v][l] = static_cast<double>(v * kReals + l);
  std::fill(block, block + kBlock * kBlock, 0.0);
  for (int64_t s = 0; s < shifts; ++s) {
    Reals row[kBlockReals] = {};
    for (int64_t i = rows - 1; i >= 0; --i) {
      const Reals own = Reals{} + entry[i * wide + s];
      const auto here = static_cast<double>(i);
      for (int64_t v = 0; v < kBlockReals; ++v) {
        row[v] = index[v] == here ? own : row[v] * ratio[i * wide + s];
        double* sum = block + i * kBlock + v * kReals;
        store_reals(sum, load_reals(sum) + weight[s] * row[v]);
      }
    }
    T* all = turned + s * ld;
    const T factor = static_cast<T>(reach[s]);
    for (int64_t j = k0 + kBlock; j < ld; ++j) all[j] *= factor;
    for (int64_t v = 0; v < kBlockReals; ++v)
      for (int64_t l = 0; l < kReals; ++l) all[k0 + v * kReals + l] = static_cast<T>(row[v][l]);
  }
}

// S of the product of a block's reflectors, I - V S V^T, turned: row by row of it, S[i][i] = factor[i] and
// S[0..i, i] = -factor[i] S V^T v_i. `gram` is V^T V, of which the upper triangle is read; kBlock x kBlock both.
template <typename T>
void block_reflector(int64_t rows, const T* gram, const double* factor, T* turned) {
  double s[kBlock * kBlock] = {};
  for (int64_t i = 0; i < rows; ++i) {
    Reals total[kBlockReals] = {};
    for (int64_t r = 0; r < i; ++r) {
      const double along = static_cast<double>(gram[r * kBlock + i]);
      for (int64_t v = 0; v < kBlockReals; ++v) total[v] += load_reals(s + r * kBlock + v * kReals) * along;
    }
    for (int64_t v = 0; v < kBlockReals; ++v) store_reals(s + i * kBlock + v * kReals, -factor[i] * total[v]);
    s[i * kBlock + i] = factor[i];
  }
  for (int64_t i = 0; i < kBlock * kBlock; ++i) turned[i] = static_cast<T>(s[i]);
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
