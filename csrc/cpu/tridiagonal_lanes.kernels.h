// Reduction, iteration and way back for eight matrices at once, for one instruction set: see every_isa.h and
// tridiagonal_lanes.cpp. Vectors of eight elements always; narrower registers take them in pieces.

namespace dse::cpu::DSE_ISA {
namespace {

template <typename T>
using Eight = Vec<T, 8 * sizeof(T)>;
// What a register holds of them, for steps that compare: those of wider vectors go element by element.
constexpr int kPart = DSE_VECTOR_BYTES / sizeof(double);
typedef double Part __attribute__((vector_size(DSE_VECTOR_BYTES)));
typedef long long Mask __attribute__((vector_size(DSE_VECTOR_BYTES)));

// Rows of a pass whose operands stay in registers: sixteen of 32 bytes, or 32 of 64.
template <typename T>
constexpr int kRows = sizeof(T) * 4 <= DSE_VECTOR_BYTES / 2 ? 4 : 2;

DSE_INLINE Part magnitude(Part x) { return x < 0.0 ? -x : x; }
template <typename V>
DSE_INLINE V square_root(V x) {
  V r;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) r[lane] = std::sqrt(x[lane]);
  return r;
}
DSE_INLINE bool any(Mask m) {
  long long bits = 0;
  for (int lane = 0; lane < kPart; ++lane) bits |= m[lane];
  return bits != 0;
}

// p += A v for R rows of the lower triangle from row i on, columns `first` and on.
template <int R, typename V>
DSE_INLINE void multiply_lower(const V* a, int64_t n, int64_t first, int64_t i, const V* v, V* p) {
  const V* row[R];
  V own[R], sum[R];
  for (int r = 0; r < R; ++r) {
    row[r] = a + (i + r) * n;
    own[r] = v[i + r];
    sum[r] = V{};
  }
  for (int64_t j = first; j < i; ++j) {
    const V vj = v[j];
    V pj = p[j];
    for (int r = 0; r < R; ++r) {
      const V x = row[r][j];
      sum[r] += x * vj;
      pj += x * own[r];
    }
    p[j] = pj;
  }
  for (int r = 0; r < R; ++r) {
    for (int q = 0; q < r; ++q) {
      const V x = row[r][i + q];
      sum[r] += x * own[q];
      p[i + q] += x * own[r];
    }
    p[i + r] += sum[r] + row[r][i + r] * own[r];
  }
}

// Rows i .. i + R of A -= v p^T + p v^T, to the diagonal.
template <int R, typename V>
DSE_INLINE void update_lower(V* a, int64_t n, int64_t first, int64_t i, const V* v, const V* p) {
  V* row[R];
  V vi[R], pi[R];
  for (int r = 0; r < R; ++r) {
    row[r] = a + (i + r) * n;
    vi[r] = v[i + r];
    pi[r] = p[i + r];
  }
  for (int64_t j = first; j <= i; ++j) {
    const V vj = v[j], pj = p[j];
    for (int r = 0; r < R; ++r) row[r][j] -= vi[r] * pj + pi[r] * vj;
  }
  for (int r = 1; r < R; ++r)
    for (int64_t j = i + 1; j <= i + r; ++j) row[r][j] -= vi[r] * p[j] + pi[r] * v[j];
}

// Rows and columns k + 1 .. n of the symmetric matrix below the diagonal of a: H A H, H = I - factor v v^T.
template <typename T>
DSE_INLINE void reflect(Eight<T>* a, int64_t n, int64_t k, const Eight<T>* v, Eight<T> factor, Eight<T>* p) {
  using V = Eight<T>;
  constexpr int R = kRows<T>;
  for (int64_t i = k + 1; i < n; ++i) p[i] = V{};
  int64_t i = k + 1;
  for (; i + R <= n; i += R) multiply_lower<R>(a, n, k + 1, i, v, p);
  for (; i < n; ++i) multiply_lower<1>(a, n, k + 1, i, v, p);
  V along = {};
  for (i = k + 1; i < n; ++i) {
    p[i] *= factor;
    along += p[i] * v[i];
  }
  const V half = T(0.5) * factor * along;
  for (i = k + 1; i < n; ++i) p[i] -= half * v[i];
  for (i = k + 1; i + 2 <= n; i += 2) update_lower<2>(a, n, k + 1, i, v, p);
  for (; i < n; ++i) update_lower<1>(a, n, k + 1, i, v, p);
}

// A = Q T Q^T. On return diagonal and off (off[i] couples i and i + 1) hold T; the reflectors are in the upper
// triangle, v_k in row k, columns k + 1 and on, and their factors in beta.
template <typename T>
void tridiagonalize(int64_t n, Eight<T>* a, Eight<T>* diagonal, Eight<T>* off, Eight<T>* beta, Eight<T>* p) {
  using V = Eight<T>;
  const V zero = {}, one = zero + T(1);
  for (int64_t k = 0; k + 2 < n; ++k) {
    V* v = a + k * n;  // row k, right of the diagonal
    V tail = {};
    for (int64_t i = k + 1; i < n; ++i) {
      v[i] = a[i * n + k];
      if (i > k + 1) tail += v[i] * v[i];
    }
    const V head = v[k + 1];
    const V norm = square_root(head * head + tail);
    const auto reflects = tail > kLeastSquare<T>;
    // The sign that adds, so that nothing cancels.
    const V alpha = head > T(0) ? -norm : norm;
    const V first = reflects ? head - alpha : zero;
    const V square = first * first + tail;
    const V factor = reflects ? T(2) / (reflects ? square : one) : zero;
    v[k + 1] = first;
    off[k] = reflects ? alpha : head;
    beta[k] = factor;
    reflect<T>(a, n, k, v, factor, p);
  }
  for (int64_t i = 0; i < n; ++i) diagonal[i] = a[i * n + i];
  if (n > 1) off[n - 2] = a[(n - 1) * n + n - 2];
  off[n - 1] = zero;
}

// QL iterations without square roots on squares of the couplings, e[i] (Pal, Walker & Kahan; Parlett, "The
// Symmetric Eigenvalue Problem", 8.15): eigenvalues of the tridiagonal matrices into d. A step waits for its
// divisions; the parts of eight lanes take turns. Returns false if an iteration did not converge.
bool iterate(int64_t n, double* d_lanes, double* e_lanes) {
  constexpr int kParts = 8 / kPart;
  Part* d = reinterpret_cast<Part*>(d_lanes);
  Part* e = reinterpret_cast<Part*>(e_lanes);
  const Part zero = {}, one = zero + 1.0;
  for (int64_t l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      // First decoupled index m >= l of every lane.
      Mask m[kParts], coupled[kParts];
      for (int q = 0; q < kParts; ++q) {
        m[q] = Mask{} + l;
        coupled[q] = ~Mask{};
      }
      int64_t furthest = l;
      for (; furthest + 1 < n; ++furthest) {
        Mask still = {};
        for (int q = 0; q < kParts; ++q) {
          const Part small =
              kEps * (magnitude(d[furthest * kParts + q]) + magnitude(d[(furthest + 1) * kParts + q]));
          const Part square = e[furthest * kParts + q];
          coupled[q] &= (square > small * small) & (square > kLeast);
          m[q] -= coupled[q];  // true is -1
          still |= coupled[q];
        }
        if (!any(still)) break;
      }
      if (furthest == l) break;
      if (sweep == kMaxSweeps) return false;
      Part shift[kParts], c[kParts], s[kParts], gamma[kParts], p[kParts];
      for (int q = 0; q < kParts; ++q) {
        const Mask active = m[q] > l;
        const Part first = d[l * kParts + q];
        const Part coupling = active ? square_root(e[l * kParts + q]) : one;
        const Part half_gap = (d[(l + 1) * kParts + q] - first) / (2.0 * coupling);
        const Part root = square_root(half_gap * half_gap + 1.0);
        shift[q] = first - coupling / (half_gap + (half_gap < 0.0 ? -root : root));
        Part end;
        for (int lane = 0; lane < kPart; ++lane) end[lane] = d[m[q][lane] * kParts + q][lane];
        c[q] = one;
        s[q] = zero;
        gamma[q] = end - shift[q];
        p[q] = gamma[q] * gamma[q];
      }
      for (int64_t i = furthest - 1; i >= l; --i) {
        for (int q = 0; q < kParts; ++q) {
          const Mask now = m[q] > i, inner = m[q] > i + 1;
          const Part square = e[i * kParts + q], own = d[i * kParts + q];
          const Part total = p[q] + square, last = gamma[q];
          const Part inverse = 1.0 / (now ? total : one);
          const Part secant = total / (p[q] > 0.0 ? p[q] : one);  // 1 / cosine, which does not wait for it
          e[(i + 1) * kParts + q] = inner ? s[q] * total : e[(i + 1) * kParts + q];
          const Part cosine = p[q] * inverse, sine = square * inverse;
          const Part next = cosine * (own - shift[q]) - sine * last;
          d[(i + 1) * kParts + q] = now ? last + (own - next) : d[(i + 1) * kParts + q];
          const Mask turns = cosine > kLeast;
          const Part rest = turns ? next * next * secant : c[q] * square;
          p[q] = now ? rest : p[q];
          c[q] = now ? cosine : c[q];
          s[q] = now ? sine : s[q];
          gamma[q] = now ? next : last;
        }
      }
      for (int q = 0; q < kParts; ++q) {
        const Mask active = m[q] > l;
        e[l * kParts + q] = active ? s[q] * p[q] : e[l * kParts + q];
        d[l * kParts + q] = active ? shift[q] + gamma[q] : d[l * kParts + q];
      }
    }
  }
  return true;
}

