// Effective rank of one large matrix X and what its gradient needs, without an eigensolver.
//
// From C = X^T X (or X X^T), m x m with eigenvalues lambda = sigma^2, are wanted
//   S = sum sigma, h = -sum p log p, p = sigma / S, value = exp(h),
//   F = V diag(w / sigma) V^T, w = -(value / S) (log p + h), so that the gradient is X F (or F X).
// An eigensolver is a long chain of small steps. Both functions of the matrix, C^(-1/2) and C^(-1/2) log C, are
// instead sums of inverses of shifted copies, with the same shifts s:
//   lambda^(-1/2)            ~  sum_j a_j / (lambda + s_j),
//   lambda^(-1/2) log lambda ~  sum_j b_j / (lambda + s_j).
// The integrals over t of 1 / (t^2 + lambda) and 2 log t / (t^2 + lambda) are the origin of this (Hale, Higham
// and Trefethen, "Computing A^alpha, log(A), and related matrix functions by contour integrals", 2008); elliptic
// nodes suit the first only, so nodes and weights are fitted to both, by minimax over sigma / sqrt(bound) from
// 1e-7 to 1.
//
// The value needs more digits than 20 inverses give that way, but only traces, and each inverse gives three:
//   tr (C + s)^-1, tr (C + s)^-2 (a sum of squares) and log det (C + s) (from the pivots),
// that is sums over the spectrum of  l / (l + s),  s l / (l + s)^2  and  log(1 + l / s); with all three the error
// is about the square: the first harmonic of the nodes' spacing cancels.
//
// F is put together so that <C, F> = 0 but for rounding (the value does not change when X is scaled), which also
// removes the error that a nearly flat spectrum, whose gradient is small, would suffer from.
//
// Accuracy of value and of X F, relative, exact C: 2e-7 (1e-6 in the worst case, rank 1) and 6e-5 for a ratio of
// singular values above 1e-4; X F 6e-4 at 1e-6 and 2e-3 at 3e-7. Singular values below about 1e-7 of the largest
// are rounding of C in float64: their share of the gradient is damped, not amplified.
//
// Inverses: in place, blocks of 64, on the upper tiles only. Step K turns tile row K into the inverse's:
//   L L^T = A_KK, P_j = L^-1 A_Kj, A_ij -= P_i^T P_j, A_Kj = L^-T P_j, A_KK = -L^-T L^-1;
// after the last step A is -(C + s)^-1. Going through L^-1 matters: with the explicit A_KK^-1 in the update,
// later pivots turn negative at the condition numbers of the smallest shifts (tried: 1e13). All shifts of a batch
// take a step together; the block that updates the next diagonal tile factors it at once, beside the other tiles'
// updates.
//
// Operations: m^3 each shift (20 with a gradient, 14 without) and 192 m^2 for its panels: 25 GFLOP at m = 1024,
// 0.38 ms at the 67 TFLOP/s of an H200. Every step reads and writes the upper tiles, 4.5 MB a shift at m = 1024:
// 2.9 GB in all, 0.7 ms at 4.3 TB/s from memory, less where a batch's tiles stay in the 50 MB L2 cache (a batch
// of 8 there). 2 launches a step and batch: 32 per batch at m = 1024.
#pragma once

#include <cmath>

#include "cuda/device.cuh"
#include "cuda/features.cuh"

