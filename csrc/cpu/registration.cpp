// Registers the CPU kernels with torch.

#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"

STABLE_TORCH_LIBRARY_IMPL(dse_ext, CPU, m) {
  m.impl("dse_components", TORCH_BOX(&dse::cpu::dse_components));
  m.impl("dse_components_backward", TORCH_BOX(&dse::cpu::dse_components_backward));
  m.impl("kmeans", TORCH_BOX(&dse::cpu::kmeans_op));
  m.impl("cluster_nuclear_norms", TORCH_BOX(&dse::cpu::cluster_nuclear_norms));
  m.impl("cluster_nuclear_norms_backward", TORCH_BOX(&dse::cpu::cluster_nuclear_norms_backward));
  m.impl("effective_rank", TORCH_BOX(&dse::cpu::effective_rank));
  m.impl("effective_rank_backward", TORCH_BOX(&dse::cpu::effective_rank_backward));
}
