// torch.ops.dse_ext.cuda_plan: what dse_components and its backward pass would launch, as JSON. The operators'
// own host code runs on a tensor without memory while a Recording notes what it would queue.

#include <cstdio>
#include <string>

#include <torch/csrc/stable/library.h>

#include "cpu/arguments.h"
#include "cpu/dse_state.h"
#include "cuda/heuristics.h"
#include "cuda/host.h"
#include "cuda/image_kernel.cuh"
#include "cuda/matrix_functions.cuh"
#include "cuda/operators.h"

namespace dse::cuda {
namespace {

std::string json_text(const std::string& text) { return '"' + text + '"'; }

// The name alone: without namespace, template arguments, and the condition that chose among two.
std::string kernel_name(const std::string& expression) {
  std::string name = expression;
  if (const size_t at = name.find("? "); at != std::string::npos) name = name.substr(at + 2);
  name = name.substr(0, name.find('<'));
  const size_t at = name.rfind("::");
  return at == std::string::npos ? name : name.substr(at + 2);
}

std::string steps_json(const Recording& r) {
  std::string out = "[";
  for (size_t i = 0; i < r.steps.size(); ++i) {
    const Recording::Step& s = r.steps[i];
    const std::string name = kernel_name(s.name);
    char numbers[160];
    std::snprintf(numbers, sizeof(numbers), ", \"grid\": [%u, %u, %u], \"threads\": %u, \"shared_bytes\": %zu}",
                  s.grid[0], s.grid[1], s.grid[2], s.threads, s.shared_bytes);
    out += std::string(i > 0 ? ", " : "") + "{\"name\": " + json_text(name) + numbers;
  }
  return out + "]";
}

std::string pass_json(const Recording& r) {
  return "{\"steps\": " + steps_json(r) + ", \"workspace_bytes\": " + std::to_string(r.peak) + "}";
}

// How the host code decided, in words.
std::string paths_json(const Problem& p, const Tensor& z, bool backward) {
  const int64_t side = cpu::dim_side(p);
  std::string local = "kernels for clusters of any size (more than 256 positions)";
  if (uses_image_kernel(p)) local = "fused image kernel, one block an image";
  std::string rank = "one block a matrix, in shared memory";
  if (side > kSmallRankSide && z.scalar_type() == ScalarType::Double) {
    rank = "torch.linalg.eigh (float64 features; waits for the device)";
  } else if (side > kSmallRankSide) {
    rank = std::to_string(kMaxShifts) + " shifted inverses, " + std::to_string(rank_batch(side)) + " at a time";
  }
  std::string steep = "decomposed from the rows where the device finds them, else left at once";
  if (!backward && z.scalar_type() != ScalarType::Double) steep = "no matter without a gradient";
  return "{\"local clusters\": " + json_text(local) + ", \"effective rank\": " + json_text(rank) +
         ", \"steep spectra\": " + json_text(steep) + "}";
}

std::string cuda_plan(const Tensor& z, std::string variant, int64_t local_clusters, int64_t global_clusters,
                      std::optional<int64_t> group_images, bool normalize, int64_t max_kmeans_iters,
                      bool backward, int64_t multiprocessors, int64_t shared_bytes) {
  cpu::require_at_least(multiprocessors, 1, "multiprocessors");
  cpu::require_at_least(shared_bytes, int64_t{64} << 10, "shared_bytes");
  const Problem p = [&] {
    Problem posed = cpu::pose_problem(z, variant, local_clusters, global_clusters, group_images, normalize);
    cpu::count_clusters(posed, false, false, std::nullopt);
    return posed;
  }();
  const auto record = [&](const auto& body) {
    Recording r;
    r.multiprocessors = static_cast<int>(multiprocessors);
    r.shared_limit = static_cast<size_t>(shared_bytes);
    const RecordingScope scope(r);
    body();
    return r;
  };
  const Tensor seed = empty(z, {1}, ScalarType::Long);
  DseOutputs out;
  const Recording forward = record([&] {
    out = dse_components(z, seed, variant, local_clusters, global_clusters, group_images, normalize,
                         max_kmeans_iters, 1e-4, std::nullopt, std::nullopt, std::nullopt, backward);
  });
  int64_t kept = 0;
  std::apply(
      [&](const auto&... tensors) {
        int64_t at = 0;
        // The outputs from the ninth on are there for the backward pass.
        ((kept += at++ >= 8 ? tensors.numel() * 8 : 0), ...);
      },
      out);
  std::string json = "{\"paths\": " + paths_json(p, z, backward) + ", \"saved_bytes\": " + std::to_string(kept) +
                     ", \"forward\": " + pass_json(forward);
  if (backward) {
    const Recording pass = record([&] {
      const auto& [inter, image, batch, dim, norm, local, global, centroids, s0, s1, s2, s3, s4] = out;
      const Tensor upstream = empty(z, {5}, inter.scalar_type());
      dse_components_backward(upstream, z, local, global, centroids, s0, s1, s2, s3, s4, variant,
                              p.local_clusters, p.group_images, normalize);
    });
    json += ", \"backward\": " + pass_json(pass);
  }
  return json + "}";
}

}  // namespace
}  // namespace dse::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(dse_ext, m) {
  m.def(
      "cuda_plan(Tensor z, str variant, int local_clusters, int global_clusters, int? group_images, bool "
      "normalize, "
      "int max_kmeans_iters, bool backward, int multiprocessors, int shared_bytes) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dse_ext, Meta, m) { m.impl("cuda_plan", TORCH_BOX(&dse::cuda::cuda_plan)); }