namespace dse::cuda {

inline constexpr int kMatrixTile = 64;
inline constexpr int kMatrixTileElements = kMatrixTile * kMatrixTile;
// 4 mod 16: fragments of either orientation come without bank conflicts.
inline constexpr int kMatrixTilePitch = kMatrixTile + 4;
inline constexpr int kMatrixTileThreads = 128;
inline constexpr int kMaxShifts = 20;
inline constexpr int kAccumulateThreads = 512;

// Upper tiles (i <= j) of a `tiles` x `tiles` matrix, row by row, each 64 x 64 row-major and contiguous.
DSE_HOST_DEVICE inline int64_t upper_tiles(int64_t tiles) { return tiles * (tiles + 1) / 2; }
DSE_HOST_DEVICE inline int64_t upper_tile_index(int64_t tiles, int64_t i, int64_t j) {
  return i * tiles - i * (i - 1) / 2 + (j - i);
}
DSE_HOST_DEVICE inline void upper_tile_position(int64_t tiles, int64_t index, int* i, int* j) {
  int64_t row = 0;
  while (index >= tiles - row) index -= tiles - row++;
  *i = static_cast<int>(row);
  *j = static_cast<int>(row + index);
}

// Shifts and weights for a matrix scaled to norm <= 1.
struct ShiftTable {
  int count;
  double shift[kMaxShifts];
  double inverse_root[kMaxShifts], root_log[kMaxShifts];
  // [0] sum of sigma, [1] sum of sigma log sigma^2; for l / (l + s), s l / (l + s)^2 and log(1 + l / s).
  double trace[2][3][kMaxShifts];
  double linear[2];  // for l
};

// Largest errors at x = sigma / sqrt(bound) in [1e-3, 1], [1e-5, 1e-3), [1e-6, 1e-5), [1e-7, 1e-6):
//   x * inverse root (exactly 1)       1e-5  5e-4  4e-3  1.2e-2
//   x * root log (exactly 2 log x)     2e-4  1e-2  9e-2  5e-1
//   sigma / x (exactly 1)              2e-7  1e-5  1e-4  8e-4
//   sigma log / x (exactly 2 log x)    4e-6  3e-4  4e-3  3e-2
inline constexpr ShiftTable kGradientShifts = {
    20,
    {8.0151903722607806e-15, 2.5588292809160747e-13, 3.4615114217100748e-12, 3.3913773346838578e-11,
     2.6963940710205536e-10, 1.845085388433814e-09,  1.121421608734996e-08,  6.1638769363749944e-08,
     3.1162788423188622e-07, 1.4841298961599511e-06, 6.8525091900102209e-06, 3.1279540792609482e-05,
     0.00014212488225931539, 0.00064346903929210421, 0.0029003186020265777,  0.013006669145622462,
     0.058415607198291829,   0.27579142030048281,    1.7051810762046051,     41.168797312481175},
    {1.3714941936637734e-07, 4.6050792438588775e-07, 1.426299113269188e-06,  4.0210465853805652e-06,
     1.0394170116291612e-05, 2.5456431867441712e-05, 5.9017654813281046e-05, 0.00013116683437372061,
     0.00028170823154745117, 0.00059766657123330421, 0.0012678998150487326,  0.0026989377776716304,
     0.0057358951861664984,  0.012181874459639573,   0.025755310731333365,   0.054442386677933358,
     0.11621261542745,       0.27150142171360481,    0.89393113141222291,    10.311058735846997},
    {-4.5508675634181811e-06, -1.3269632060065532e-05, -3.7762353381437125e-05, -9.6745563758857152e-05,
     -0.00022931965668550103, -0.00051151109632044574, -0.0010810038596827942,  -0.0021767064311337785,
     -0.0042218917941938792,  -0.0080185417574869036,  -0.015081123374470927,   -0.027986052289919634,
     -0.050830746355193551,   -0.089484088482147076,   -0.15056324360382975,    -0.23624051268739044,
     -0.33040788876243904,    -0.34909026537376697,    0.47534517692542549,     41.879328528052049},
    {{{-8.3237261802493731e-08, 2.5697641446161658e-07, -1.1720033668445733e-06, 3.1397298634669343e-06,
       -9.6446078757617315e-06, 2.3475128796036449e-05, -7.0555208676851696e-05, 0.00020159719734315937,
       -0.00061935474811458007, 0.0015623750563267061,  -0.0035711858587805529,  0.0071876115858083749,
       -0.014074973585341845,   0.023222124028892857,   -0.029792946978970884,   -0.00098540642351586764,
       0.091630461102528371,    -0.12957749704847837,   -0.29153655842688714,    0.55258722318713527},
      {1.502079276029974e-07,  -2.0945845124498471e-07, 1.0277708949427922e-06, -2.6974916246929582e-06,
       8.807705717460026e-06,  -2.0655789242907809e-05, 5.8976935374292858e-05, -0.0001496329067761509,
       0.00044791133729382146, -0.0011947355957704453,  0.0030881395614256661,  -0.0068952660842593197,
       0.014899457499319129,   -0.028334349670887226,   0.049866895322809093,   -0.062133995609278181,
       0.03523139757289237,    0.07743954748385197,     -0.050766148377792329,  0.94841517438151612},
      {1.315995067568165e-07,  -1.6327772700105819e-07, 2.6045459130391844e-06, -5.0486379065174587e-06,
       2.8433593491557098e-05, -5.6299704054881579e-05, 0.00023479929904879178, -0.000560250977533419,
       0.0020739391717495312,  -0.0051938080117464591,  0.014524563352880713,   -0.030251749812288772,
       0.06930689871553071,    -0.12165754480990194,    0.22647508214213646,    -0.23126335112308183,
       0.16228116277936816,    0.35165033942589546,     0.36897211687999154,    0.32437681429847293}},
     {{2.7847934138149411e-06, -8.5120724450994604e-06, 3.3359434643434393e-05, -8.3276983327563534e-05,
       0.00022267659129809607, -0.00049061540523530074, 0.0012643811281627087,  -0.0030749639513557754,
       0.0073456275033264165,  -0.01216117688181197,    0.011465263681019362,   0.0082334609327959565,
       -0.040333977270402076,  0.026906069420046298,    0.059530158217004615,   -0.017967648648129914,
       -0.1165854931097187,    -0.18072228625125589,    0.20243275533681854,    0.99191079770704371},
      {-5.237165270438404e-06,  7.4007668361125587e-06, -3.1126813292873206e-05, 7.7659766191622934e-05,
       -0.00022308836469433208, 0.00048329403967568765, -0.001201660510117702,   0.0026763495852165759,
       -0.0065977499135971476,  0.0135931729745801,     -0.023573996622618772,   0.025142116988124848,
       -0.0081331706283348272,  -0.025952729913439127,  0.0089598470395747688,   0.026908183625096387,
       0.0095689668548602815,   -0.035480311873913643,  -0.37200875105464698,    1.2725818621696585},
      {-4.3175830089719637e-06, 6.8501250968275498e-06, -7.4440768674814933e-05, 0.00015126649014614586,
       -0.00068731992329601,    0.0013331684019712098,  -0.004584246445219967,   0.0098028862384557068,
       -0.029044665184077993,   0.05517737145072734,    -0.10253457766731289,    0.08942592486781023,
       -0.041752909132629766,   -0.11567306681873121,   -0.018490432617205552,   0.02308006915271112,
       0.012745720612137452,    0.13622325087950352,    0.83790668656801259,     0.82977107005172579}}},
    {0.063921967753689968, 0.64432860532530789},
};
// For the value alone (the columns of the matrix functions are not used); errors as above:
//   sigma / x                          1e-7  4e-6  4e-5  3e-4
//   sigma log / x                      1e-6  6e-5  1e-3  1e-2
inline constexpr ShiftTable kValueShifts = {
    14,
    {1.003754486128829e-14, 2.2640071539732477e-14, 1.9210281244509739e-12, 4.8829349672438022e-11,
     8.7698495802489771e-10, 1.2281087258176366e-08, 1.4654901430433427e-07, 1.6202998121112046e-06,
     1.7594376921818811e-05, 0.00019125537360429093, 0.0020800356702354666, 0.022497716501917703,
     0.28355463603623582, 24.223373674317049},
    {5.3637289500174065e-07, -4.3976769161828849e-07, 2.2526014029062025e-06, 4.9542336762705801e-06,
     3.008707339926332e-05, 8.0467264711498015e-05, 0.00031611081376871434, 0.00091827627780912769,
     0.0033203352894198399, 0.010055770988618306, 0.035982699005758331, 0.109828310342147, 0.49448678007580621,
     11.59137786874992},
    {1.0870241533644175e-06, -1.015492961952998e-05, -4.1513152283211425e-05, -0.0001674917960502575,
     -0.00050667634915886476, -0.0017217177448119335, -0.0044449228721952262, -0.013410880379836751,
     -0.033387519645908317, -0.093848325476707226, -0.20279555933154442, -0.4612778189830915,
     -0.48455927021410683, 29.904996625623305},
    {{{4.955453769884663e-07, 2.6641499829761969e-06, -2.0066999562660847e-07, -7.0452392649834279e-07,
       -2.2307526117848421e-06, -6.8378949713490757e-06, -2.1189352280430345e-05, -6.9730729037680456e-05,
       -0.00022780213634171446, -0.00076714713856939547, -0.0024187547527720855, -0.0090721436520792269,
       -0.061400830188700586, 433.5016780568065},
      {3.4423528401815097e-07, 8.086333051329544e-07, 2.4047635241652543e-07, 7.8317166578476967e-07,
       2.4878817120047524e-06, 7.3693886848740814e-06, 2.2041424566939678e-05, 7.0143236750765716e-05,
       0.00022793357812940062, 0.00076469332036079897, 0.0024547422123735604, 0.0085301179836299677,
       0.045386456012394161, -77.607637230598129},
      {-3.9555454771105566e-06, 4.1209564120201084e-06, 8.1638509561520454e-07, 3.5307422061775177e-06,
       1.3472294705333912e-05, 4.6505444508001983e-05, 0.00015306011869661555, 0.00050175689772843923,
       0.0016465811456790455, 0.0054577511449908798, 0.017829035303110141, 0.06018523938422031,
       0.25891667793683609, -532.47193774938773}},
     {{4.3035584930706719e-05, -2.8007414139444422e-05, 4.5406137723590045e-06, 1.3644783407919326e-05,
       3.7406375631638032e-05, 9.5660607400708928e-05, 0.00024850262652692013, 0.00064479518953089161,
       0.0015972235438929893, 0.0034610969346091556, 0.005388419357709842, -0.0016905357306010223,
       -0.11784896135746196, -87.30814421879812},
      {-1.990436202077321e-05, -1.7272935865503694e-05, -6.0341006208328999e-06, -1.692344637335417e-05,
       -4.7258406794408807e-05, -0.00011865752946293194, -0.00030454826270915849, -0.00078950430807959613,
       -0.0020559309265167362, -0.0049708937091039662, -0.010417061149719412, -0.014591448975596335,
       0.025858833060053397, 92.282432457425728},
      {-1.7161684505215896e-05, 1.2365073482525975e-05, -2.0223714302716286e-05, -7.5931051845533226e-05,
       -0.00025230558824745729, -0.00074593385863971646, -0.0020846840090472567, -0.0056060866471836709,
       -0.014537120393163076, -0.034952302664306295, -0.07237815570514286, -0.097362615873112957,
       0.22973089424649634, -91.142576455062354}}},
    {7.5547735734022829, 4.7718392895669623},
};

// Scalars that one kernel leaves for the next.
struct RankScalars {
  double inverse_scale;            // a power of two: C times it has norm <= 1 (0 where C is zero or not finite)
  double bound;                    // upper bound of that norm, in [0.5, 1]; the shifts are relative to it
  double trace;                    // of the scaled matrix
  double status;                   // 0 a proper matrix, 1 zero, 2 not finite
  double root_weight, log_weight;  // F = root_weight A1 + log_weight A2
  double zeros;                    // on the diagonal: as many eigenvalues vanish by construction
};

struct RankWorkspace {
  int64_t tiles, packed;  // tiles a side, upper tiles
  RankScalars* scalars;
  double* row_sums;       // tiles x (64 * tiles)
  double* squares;        // packed
  double* traces;         // shift x packed: trace of the inverse
  double* trace_squares;  // shift x packed: squared Frobenius norm of the inverse
  double* log_dets;       // shift x tiles
  double* products;       // 2 x packed: <C, A1>, <C, A2>
  double* inverse_l;      // batch x 4096
  double* panel;          // batch x tiles x 4096
  double* shifted;        // batch x packed x 4096
  double* sums;           // 2 x packed x 4096: A1, A2
};

inline int64_t rank_workspace_layout(int64_t m, int64_t batch, double* base, RankWorkspace* out) {
  const int64_t tiles = (m + kMatrixTile - 1) / kMatrixTile, packed = upper_tiles(tiles);
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    double* at = base == nullptr ? nullptr : base + used;
    used += (count + 15) / 16 * 16;
    return at;
  };
  RankWorkspace w;
  w.tiles = tiles;
  w.packed = packed;
  w.scalars = reinterpret_cast<RankScalars*>(take(sizeof(RankScalars) / sizeof(double)));
  w.row_sums = take(tiles * tiles * kMatrixTile);
  w.squares = take(packed);
  w.traces = take(kMaxShifts * packed);
  w.trace_squares = take(kMaxShifts * packed);
  w.log_dets = take(kMaxShifts * tiles);
  w.products = take(2 * packed);
  w.inverse_l = take(batch * kMatrixTileElements);
  w.panel = take(batch * tiles * kMatrixTileElements);
  w.shifted = take(batch * packed * kMatrixTileElements);
  w.sums = take(2 * packed * kMatrixTileElements);
  if (out != nullptr) *out = w;
  return used;
}

