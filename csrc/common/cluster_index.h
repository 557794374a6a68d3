// Rows of a group, sorted by cluster: a counting sort that keeps the order of rows within a cluster.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dse {

struct ClusterIndex {
  std::vector<int64_t> offset;  // k + 1; cluster c is order[offset[c]] .. order[offset[c + 1] - 1]
  std::vector<int64_t> order;   // row indices, counted from `first_row`

  // labels[i] is the cluster of row first_row + i, 0 <= labels[i] < k.
  void build(const int64_t* labels, int64_t n, int64_t k, int64_t first_row) {
    offset.assign(static_cast<size_t>(k) + 1, 0);
    order.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) ++offset[static_cast<size_t>(labels[i]) + 1];
    for (int64_t c = 0; c < k; ++c) offset[static_cast<size_t>(c) + 1] += offset[static_cast<size_t>(c)];
    std::vector<int64_t> next(offset.begin(), offset.end() - 1);
    for (int64_t i = 0; i < n; ++i) {
      order[static_cast<size_t>(next[static_cast<size_t>(labels[i])]++)] = first_row + i;
    }
  }

  int64_t size(int64_t c) const { return offset[static_cast<size_t>(c) + 1] - offset[static_cast<size_t>(c)]; }
  const int64_t* rows(int64_t c) const { return order.data() + offset[static_cast<size_t>(c)]; }
};

}  // namespace dse