// Inverses of the pivots of T + shift, shift by shift.
template <typename T>
void invert_pivots(int64_t n, int64_t count, const Eight<double>* diagonal, const Eight<double>* off,
                   const Eight<double>* shift, Eight<T>* pivot) {
  for (int64_t s = 0; s < count; ++s) {
    Eight<double> inverse = {};
    for (int64_t i = 0; i < n; ++i) {
      Eight<double> value = diagonal[i] + shift[s];
      if (i > 0) value -= off[i - 1] * off[i - 1] * inverse;
      inverse = 1.0 / value;
      pivot[s * n + i] = __builtin_convertvector(inverse, Eight<T>);
    }
  }
}

// Below the diagonal of a (with it): Q f(T) Q^T, from the last row up. At row k the block below is complete and
// `row` holds row k + 1 of every inverse, both turned by all reflectors from k + 1 on; reflector k turns them,
// then row k is row k + 1 times a ratio of pivots, beside a diagonal entry of its own.
template <typename T>
void way_back(int64_t n, Eight<T>* a, const Eight<T>* off, const Eight<T>* beta, const ShiftLanes<T>& shifts,
              Eight<T>* p) {
  using V = Eight<T>;
  for (int64_t k = n - 1; k >= 0; --k) {
    const V* v = a + k * n;
    const bool reflects = k + 2 < n;
    if (reflects) reflect<T>(a, n, k, v, beta[k], p);
    for (int64_t i = k; i < n; ++i) p[i] = V{};
    for (int64_t s = 0; s < shifts.count; ++s) {
      V* row = shifts.row + s * n;
      const V inverse = shifts.pivot[s * n + k], weight = shifts.weight[s];
      V corner = inverse;
      if (k + 1 < n) {
        const V ratio = -off[k] * inverse;
        corner += ratio * ratio * shifts.corner[s];
        if (reflects) {
          V dot0 = {}, dot1 = {};
          int64_t j = k + 1;
          for (; j + 1 < n; j += 2) {
            dot0 += row[j] * v[j];
            dot1 += row[j + 1] * v[j + 1];
          }
          if (j < n) dot0 += row[j] * v[j];
          const V along = beta[k] * (dot0 + dot1);
          for (j = k + 1; j < n; ++j) {
            row[j] = ratio * (row[j] - along * v[j]);
            p[j] += weight * row[j];
          }
        } else {
          for (int64_t j = k + 1; j < n; ++j) {
            row[j] *= ratio;
            p[j] += weight * row[j];
          }
        }
      }
      shifts.corner[s] = corner;
      row[k] = corner;
      p[k] += weight * corner;
    }
    for (int64_t j = k; j < n; ++j) a[j * n + k] = p[j];
  }
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