// Bytes of workspace (aligned to 128 bytes by the caller).
inline int64_t effective_rank_workspace(int64_t m, int batch) {
  return rank_workspace_layout(m, batch, nullptr, nullptr) * static_cast<int64_t>(sizeof(double));
}

// Element of the symmetric matrix whose upper triangle is given; zero outside.
__device__ __forceinline__ double symmetric_at(const double* c, int64_t m, int64_t row, int64_t column) {
  if (row >= m || column >= m) return 0.0;
  return row <= column ? c[row * m + column] : c[column * m + row];
}

// Product of two 64-wide operands in shared memory, one 32 x 32 quarter of it a warp (4 warps):
// acc += A B over k in [k0, k1); A[r][k] at a[r * pitch + k], or at a[k * pitch + r] where kTransposeA.
struct QuarterTile {
  double at[4][4][2];
};
template <bool kTransposeA>
__device__ __forceinline__ void multiply_quarter(const double* a, const double* b, int row0, int column0, int k0,
                                                 int k1, QuarterTile& acc) {
  const int quad = lane_id() / 4, within = lane_id() % 4;
  for (int k = k0; k < k1; k += 4) {
    double left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + 8 * i + quad;
      left[i] = kTransposeA ? a[(k + within) * kMatrixTilePitch + row] : a[row * kMatrixTilePitch + k + within];
      right[i] = b[(k + within) * kMatrixTilePitch + column0 + 8 * i + quad];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_f64(acc.at[i][j], left[i], right[j]);
    }
  }
}
__device__ __forceinline__ void clear(QuarterTile& acc) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc.at[i][j][0] = acc.at[i][j][1] = 0.0;
  }
}
// Calls put(row, column, pair): pair[0] and pair[1] are the elements at column and column + 1.
template <class Put>
__device__ __forceinline__ void for_each_pair(int row0, int column0, const QuarterTile& acc, const Put& put) {
  const int quad = lane_id() / 4, within = lane_id() % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) put(row0 + 8 * i + quad, column0 + 8 * j + 2 * within, acc.at[i][j]);
  }
}

