// Effective ranks of matrices of equally many rows, and the matrices of their gradients.
#pragma once

#include <optional>
#include <string>

#include "cuda/host.h"
#include "cuda/matrices.cuh"
#include "cuda/matrix_functions.cuh"
#include "cuda/steep_clusters.cuh"
#include "cuda/steep_rank.cuh"

namespace dse::cuda {

// Matrix p has rows order[p n] .. order[p n + n - 1] of the features, or p n and on.
struct RankMatrices {
  int64_t count = 0, n = 0;
  const int64_t* order = nullptr;
  bool center = false;
  const int* finite = nullptr;  // flag of matrix p: finite[p * finite_stride]
  int64_t finite_stride = 0;
  double* values = nullptr;  // count
  // The host decides by this alone: a call that is recorded has no memory.
  bool want_w = false;
  double* w = nullptr;  // count x m x m, m = min(n, d), if wanted
};

// Every matrix as one cluster of a group of its own.
inline Clusters whole_groups(Call& call, int64_t count, int64_t n, const int64_t* order) {
  Clusters p;
  p.rows = count * n;
  p.group_rows = n;
  p.k = 1;
  p.groups = count;
  p.offset = call.borrow<int64_t>(2 * count);
  p.sizes = call.borrow<int64_t>(count);
  // The kernels that follow only read it.
  p.order = order != nullptr ? const_cast<int64_t*>(order) : call.borrow<int64_t>(count * n);
  run_whole_groups(count, n, p.offset, p.sizes, order != nullptr ? nullptr : p.order, call.stream);
  return p;
}

// Eigenvalues in ascending order, and vectors as columns. torch's decomposition waits for the device and cannot
// be captured into a graph: only float64 features with a large side come here.
inline std::array<Tensor, 2> library_eigen(const Tensor& matrices) {
  recorded("library: eigendecomposition");  // on the meta device it is carried out, for the shapes
  std::array<StableIValue, 2> stack{torch::stable::detail::from(matrices),
                                    torch::stable::detail::from(std::string("L"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0])),
          torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[1]))};
}

// Ranks of `count` large Gram matrices in full float64 accuracy.
inline void library_ranks(Call& call, const GramRanks& r, int64_t count, bool want_w) {
  const int64_t m = std::min(r.n, r.dim);
  const Tensor matrices = call.temporary({count, m, m}, ScalarType::Double);
  auto* known = call.borrow<KnownSpectrum>(count);
  run_prepare_eigen(r, count, data_of<double>(matrices), known, call.stream);
  const auto [eigenvalues, vectors] = library_eigen(matrices);
  run_eigen_ranks(r, count, data_of<double>(eigenvalues), known, call.stream);
  if (!want_w) return;
  run_scale_columns(const_data_of<double>(vectors), const_data_of<double>(eigenvalues), count, m,
                    data_of<double>(matrices), call.stream);
  Tensor rows = vectors;
  const Tensor w = call.temporary({count, m, m}, ScalarType::Double);
  multiply(matrices, torch::stable::transpose(rows, 1, 2), w);
  call.copy(r.w, const_data_of<double>(w), count * m * m * static_cast<int64_t>(sizeof(double)));
}

// Once more, from the rows themselves, where a matrix's flag is set: matrices of clusters p, of which `r` holds
// the Gram matrices.
template <class S>
class SteepRanks {
 public:
  SteepRanks(Call& call, const FeatureView<S>& x, int64_t n, int64_t count, bool direct, bool want_w)
      : x_(x), direct_(direct), want_w_(want_w), shared_limit_(call.shared_limit) {
    const int64_t m = std::min(n, x.dim);
    if (direct) {
      space_ = call.borrow<double>(steep_rank_space(m));
      if (!want_w) g_ = call.borrow<double>(m * m);
      return;
    }
    plan_ = plan_steep(count, m, x.dim, call.shared_limit, call.multiprocessors, call.budget());
    space_ = call.borrow<double>(plan_.workspace() / static_cast<int64_t>(sizeof(double)));
  }

  // moment_space, splits: of the second moment, where that is summed by the whole device.
  void run(const Clusters& p, const GramRanks& r, const double* means, void* moment_space, int splits,
           const int* flags, double* values, cudaStream_t stream) const {
    const int64_t m = std::min(r.n, r.dim);
    if (direct_) {
      SteepRank<S> s;
      s.r = r;
      s.exact = sizeof(S) == 8;
      s.partials = static_cast<double*>(moment_space);
      s.splits = splits;
      for (s.at = 0; s.at < p.groups; ++s.at) {
        s.steep = r.steep + s.at;
        s.a = {x_, p.order + (p.group_begin + s.at) * r.n, means + s.at * r.dim, r.n, false};
        s.g = want_w_ ? r.w + s.at * m * m : g_;
        run_steep_rank(s, want_w_, space_, shared_limit_, stream);
      }
      return;
    }
    SteepClusters s;
    s.clusters = p;
    s.steep = flags;
    s.kind = SpectralKind::kEffectiveRank;
    s.center = r.center;
    s.exact = sizeof(S) == 8;
    s.values = values;
    s.slots = {r.w, m, false};
    s.slot_stride = m * m;
    run_steep_clusters(x_, s, plan_, space_, stream);
  }

