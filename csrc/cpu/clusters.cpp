#include "cpu/clusters.h"

#include <algorithm>
#include <utility>

#include "cpu/dense.h"

namespace dse::cpu {

template <typename T>
void nuclear_norms(const Features& x, std::vector<ClusterItem<T>>& items, const std::function<void()>& beside) {
  // Stable: the order of equal sizes, and with it the outcome, is fixed.
  std::stable_sort(items.begin(), items.end(),
                   [](const ClusterItem<T>& a, const ClusterItem<T>& b) { return a.n > b.n; });
  std::vector<SpectralWorkspace> workspaces(static_cast<size_t>(max_workers()));
  // Large ones of float32 results are tasks by themselves: what a step leaves is in the cache for the next one.
  // Of the others several make a task, whose eigenvalues are found side by side: fewer where matrices are large,
  // because a task holds what they leave, and of large ones towards the end, for which a thread may wait.
  constexpr int64_t kMostCells = 1 << 21, kTail = 24;
  const auto total = static_cast<int64_t>(items.size());
  std::vector<int64_t> begins{0};
  while (begins.back() < total) {
    const int64_t side = std::min(items[static_cast<size_t>(begins.back())].n, x.dim),
                  left = total - begins.back();
    int64_t most = kLanes;
    if (side > kLanesMaxSide && sizeof(T) == 4) most = 1;
    else if (side > kLanesMaxSide && left <= kTail) most = left > kTail / 3 ? kLanes / 2 : kLanes / 4;
    begins.push_back(std::min(total, begins.back() + std::clamp<int64_t>(kMostCells / (side * side), 1, most)));
  }
  const auto groups = static_cast<int64_t>(begins.size()) - 1;
  int64_t work = beside ? 32 * x.dim * x.dim : 0;
  for (const auto& item : items) {
    const int64_t side = std::min(item.n, x.dim);
    work += item.n * x.dim * side + 8 * side * side * side;
  }
  std::vector<int64_t> failures(static_cast<size_t>(groups));
  const auto run = [&](int64_t group, bool narrow, SpectralWorkspace& ws) {
    const int64_t begin = begins[static_cast<size_t>(group)];
    const int64_t count = begins[static_cast<size_t>(group) + 1] - begin;
    RowSet sets[kLanes];
    SpectralTarget<T> targets[kLanes];
    for (int64_t i = 0; i < count; ++i) {
      const ClusterItem<T>& item = items[static_cast<size_t>(begin + i)];
      sets[i] = {&x, item.rows, 0, item.n, true};
      targets[i].slot = item.slot;
    }
    failures[static_cast<size_t>(group)] =
        spectral_functions<T>(sets, count, SpectralKind::kNuclearNorm, targets, ws, narrow);
    for (int64_t i = 0; i < count; ++i) {
      const ClusterItem<T>& item = items[static_cast<size_t>(begin + i)];
      *item.norm = targets[i].value;
      if (item.form != nullptr) *item.form = static_cast<int64_t>(targets[i].form);
    }
  };

  // Clusters of one size have similar spectra: the first tasks of large ones and of small ones tell whether
  // float32 is worth a try for the others. Which ones they are does not depend on the threads.
  constexpr int64_t kSample[] = {4, 2};
  const auto is_small = [&](int64_t group) {
    const auto largest = static_cast<size_t>(begins[static_cast<size_t>(group)]);
    return std::min(items[largest].n, x.dim) <= kLanesMaxSide;
  };
  std::vector<int64_t> sample, rest;
  int64_t seen[2] = {};
  for (int64_t group = 0; group < groups; ++group) {
    const size_t size = is_small(group) ? 1 : 0;
    (seen[size]++ < kSample[size] ? sample : rest).push_back(group);
  }
  for_each_task(static_cast<int64_t>(sample.size()), work, [&](int64_t task, int64_t worker) {
    run(sample[static_cast<size_t>(task)], true, workspaces[static_cast<size_t>(worker)]);
  });
  int64_t tried[2] = {}, failed[2] = {};
  for (const int64_t group : sample) {
    const auto at = static_cast<size_t>(group);
    tried[is_small(group) ? 1 : 0] += begins[at + 1] - begins[at];
    failed[is_small(group) ? 1 : 0] += failures[at];
  }
  const int64_t first = beside ? 1 : 0;
  for_each_task(first + static_cast<int64_t>(rest.size()), work, [&](int64_t task, int64_t worker) {
    if (task < first) {
      beside();
      return;
    }
    const int64_t group = rest[static_cast<size_t>(task - first)];
    const size_t size = is_small(group) ? 1 : 0;
    run(group, 2 * failed[size] <= tried[size], workspaces[static_cast<size_t>(worker)]);
  });
}

namespace {

// add_cluster_gradient() in 16-bit products, with the centred rows in ws.rows and the slot's matrix in
// ws.matrix, whose diagonal is apart: it would set the steps.
void add_short_gradient(int64_t n, int64_t d, float weight, ClusterGradientWorkspace<float>& ws) {
  const int64_t side = std::min(n, d);
  const float* rows = ws.rows.data();
  float* matrix = ws.matrix.data();
  float* diagonal = ws.turned.reserve(side);
  for (int64_t i = 0; i < side; ++i) diagonal[i] = std::exchange(matrix[i * side + i], 0.0f);
  ShortMatrix& left = ws.short_left;
  ShortMatrix& right = ws.short_right;
  left.reserve(side, n, n);
  right.reserve(side, d, kShortPanel);
  if (n <= d) {  // W X; W is symmetric
    for (int64_t i = 0; i < n; ++i)
      axpy(weight * diagonal[i], rows + i * d, ws.targets[static_cast<size_t>(i)], d);
    left.set_columns(0, n, matrix, n);
    for (int64_t f = 0; f < d; f += kShortPanel) right.set_panel(f, rows, d);
  } else {  // X W
    for (int64_t i = 0; i < n; ++i)
      add_products(weight, diagonal, rows + i * d, ws.targets[static_cast<size_t>(i)], d);
    left.set_columns(0, n, rows, d);
    for (int64_t f = 0; f < d; f += kShortPanel)
      right.set_columns(f, std::min(kShortPanel, d - f), matrix + f * d, d);
    right.clear_columns(d, (d + kShortPanel - 1) / kShortPanel * kShortPanel - d);
  }
  accumulate_product(left, n, right, weight, ws.targets.data());
}

}  // namespace

template <typename T>
void add_cluster_gradient(const Features& x, const ClusterGradientItem<T>& item, int64_t first_row,
                          T* accumulator, ClusterGradientWorkspace<T>& ws) {
  if (item.form == SavedForm::kNone || item.weight == 0.0) return;
  const int64_t d = x.dim, n = item.n, ld = padded(d);
  const T weight = static_cast<T>(item.weight);
  const auto target = [&](int64_t i) { return accumulator + (item.rows[i] - first_row) * ld; };
  if (item.form == SavedForm::kPolar) {
    for (int64_t i = 0; i < n; ++i) {
      const T* src = item.slot + i * d;
      T* dst = target(i);
      for (int64_t f = 0; f < d; ++f) dst[f] += weight * src[f];
    }
    return;
  }
  const int64_t side = std::min(n, d);
  T* matrix = ws.matrix.reserve(side * side);
  load_triangle(item.slot, side, matrix);
  ws.targets.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) ws.targets[static_cast<size_t>(i)] = target(i);
  const bool is_short = item.form == SavedForm::kShortGramSide || item.form == SavedForm::kRoundedShortGramSide;
  const bool is_rounded =
      item.form == SavedForm::kRoundedGramSide || item.form == SavedForm::kRoundedShortGramSide;
  const auto gather = [&] {
    T* rows = ws.rows.reserve(n * d);
    gather_rows({&x, item.rows, 0, n, true}, rows, d);
    if constexpr (sizeof(T) == 4)
      if (is_rounded) round_as_short(rows, n, d, n <= d);
    return rows;
  };
  if constexpr (sizeof(T) == 4) {
    if (is_short) {
      gather();
      add_short_gradient(n, d, weight, ws);
      return;
    }
  }
  if (n <= d) {
    ws.right.reserve(n, d);
    if (is_rounded) {
      const T* rows = gather();
      for (int64_t i = 0; i < n; ++i) ws.right.set_row(i, rows + i * d);
    } else {
      // Rows of the slot sum to zero, so that any row near the mean does for centring: the mean of a few.
      constexpr int64_t kSample = 8;
      const int64_t sample = std::min(n, kSample);
      double* origin = ws.origin.reserve(2 * d);
      T* row = ws.rows.reserve(d);
      std::fill(origin, origin + d, 0.0);
      for (int64_t s = 0; s < sample; ++s) {
        x.load(item.rows[s * n / sample], origin + d);
        accumulate(origin + d, origin, d);
      }
      for (int64_t f = 0; f < d; ++f) origin[f] /= static_cast<double>(sample);
      for (int64_t i = 0; i < n; ++i) {
        x.load_shifted_row(item.rows[i], origin, 1.0, row);
        ws.right.set_row(i, row);
      }
    }
    accumulate_product(matrix, n, n, ws.right, weight, ws.targets.data());  // the matrix is symmetric
    return;
  }
  const T* rows = gather();
  const int64_t ldt = (n + 7) / 8 * 8;
  T* turned = ws.turned.reserve(d * ldt);
  turn(rows, d, n, d, turned, ldt);
  ws.right.reserve(d, d);
  for (int64_t f = 0; f < d; ++f) ws.right.set_row(f, matrix + f * d);
  accumulate_product(turned, ldt, n, ws.right, weight, ws.targets.data());
}

template void nuclear_norms<float>(const Features&, std::vector<ClusterItem<float>>&,
                                   const std::function<void()>&);
template void nuclear_norms<double>(const Features&, std::vector<ClusterItem<double>>&,
                                    const std::function<void()>&);
template void add_cluster_gradient<float>(const Features&, const ClusterGradientItem<float>&, int64_t, float*,
                                          ClusterGradientWorkspace<float>&);
template void add_cluster_gradient<double>(const Features&, const ClusterGradientItem<double>&, int64_t, double*,
                                           ClusterGradientWorkspace<double>&);

}  // namespace dse::cpu