// --- Norm -----------------------------------------------------------------------------------------------------

// One block an upper tile: its share of the sums of |row| and of the squares.
static __global__ void __launch_bounds__(kMatrixTileThreads)
    rank_norm_partials(const double* c, int64_t m, RankWorkspace w) {
  __shared__ double tile[kMatrixTile * (kMatrixTile + 1)];
  __shared__ double scratch[33];
  int bi, bj;
  upper_tile_position(w.tiles, blockIdx.x, &bi, &bj);
  double squares = 0.0;
  for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads) {
    const int r = e / kMatrixTile, q = e % kMatrixTile;
    const double value = symmetric_at(c, m, int64_t{bi} * kMatrixTile + r, int64_t{bj} * kMatrixTile + q);
    tile[r * (kMatrixTile + 1) + q] = fabs(value);
    squares += value * value;
  }
  block_sync();
  const int line = thread_id() % kMatrixTile;
  double sum = 0.0;
  if (thread_id() < kMatrixTile) {
    for (int q = 0; q < kMatrixTile; ++q) sum += tile[line * (kMatrixTile + 1) + q];
    w.row_sums[(int64_t{bj} * w.tiles + bi) * kMatrixTile + line] = sum;
  } else if (bi != bj) {
    for (int r = 0; r < kMatrixTile; ++r) sum += tile[r * (kMatrixTile + 1) + line];
    w.row_sums[(int64_t{bi} * w.tiles + bj) * kMatrixTile + line] = sum;
  }
  squares = block_sum(squares, scratch);
  if (thread_id() == 0) w.squares[blockIdx.x] = bi == bj ? squares : 2.0 * squares;
}

// One block: the smaller of the Frobenius norm and the largest row sum. Each is at most sqrt(m) times the
// spectral norm, and close to it where the spectrum is steep, which is where the range of the shifts matters.
static __global__ void __launch_bounds__(256) rank_norm(const double* c, int64_t m, RankWorkspace w) {
  __shared__ double scratch[33];
  double total = 0.0, largest = 0.0, squares = 0.0, trace = 0.0, zeros = 0.0;
  const int64_t side = w.tiles * kMatrixTile;
  for (int64_t i = thread_id(); i < side; i += block_threads()) {
    double sum = 0.0;
    for (int64_t b = 0; b < w.tiles; ++b) sum += w.row_sums[b * side + i];
    total += sum;
    largest = sum > largest ? sum : largest;
    if (i >= m) continue;
    trace += c[i * m + i];
    zeros += c[i * m + i] == 0.0 ? 1.0 : 0.0;
  }
  for (int64_t i = thread_id(); i < w.packed; i += block_threads()) squares += w.squares[i];
  total = block_sum(total, scratch);
  largest = block_max(largest, scratch);
  squares = block_sum(squares, scratch);
  trace = block_sum(trace, scratch);
  zeros = block_sum(zeros, scratch);
  if (thread_id() != 0) return;
  RankScalars s;
  const double frobenius = sqrt(squares);
  // Squares may overflow or vanish where the elements do neither.
  const bool usable = frobenius > 1e-150 && frobenius < 1e150;
  const double bound = usable && frobenius < largest ? frobenius : largest;
  const bool finite = total - total == 0.0;
  const bool zero = !(bound > 1e-290);
  int exponent = 0;
  s.bound = 1.0;
  s.inverse_scale = 0.0;
  if (finite && !zero) {
    s.bound = frexp(bound, &exponent);
    s.inverse_scale = ldexp(1.0, -exponent);
  }
  s.trace = finite ? trace * s.inverse_scale : 0.0;
  s.status = !finite ? 2.0 : zero ? 1.0 : 0.0;
  s.root_weight = s.log_weight = 0.0;
  s.zeros = zeros;
  *w.scalars = s;
}

// --- Inverses -------------------------------------------------------------------------------------------------

// Factors a symmetric 64 x 64 tile in shared memory, A = L L^T, one block of 128 threads; writes L^-1 (row-major,
// zeros above the diagonal) and the sum over the first `count` pivots of log(pivot / shift).
// Elimination of [A | I] without its upward half, in place in registers: column k of A, once eliminated, makes
// room for column k of the unit lower factor's inverse. Thread (ty, tx) owns rows ty + 8 i, columns tx + 16 j:
// rows still to be eliminated stay spread over all threads, and one barrier a step is enough. Below the diagonal,
// column k of what is left is read as row k.
__device__ __forceinline__ void factor_tile(const double* tile, double* row, double* pivots, double* scratch,
                                            double shift, int count, double* inverse_l, double* log_det) {
  const int ty = thread_id() / 16, tx = thread_id() % 16;
  double a[8][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = ty + 8 * i, q = tx + 16 * j;
      a[i][j] = r <= q ? tile[r * kMatrixTilePitch + q] : tile[q * kMatrixTilePitch + r];
    }
  }
#pragma unroll
  for (int kk = 0; kk < 8; ++kk) {
#pragma unroll 1
    for (int kr = 0; kr < 8; ++kr) {
      const int k = 8 * kk + kr;
      double* buffer = row + (k & 1) * kMatrixTile;
      if (ty == kr) {
#pragma unroll
        for (int j = 0; j < 4; ++j) buffer[tx + 16 * j] = a[kk][j];
      }
      block_sync();
      // At least the shift but for rounding.
      double pivot = buffer[k];
      pivot = pivot > 0.25 * shift ? pivot : 0.25 * shift;
      const double inverse = 1.0 / pivot;
      double right[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) right[j] = buffer[tx + 16 * j];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < kk) continue;
        if (i == kk && ty <= kr) continue;
        const double factor = buffer[ty + 8 * i] * inverse;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool own = j == kk / 2 && tx == (kk % 2) * 8 + kr;  // column k
          a[i][j] = own ? -factor : a[i][j] - factor * right[j];
        }
      }
      if (thread_id() == 0) pivots[k] = pivot;
    }
  }
  block_sync();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int r = ty + 8 * i;
    const double scale = 1.0 / sqrt(pivots[r]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int q = tx + 16 * j;
      inverse_l[r * kMatrixTile + q] = q < r ? a[i][j] * scale : q == r ? scale : 0.0;
    }
  }
  const double sum = block_sum(thread_id() < count ? log(pivots[thread_id()] / shift) : 0.0, scratch);
  if (thread_id() == 0) *log_det = sum;
}

