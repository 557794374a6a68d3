"""lightly's DSERegularizer with the clusters that it found made visible."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PeerResult(NamedTuple):
    loss: Tensor
    gradient: Tensor
    local_labels: Tensor  # (B, N)
    global_labels: Tensor  # (B, N)
    global_centroids: Tensor  # (G, k, d); inf where the last group has fewer rows than clusters


def run_lightly(z: Tensor, seed: int = 0, **options: object) -> PeerResult:
    """lightly's loss and gradient of z (B, N, d), with the labels and centroids that it used.

    It clusters each image first and then each group, always through its method ``_kmeans``.
    """
    from lightly.loss.regularizer import DSERegularizer

    class Recording(DSERegularizer):
        def _kmeans(self, x: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
            result = super()._kmeans(x, num_clusters)
            calls.append(result)
            return result

    calls: list[tuple[Tensor, Tensor]] = []
    torch.manual_seed(seed)
    z = z.detach().clone().requires_grad_()
    loss = Recording(**options)(z)
    (gradient,) = torch.autograd.grad(loss, z)
    b, n, d = z.shape
    k = len(calls[b][0])
    centroids = [torch.cat([c, c.new_full((k - len(c), d), torch.inf)]) for c, _ in calls[b:]]
    return PeerResult(
        loss.detach(),
        gradient,
        torch.stack([labels for _, labels in calls[:b]]),
        torch.cat([labels for _, labels in calls[b:]]).reshape(b, n),
        torch.stack(centroids),
    )
