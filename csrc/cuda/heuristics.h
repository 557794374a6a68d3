// Which kernels serve which shape, and how much working memory a call may take.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/problem.h"

namespace dse::cuda {

// Working memory of more bytes than this is filled and used in parts: half of what the features take, but enough
// rows to fill the device. Of the small problems of the emulation some are cut too.
inline int64_t part_bytes([[maybe_unused]] int64_t feature_bytes) {
#ifdef DSE_CUDA_EMULATION
  return int64_t{8} << 10;
#else
  return std::clamp<int64_t>(feature_bytes / 2, int64_t{32} << 20, int64_t{256} << 20);
#endif
}

// Local clusters: one block an image (image_kernel.cuh), with matrices on the side of the rows, or the kernels
// for clusters of any size. dse_ext/ops.py knows the same rule, for the shape of saved_local.
inline bool uses_image_kernel(const Problem& p) { return p.positions <= 256 && p.local_clusters <= p.positions; }

// Elements that saved_local and saved_global have for every row.
inline int64_t local_width(const Problem& p) {
  return uses_image_kernel(p) ? p.positions : std::min(p.positions, p.dim);
}
inline int64_t global_width(const Problem& p) { return std::min(p.group_images * p.positions, p.dim); }

// Effective ranks: up to this side one block decomposes a matrix.
inline constexpr int64_t kSmallRankSide = 128;

// Matrices with more rows than features whose Gram matrix is summed by the whole device, one after the other:
// those of many rows, and few ones.
inline bool uses_second_moment(int64_t count, int64_t n, int64_t d) { return n > d && (count <= 8 || n > 4096); }

// Shifted copies that are inverted at a time.
inline int rank_batch(int64_t m) {
  const int64_t bytes = 5 * m * m;  // the upper tiles and the panel
  return static_cast<int>(std::clamp<int64_t>((int64_t{48} << 20) / bytes, 1, 20));
}

}  // namespace dse::cuda