__device__ __forceinline__ int pivots_within(int64_t m, int64_t tile) {
  const int64_t left = m - tile * kMatrixTile;
  return static_cast<int>(left < kMatrixTile ? left : kMatrixTile);
}

// Grid (upper tiles, batch): the scaled matrix plus shift first + y; ones on the diagonal beyond m. The block of
// the first tile factors it.
static __global__ void __launch_bounds__(kMatrixTileThreads)
    rank_shifted_copies(const double* c, int64_t m, RankWorkspace w, ShiftTable table, int first) {
  __shared__ double tile[kMatrixTile * kMatrixTilePitch];
  __shared__ double row[2 * kMatrixTile];
  __shared__ double pivots[kMatrixTile];
  __shared__ double scratch[33];
  const int slot = static_cast<int>(blockIdx.y);
  const RankScalars s = *w.scalars;
  const double shift = table.shift[first + slot] * s.bound;
  int bi, bj;
  upper_tile_position(w.tiles, blockIdx.x, &bi, &bj);
  double* out = w.shifted + (slot * w.packed + blockIdx.x) * kMatrixTileElements;
  for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads) {
    const int r = e / kMatrixTile, q = e % kMatrixTile;
    const int64_t row_index = int64_t{bi} * kMatrixTile + r, column = int64_t{bj} * kMatrixTile + q;
    double value = s.inverse_scale != 0.0 ? symmetric_at(c, m, row_index, column) * s.inverse_scale : 0.0;
    if (row_index == column) value = row_index < m ? value + shift : 1.0;
    out[e] = value;
    if (blockIdx.x == 0) tile[r * kMatrixTilePitch + q] = value;
  }
  if (blockIdx.x != 0) return;
  block_sync();
  factor_tile(tile, row, pivots, scratch, shift, pivots_within(m, 0), w.inverse_l + slot * kMatrixTileElements,
              w.log_dets + (first + slot) * w.tiles);
}

// Grid (tiles, batch), step K: P_j = L^-1 A_Kj to the panel, L^-T P_j to the matrix.
static __global__ void __launch_bounds__(kMatrixTileThreads) rank_panel(RankWorkspace w, int step) {
  double* inverse_l = reinterpret_cast<double*>(dynamic_shared());
  double* operand = inverse_l + kMatrixTile * kMatrixTilePitch;
  const int slot = static_cast<int>(blockIdx.y), j = static_cast<int>(blockIdx.x);
  const double* from_l = w.inverse_l + int64_t{slot} * kMatrixTileElements;
  double* panel = w.panel + (slot * w.tiles + j) * kMatrixTileElements;
  const bool above = j < step;  // the stored tile is A_jK, the transpose
  double* stored = w.shifted + (slot * w.packed + (above ? upper_tile_index(w.tiles, j, step)
                                                         : upper_tile_index(w.tiles, step, j))) *
                                   kMatrixTileElements;
  for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads) {
    const int r = e / kMatrixTile, q = e % kMatrixTile;
    inverse_l[r * kMatrixTilePitch + q] = from_l[e];
    if (j == step) {
      operand[r * kMatrixTilePitch + q] = from_l[e];
    } else if (above) {
      operand[q * kMatrixTilePitch + r] = stored[e];
    } else {
      operand[r * kMatrixTilePitch + q] = stored[e];
    }
  }
  block_sync();
  const int row0 = warp_id() / 2 * 32, column0 = warp_id() % 2 * 32;
  QuarterTile acc;
  if (j != step) {
    clear(acc);
    multiply_quarter<false>(inverse_l, operand, row0, column0, 0, row0 + 32, acc);  // L^-1 is lower triangular
    block_sync();
    for_each_pair(row0, column0, acc, [&](int r, int q, const double (&pair)[2]) {
      operand[r * kMatrixTilePitch + q] = pair[0];
      operand[r * kMatrixTilePitch + q + 1] = pair[1];
      panel[r * kMatrixTile + q] = pair[0];
      panel[r * kMatrixTile + q + 1] = pair[1];
    });
    block_sync();
  }
  clear(acc);
  multiply_quarter<true>(inverse_l, operand, row0, column0, row0, kMatrixTile, acc);
  const double sign = j == step ? -1.0 : 1.0;
  if (above) {  // turned in shared memory, so that rows are written whole
    block_sync();
    for_each_pair(row0, column0, acc, [&](int r, int q, const double (&pair)[2]) {
      operand[q * kMatrixTilePitch + r] = pair[0];
      operand[(q + 1) * kMatrixTilePitch + r] = pair[1];
    });
    block_sync();
    for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads)
      stored[e] = operand[e / kMatrixTile * kMatrixTilePitch + e % kMatrixTile];
    return;
  }
  for_each_pair(row0, column0, acc, [&](int r, int q, const double (&pair)[2]) {
    stored[r * kMatrixTile + q] = sign * pair[0];
    stored[r * kMatrixTile + q + 1] = sign * pair[1];
  });
}