 private:
  FeatureView<S> x_;
  bool direct_, want_w_;
  size_t shared_limit_;
  SteepPlan plan_;
  double* space_ = nullptr;
  double* g_ = nullptr;
};

template <class S>
void measure_ranks(Call& call, const FeatureView<S>& x, const RankMatrices& r) {
  const int64_t d = x.dim, n = r.n, m = std::min(n, d), slabs = cluster_slabs(d);
  const bool direct = r.order == nullptr && uses_second_moment(r.count, n, d);
  const bool small = m <= kSmallRankSide, exact = sizeof(S) == 8;
  const Clusters all = whole_groups(call, r.count, n, r.order);

  GramRanks g;
  g.n = n;
  g.dim = d;
  g.center = r.center;
  g.gram_stride = direct ? m * m : n * m;
  g.slabs = slabs;
  g.finite_stride = r.finite_stride;
  const int64_t part = call.part_of(r.count, static_cast<int64_t>(sizeof(double)) * g.gram_stride);
  g.grams = call.borrow<double>(part * g.gram_stride);
  double* means = call.borrow<double>(part * d);
  double* squares = r.center || n == 1 ? call.borrow<double>(part * slabs) : nullptr;
  g.squares = squares;
  const int splits = second_moment_splits(n, d), batch = rank_batch(m);
  void* moment_space = direct ? call.borrow_bytes(second_moment_workspace(d, splits)) : nullptr;
  void* list_space = direct ? nullptr : call.borrow_bytes(work_list_workspace(part));
  // Without a gradient the values of float32 need no more than a Gram matrix holds.
  const bool refine = exact || r.want_w;
  int* steep = refine ? call.borrow<int>(r.count) : nullptr;
  std::optional<SteepRanks<S>> again;
  if (refine) again.emplace(call, x, n, part, direct, r.want_w);
  g.steep_ratio = steep_ratio<S>();
  void* rank_space = small || exact ? nullptr : call.borrow_bytes(effective_rank_workspace(m, batch));

  for (int64_t begin = 0; begin < r.count; begin += part) {
    Clusters p = all;
    p.group_begin = begin;
    p.groups = std::min(part, r.count - begin);
    if (squares != nullptr) run_cluster_means(x, p, 0.0, means, squares, call.stream);
    if (!r.center) call.clear(means, static_cast<int64_t>(sizeof(double)) * p.groups * d);
    if (direct) {
      for (int64_t j = 0; j < p.groups; ++j) {
        run_second_moment(x, (begin + j) * n, (begin + j + 1) * n, r.center ? means + j * d : nullptr, splits,
                          moment_space, g.grams + j * g.gram_stride, call.stream);
      }
    } else {
      const WorkList list = work_list_at(p.groups, list_space);
      run_work_list(p, d, false, list, call.stream);
      const int64_t side = ceil_div(m, kGramTile), tiles = p.groups * side * (side + 1) / 2;
      launch(DSE_KERNEL(cluster_gram_kernel<S>),
             {grid_of(std::min<int64_t>(tiles, 16 * call.multiprocessors)), kGramThreads, 0, call.stream}, x, p,
             list, means, ClusterSlots{g.grams, m, false});
    }
    g.finite = r.finite + begin * r.finite_stride;
    g.values = r.values + begin;
    g.w = r.want_w ? r.w + begin * m * m : nullptr;
    g.steep = refine ? steep + begin : nullptr;
    if (small) {
      run_small_ranks(g, p.groups, call.stream);
    } else if (exact) {
      library_ranks(call, g, p.groups, r.want_w);
    } else {
      for (int64_t j = 0; j < p.groups; ++j) {
        run_effective_rank(g.grams + j * g.gram_stride, m, rank_space, batch, r.want_w, g.values + j,
                           r.want_w ? g.w + j * m * m : nullptr, call.stream, refine ? g.steep + j : nullptr,
                           r.center && n <= d ? 1 : 0);
      }
    }
    if (refine) again->run(p, g, means, moment_space, splits, steep, r.values, call.stream);
  }
}

}  // namespace dse::cuda
