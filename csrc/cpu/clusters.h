// Nuclear norms of many clusters at once.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/cluster_index.h"
#include "cpu/features.h"
#include "cpu/products.h"
#include "cpu/short_products.h"
#include "cpu/spectrum.h"

namespace dse::cpu {

// One cluster: its rows and where its results go.
template <typename T>
struct ClusterItem {
  const int64_t* rows;
  int64_t n;
  T* slot;        // n * d elements for the gradient's matrix, or null
  double* norm;   // receives ||H X_c||_*
  int64_t* form;  // receives the SavedForm, or null
};

// Appends the clusters of at least two rows of one group; the others get norm 0 and no slot. `slots` holds d
// elements for every row of the group, in the order of `index`.
template <typename T>
void append_clusters(const ClusterIndex& index, int64_t k, int64_t d, T* slots, double* norms, int64_t* forms,
                     std::vector<ClusterItem<T>>& items) {
  for (int64_t c = 0; c < k; ++c) {
    norms[c] = 0.0;
    if (forms != nullptr) forms[c] = static_cast<int64_t>(SavedForm::kNone);
    if (index.size(c) < 2) continue;
    items.push_back({index.rows(c), index.size(c),
                     slots != nullptr ? slots + index.offset[static_cast<size_t>(c)] * d : nullptr, norms + c,
                     forms != nullptr ? forms + c : nullptr});
  }
}

// Largest clusters first, so that the last tasks to run are short. `beside` is one more task, run by whichever
// thread is first.
template <typename T>
void nuclear_norms(const Features& x, std::vector<ClusterItem<T>>& items,
                   const std::function<void()>& beside = nullptr);

// accumulator row r (ld padded(d), counted from `first_row`) += weight * gradient of the cluster's nuclear norm
// with respect to its rows.
template <typename T>
struct ClusterGradientItem {
  const int64_t* rows;
  int64_t n;
  const T* slot;
  SavedForm form;
  double weight;
};

template <typename T>
struct ClusterGradientWorkspace {
  Buffer<double> origin;
  Buffer<T> rows;
  Buffer<T> matrix;  // of the slot
  Buffer<T> turned;
  PanelMatrix<T> right;
  ShortMatrix short_left, short_right;
  std::vector<T*> targets;
};

template <typename T>
void add_cluster_gradient(const Features& x, const ClusterGradientItem<T>& item, int64_t first_row,
                          T* accumulator, ClusterGradientWorkspace<T>& ws);

}  // namespace dse::cpu