// Grid (upper tiles of the other tiles - 1 rows, batch), step K: A_ij -= P_i^T P_j. Block 0 has the next diagonal
// tile, if there is one, and factors it.
static __global__ void __launch_bounds__(kMatrixTileThreads)
    rank_update(int64_t m, RankWorkspace w, ShiftTable table, int first, int step) {
  __shared__ double row[2 * kMatrixTile];
  __shared__ double pivots[kMatrixTile];
  __shared__ double scratch[33];
  double* left = reinterpret_cast<double*>(dynamic_shared());
  double* right = left + kMatrixTile * kMatrixTilePitch;
  const int slot = static_cast<int>(blockIdx.y);
  const bool more = step + 1 < w.tiles;
  // Without tile row K; the next diagonal tile, (K, K) among those, trades places with the first.
  const int64_t next = more ? upper_tile_index(w.tiles - 1, step, step) : 0;
  int64_t index = blockIdx.x;
  if (index == 0) {
    index = next;
  } else if (index == next) {
    index = 0;
  }
  int bi, bj;
  upper_tile_position(w.tiles - 1, index, &bi, &bj);
  bi += bi >= step ? 1 : 0;
  bj += bj >= step ? 1 : 0;
  const double* panel = w.panel + int64_t{slot} * w.tiles * kMatrixTileElements;
  for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads) {
    const int at = e / kMatrixTile * kMatrixTilePitch + e % kMatrixTile;
    left[at] = panel[int64_t{bi} * kMatrixTileElements + e];
    right[at] = panel[int64_t{bj} * kMatrixTileElements + e];
  }
  double* out = w.shifted + (slot * w.packed + upper_tile_index(w.tiles, bi, bj)) * kMatrixTileElements;
  block_sync();
  const int row0 = warp_id() / 2 * 32, column0 = warp_id() % 2 * 32;
  QuarterTile acc;
  clear(acc);
  multiply_quarter<true>(left, right, row0, column0, 0, kMatrixTile, acc);
  const bool factor = more && blockIdx.x == 0;
  if (factor) block_sync();
  for_each_pair(row0, column0, acc, [&](int r, int q, const double (&pair)[2]) {
    const double x = out[r * kMatrixTile + q] - pair[0], y = out[r * kMatrixTile + q + 1] - pair[1];
    out[r * kMatrixTile + q] = x;
    out[r * kMatrixTile + q + 1] = y;
    if (factor) {
      left[r * kMatrixTilePitch + q] = x;
      left[r * kMatrixTilePitch + q + 1] = y;
    }
  });
  if (!factor) return;
  block_sync();
  factor_tile(left, row, pivots, scratch, table.shift[first + slot] * w.scalars->bound,
              pivots_within(m, step + 1), w.inverse_l + int64_t{slot} * kMatrixTileElements,
              w.log_dets + (first + slot) * w.tiles + step + 1);
}

// --- Sums over the shifts -------------------------------------------------------------------------------------

// One block an upper tile: traces of a batch's inverses and, with a gradient, the two weighted sums; after the
// last batch also their products with C. Shifts in their order whatever the batch: the sums do not depend on it.
template <bool kGradient>
__global__ void __launch_bounds__(kAccumulateThreads)
    rank_accumulate(const double* c, int64_t m, RankWorkspace w, ShiftTable table, int first, int batch) {
  constexpr int kOwn = kMatrixTileElements / kAccumulateThreads;
  __shared__ double scratch[33];
  int bi, bj;
  upper_tile_position(w.tiles, blockIdx.x, &bi, &bj);
  double* sum1 = w.sums + int64_t{blockIdx.x} * kMatrixTileElements;
  double* sum2 = sum1 + w.packed * kMatrixTileElements;
  const double copies = bi == bj ? 1.0 : 2.0;
  double v1[kOwn], v2[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int e = thread_id() + i * kAccumulateThreads;
    v1[i] = kGradient && first > 0 ? sum1[e] : 0.0;
    v2[i] = kGradient && first > 0 ? sum2[e] : 0.0;
  }
  for (int slot = 0; slot < batch; ++slot) {
    const double* from = w.shifted + (slot * w.packed + blockIdx.x) * kMatrixTileElements;
    const double weight1 = table.inverse_root[first + slot], weight2 = table.root_log[first + slot];
    double trace = 0.0, squares = 0.0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int e = thread_id() + i * kAccumulateThreads, r = e / kMatrixTile, q = e % kMatrixTile;
      const int64_t row_index = int64_t{bi} * kMatrixTile + r, column = int64_t{bj} * kMatrixTile + q;
      const double x = row_index < m && column < m ? -from[e] : 0.0;
      if (row_index == column) trace += x;
      squares += x * x;
      if constexpr (kGradient) {
        v1[i] += weight1 * x;
        v2[i] += weight2 * x;
      }
    }
    trace = block_sum(trace, scratch);
    squares = block_sum(squares, scratch);
    if (thread_id() == 0) {
      w.traces[(first + slot) * w.packed + blockIdx.x] = trace;
      w.trace_squares[(first + slot) * w.packed + blockIdx.x] = copies * squares;
    }
  }
  if constexpr (kGradient) {
    const bool last = first + batch == table.count;
    const double scale = w.scalars->inverse_scale;
    double product1 = 0.0, product2 = 0.0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int e = thread_id() + i * kAccumulateThreads, r = e / kMatrixTile, q = e % kMatrixTile;
      sum1[e] = v1[i];
      sum2[e] = v2[i];
      if (last && scale != 0.0) {
        const double x = symmetric_at(c, m, int64_t{bi} * kMatrixTile + r, int64_t{bj} * kMatrixTile + q) * scale;
        product1 += x * v1[i];
        product2 += x * v2[i];
      }
    }
    if (!last) return;
    product1 = block_sum(product1, scratch);
    product2 = block_sum(product2, scratch);
    if (thread_id() == 0) {
      w.products[blockIdx.x] = copies * product1;
      w.products[w.packed + blockIdx.x] = copies * product2;
    }
  }
}

__device__ __forceinline__ double sum_partials(const double* from, int64_t count, double* scratch) {
  double sum = 0.0;
  for (int64_t i = thread_id(); i < count; i += block_threads()) sum += from[i];
  return block_sum(sum, scratch);
}

// Each eigenvalue l adds (s / (l + s))^2 to s^2 times the sum of squares of the inverse of C + s: about 1 below
// the shift, nothing above it. Of kGradientShifts this one stands at singular values of about 1e-6 of the
// largest, where F still has an error below 1e-3.
inline constexpr int kSteepShift = 2;

