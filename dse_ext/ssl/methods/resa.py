"""ReSA: a network's own clustering of the batch guides its embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dse_ext.ssl.methods.base import recipe
from dse_ext.ssl.methods.options import above, at_least
from dse_ext.ssl.methods.siamese import RESNET, Embedded, MomentumOptions, Predictive


@dataclass(frozen=True)
class ReSAOptions(MomentumOptions):
    """Options of ReSA.

    Attributes:
        temperature: τ of the embeddings' similarities.
        sinkhorn_temperature: ε of the encodings' similarities.
        sinkhorn_iterations: Number of Sinkhorn–Knopp iterations.
    """

    momentum: float = 0.996
    temperature: float = 0.4
    sinkhorn_temperature: float = 0.05
    sinkhorn_iterations: int = 3

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        above(self, 0, "temperature", "sinkhorn_temperature")
        at_least(self, 1, "sinkhorn_iterations")


def self_assignment(
    embeddings: Tensor,
    targets: Tensor,
    encodings: Tensor,
    temperature: float,
    sinkhorn_temperature: float,
    iterations: int,
) -> Tensor:
    """Cross-entropy between the batch's own assignment and the embeddings' similarities.

    Section 4 of the paper: A is the doubly stochastic matrix that Sinkhorn–Knopp makes of
    exp(HHᵀ/ε), H the normalized encodings, and the loss −1/m Σ_ij A_ij log softmax_j(z_iᵀz'_j/τ).

    Args:
        embeddings: Z ``(m, d)``.
        targets: Z' ``(m, d)``, of the other view.
        encodings: H ``(m, D)``, outputs of the backbone.
        temperature: τ.
        sinkhorn_temperature: ε.
        iterations: Number of Sinkhorn–Knopp iterations.

    Returns:
        The loss, 0-dim.
    """
    from lightly.loss.swav_loss import sinkhorn

    h = F.normalize(encodings.detach(), dim=1)
    assignment = sinkhorn(h @ h.T, iterations, sinkhorn_temperature)
    logits = F.normalize(embeddings, dim=1) @ F.normalize(targets, dim=1).T
    return -(assignment * F.log_softmax(logits / temperature, dim=1)).sum(dim=1).mean()


class ReSA(Predictive):
    """ReSA with lightly's Sinkhorn iterations.

    Source: "Clustering Properties of Self-Supervised Learning", 2025,
    https://arxiv.org/abs/2501.18452. Encodings and targets come from the moving average.
    Simplified: both views are augmented strongly (the transform of BYOL), both directions count.
    """

    name = "resa"
    title = "ReSA"
    paper = "Weng et al., ICML 2025"
    url = "https://arxiv.org/abs/2501.18452"
    Options = ReSAOptions
    recipe = recipe(RESNET, lr=0.1)

    def make_projector(self) -> nn.Module:
        """A batch-normalized head of three layers."""
        from lightly.models.modules.heads import MoCoProjectionHead

        o = self.options
        return MoCoProjectionHead(
            self.student.dim, o.hidden_dim, o.output_dim, num_layers=3, batch_norm=True
        )

    def make_predictor(self) -> nn.Module:
        """None: the embeddings themselves are compared."""
        return nn.Identity()

    def compare(self, first: Embedded, second: Embedded) -> Tensor:
        """Loss of embeddings against the target view's assignment."""
        o: ReSAOptions = self.options
        return self_assignment(
            first.embedding,
            second.embedding,
            second.encoding,
            o.temperature,
            o.sinkhorn_temperature,
            o.sinkhorn_iterations,
        )