// One block: the value and the two weights of F; where wanted (`steep`), also whether C has eigenvalues too small
// for F beside those that vanish by construction, which are `null` and the zeros on its diagonal.
static __global__ void __launch_bounds__(256, 1) rank_finish(int64_t m, RankWorkspace w, ShiftTable table,
                                                             bool gradient, double* value, int* steep, int null) {
  __shared__ double scratch[33];
  const RankScalars s = *w.scalars;
  double small = 0.0;
  double sums[2] = {table.linear[0] * s.trace / s.bound, table.linear[1] * s.trace / s.bound};
  for (int j = 0; j < table.count; ++j) {
    const double shift = table.shift[j] * s.bound;
    const double trace = sum_partials(w.traces + j * w.packed, w.packed, scratch);
    const double squares = sum_partials(w.trace_squares + j * w.packed, w.packed, scratch);
    const double log_det = sum_partials(w.log_dets + j * w.tiles, w.tiles, scratch);
    if (j == kSteepShift) small = shift * shift * squares;
    const double first = static_cast<double>(m) - shift * trace, second = shift * (trace - shift * squares);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sums[k] += table.trace[k][0][j] * first + table.trace[k][1][j] * second + table.trace[k][2][j] * log_det;
    }
  }
  const double product1 = gradient ? sum_partials(w.products, w.packed, scratch) : 0.0;
  const double product2 = gradient ? sum_partials(w.products + w.packed, w.packed, scratch) : 0.0;
  if (thread_id() != 0) return;
  double result = 0.0, root_weight = 0.0, log_weight = 0.0;
  if (s.status == 2.0) {
    result = root_weight = log_weight = nan("");
  } else if (s.status == 0.0) {
    result = exp(log(sums[0]) - 0.5 * sums[1] / sums[0]);
    const double most = static_cast<double>(m);
    if (result < 1.0) result = 1.0;
    if (result > most) result = most;
    const double unit = -result * s.inverse_scale / sums[0];
    log_weight = 0.5 * unit;
    root_weight = -log_weight * product2 / product1;
  }
  *value = result;
  if (steep != nullptr) *steep = s.status == 0.0 && small > s.zeros + null + 0.5 ? 1 : 0;
  if (gradient) {
    w.scalars->root_weight = root_weight;
    w.scalars->log_weight = log_weight;
  }
}

// One block an upper tile: F, both triangles.
static __global__ void __launch_bounds__(kMatrixTileThreads) rank_write(int64_t m, RankWorkspace w, double* f) {
  __shared__ double tile[kMatrixTile * (kMatrixTile + 1)];
  int bi, bj;
  upper_tile_position(w.tiles, blockIdx.x, &bi, &bj);
  const double root_weight = w.scalars->root_weight, log_weight = w.scalars->log_weight;
  const double* sum1 = w.sums + int64_t{blockIdx.x} * kMatrixTileElements;
  const double* sum2 = sum1 + w.packed * kMatrixTileElements;
  for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads) {
    tile[e / kMatrixTile * (kMatrixTile + 1) + e % kMatrixTile] = root_weight * sum1[e] + log_weight * sum2[e];
  }
  block_sync();
  for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads) {
    const int r = e / kMatrixTile, q = e % kMatrixTile;
    const int64_t row0 = int64_t{bi} * kMatrixTile, column0 = int64_t{bj} * kMatrixTile;
    const bool upper = bi != bj || r <= q;
    if (row0 + r < m && column0 + q < m)
      f[(row0 + r) * m + column0 + q] = upper ? tile[r * (kMatrixTile + 1) + q] : tile[q * (kMatrixTile + 1) + r];
    if (bi != bj && column0 + r < m && row0 + q < m)
      f[(column0 + r) * m + row0 + q] = tile[q * (kMatrixTile + 1) + r];
  }
}

// c: m x m row-major on the device, of which only the upper triangle is read. workspace: effective_rank_workspace
// (m, batch) bytes on the device. batch: shifted copies at a time (any number from 1; results do not depend on
// it). value: one double on the device. f: m x m, both triangles, may be c; not looked at without `gradient`.
// steep: a flag on the device, set where the gradient needs the matrix behind c, of whose eigenvalues `null`
// vanish by construction; or null.
inline void run_effective_rank(const double* c, int64_t m, void* workspace, int batch, bool gradient,
                               double* value, double* f, cudaStream_t stream, int* steep = nullptr,
                               int null = 0) {
  RankWorkspace w;
  rank_workspace_layout(m, batch, static_cast<double*>(workspace), &w);
  const ShiftTable& table = gradient ? kGradientShifts : kValueShifts;
  const auto packed = static_cast<unsigned>(w.packed), tiles = static_cast<unsigned>(w.tiles);
  constexpr size_t kShared = 2 * kMatrixTile * kMatrixTilePitch * sizeof(double);
  launch(DSE_KERNEL(rank_norm_partials), {dim3(packed), dim3(kMatrixTileThreads), 0, stream}, c, m, w);
  launch(DSE_KERNEL(rank_norm), {dim3(1), dim3(256), 0, stream}, c, m, w);
  for (int first = 0; first < table.count; first += batch) {
    const int now = batch < table.count - first ? batch : table.count - first;
    const auto slots = static_cast<unsigned>(now);
    launch(DSE_KERNEL(rank_shifted_copies), {dim3(packed, slots), dim3(kMatrixTileThreads), 0, stream}, c, m, w,
           table, first);
    for (int step = 0; step < w.tiles; ++step) {
      launch(DSE_KERNEL(rank_panel), {dim3(tiles, slots), dim3(kMatrixTileThreads), kShared, stream}, w, step);
      const auto others = static_cast<unsigned>(upper_tiles(w.tiles - 1));
      launch(DSE_KERNEL(rank_update), {dim3(others, slots), dim3(kMatrixTileThreads), kShared, stream}, m, w,
             table, first, step);
    }
    launch(DSE_KERNEL(gradient ? rank_accumulate<true> : rank_accumulate<false>),
           {dim3(packed), dim3(kAccumulateThreads), 0, stream}, c, m, w, table, first, now);
  }
  launch(DSE_KERNEL(rank_finish), {dim3(1), dim3(256), 0, stream}, m, w, table, gradient, value, steep, null);
  if (gradient) launch(DSE_KERNEL(rank_write), {dim3(packed), dim3(kMatrixTileThreads), 0, stream}, m, w, f);
}

// --- Second moment of features --------------------------------------------------------------------------------
//
// C = X^T X in float64 from features of any type and strides, each row scaled (the view's row_scale) and centred
// (`mean`, may be null): upper tiles only, n d^2 operations, half of a general product; 53 GFLOP at n = 50176,
// d = 1024: 0.79 ms at 67 TFLOP/s. Features are read d / 64 times, from the L2 cache but for the first.
// Rows are cut into `splits` runs so that small d fills the device too; the cut depends on n and d alone, and the
// partial sums are added in their order.

inline int second_moment_splits(int64_t n, int64_t d) {
  constexpr int64_t kBlocks = 1584;  // 4 waves of 3 blocks on 132 multiprocessors
  constexpr int64_t kLeastRows = 256;
  const int64_t packed = upper_tiles((d + kMatrixTile - 1) / kMatrixTile);
  const int64_t wanted = (kBlocks + packed - 1) / packed, most = (n + kLeastRows - 1) / kLeastRows;
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int>(splits > 1 ? splits : 1);
}
inline int64_t second_moment_workspace(int64_t d, int splits) {
  return splits * upper_tiles((d + kMatrixTile - 1) / kMatrixTile) * kMatrixTileElements *
         static_cast<int64_t>(sizeof(double));
}

// Grid (upper tiles, splits).
template <class S>
__global__ void __launch_bounds__(kMatrixTileThreads, 3)
    second_moment_partials(FeatureView<S> x, int64_t begin, int64_t end, const double* mean, double* partials) {
  constexpr int kRows = sizeof(S) == 8 ? 16 : 32;  // a step; its features wait in registers for the last one
  constexpr int kOwn = kRows / 4;                  // rows a warp loads
  __shared__ double panels[2][kRows * kMatrixTilePitch];
  __shared__ int64_t offsets[2][kRows];
  __shared__ double scales[2][kRows];
  const int64_t tiles = (x.dim + kMatrixTile - 1) / kMatrixTile;
  int bi, bj;
  upper_tile_position(tiles, blockIdx.x, &bi, &bj);
  const int64_t steps_all = (end - begin + kRows - 1) / kRows;
  const int64_t step0 = steps_all * blockIdx.y / gridDim.y, step1 = steps_all * (blockIdx.y + 1) / gridDim.y;

  int64_t column[4];
  double centre[4];
  bool inside[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    column[q] = int64_t{q < 2 ? bi : bj} * kMatrixTile + lane_id() + q % 2 * 32;
    inside[q] = column[q] < x.dim;
    centre[q] = inside[q] && mean != nullptr ? mean[column[q]] : 0.0;
    column[q] *= x.stride_dim;
  }
  const auto locate = [&](int64_t step) {
    if (thread_id() >= kRows) return;
    const int64_t i = begin + step * kRows + thread_id();
    offsets[step & 1][thread_id()] = i < end && step < step1 ? x.row(i) - x.data : -1;
    scales[step & 1][thread_id()] = i < end && step < step1 ? x.scale(i) : 0.0;
  };
  S raw[kOwn][4];
  const auto load = [&](int64_t step) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t offset = offsets[step & 1][warp_id() + 4 * i];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (offset >= 0 && inside[q]) raw[i][q] = x.data[offset + column[q]];
      }
    }
  };

  QuarterTile acc;
  clear(acc);
  const int row0 = warp_id() / 2 * 32, column0 = warp_id() % 2 * 32;
  locate(step0);
  block_sync();
  if (step0 < step1) load(step0);
  for (int64_t step = step0; step < step1; ++step) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int r = warp_id() + 4 * i;
      const bool exists = offsets[step & 1][r] >= 0;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        panels[q / 2][r * kMatrixTilePitch + lane_id() + q % 2 * 32] =
            exists && inside[q] ? to_double(raw[i][q]) * scales[step & 1][r] - centre[q] : 0.0;
      }
    }
    locate(step + 1);
    block_sync();
    if (step + 1 < step1) load(step + 1);
    multiply_quarter<true>(panels[0], panels[1], row0, column0, 0, kRows, acc);
    block_sync();
  }
  double* out = partials + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * kMatrixTileElements;
  for_each_pair(row0, column0, acc, [&](int r, int q, const double (&pair)[2]) {
    out[r * kMatrixTile + q] = pair[0];
    out[r * kMatrixTile + q + 1] = pair[1];
  });
}

// One block an upper tile: the sum of its partial sums, to both triangles.
static __global__ void __launch_bounds__(kMatrixTileThreads)
    second_moment_sum(const double* partials, int splits, int64_t d, double* c) {
  __shared__ double tile[kMatrixTile * (kMatrixTile + 1)];
  const int64_t tiles = (d + kMatrixTile - 1) / kMatrixTile;
  int bi, bj;
  upper_tile_position(tiles, blockIdx.x, &bi, &bj);
  for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads) {
    double sum = 0.0;
    for (int s = 0; s < splits; ++s)
      sum += partials[(int64_t{s} * gridDim.x + blockIdx.x) * kMatrixTileElements + e];
    tile[e / kMatrixTile * (kMatrixTile + 1) + e % kMatrixTile] = sum;
  }
  block_sync();
  for (int e = thread_id(); e < kMatrixTileElements; e += kMatrixTileThreads) {
    const int r = e / kMatrixTile, q = e % kMatrixTile;
    const int64_t row0 = int64_t{bi} * kMatrixTile, column0 = int64_t{bj} * kMatrixTile;
    const bool upper = bi != bj || r <= q;
    if (row0 + r < d && column0 + q < d)
      c[(row0 + r) * d + column0 + q] = upper ? tile[r * (kMatrixTile + 1) + q] : tile[q * (kMatrixTile + 1) + r];
    if (bi != bj && column0 + r < d && row0 + q < d)
      c[(column0 + r) * d + row0 + q] = tile[q * (kMatrixTile + 1) + r];
  }
}

// c (d x d, both triangles) = sum over rows begin..end of x x^T. workspace: second_moment_workspace(d, splits).
template <class S>
void run_second_moment(const FeatureView<S>& x, int64_t begin, int64_t end, const double* mean, int splits,
                       void* workspace, double* c, cudaStream_t stream) {
  const auto packed = static_cast<unsigned>(upper_tiles((x.dim + kMatrixTile - 1) / kMatrixTile));
  double* partials = static_cast<double*>(workspace);
  launch(DSE_KERNEL(second_moment_partials<S>),
         {dim3(packed, static_cast<unsigned>(splits)), dim3(kMatrixTileThreads), 0, stream}, x, begin, end, mean,
         partials);
  launch(DSE_KERNEL(second_moment_sum), {dim3(packed), dim3(kMatrixTileThreads), 0, stream}, partials, splits,
         x.dim, c);
}

}  // namespace dse::cuda
