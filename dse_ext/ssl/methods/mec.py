"""MEC: maximum entropy coding."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dse_ext.ssl.methods.byol import BYOL
from dse_ext.ssl.methods.options import above, at_least
from dse_ext.ssl.methods.siamese import Embedded, MomentumOptions


@dataclass(frozen=True)
class MECOptions(MomentumOptions):
    """Options of MEC.

    Attributes:
        distortion: ε²/d, the squared distortion of the code per dimension. The largest eigenvalue
            in the series is 1 / distortion (all embeddings equal).
        order: Number of terms of the Taylor series.
    """

    momentum: float = 0.996
    distortion: float = 0.25
    order: int = 4

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        above(self, 0, "distortion")
        at_least(self, 1, "order")


def coding_length(first: Tensor, second: Tensor, distortion: float, order: int) -> Tensor:
    """Entropy of embeddings as the length of their lossy code, between two views.

    Sections 3.1 to 3.3 of the paper: (m + d)/2 · log det(I + λ Z₁ᵀ Z₂) with λ = d/(m ε²), as its
    Taylor series (m + d)/2 · Tr Σ_{k=1..n} (−1)^{k+1}/k (λ Z₁ᵀ Z₂)^k. Of the m x m and the d x d
    product the smaller one is taken: their powers have the same trace.

    Args:
        first: Embeddings ``(m, d)`` of one view; normalized here.
        second: Embeddings of the other view.
        distortion: ε²/d.
        order: n.

    Returns:
        The length per embedding, 0-dim.
    """
    m, d = first.shape
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    product = first @ second.T if m <= d else first.T @ second
    product = product / (m * distortion)
    power, series = product, product.diagonal().sum()
    for k in range(2, order + 1):
        power = power @ product
        series = series + (-1) ** (k + 1) / k * power.diagonal().sum()
    return (m + d) / (2 * m) * series


class MEC(BYOL):
    """MEC: predictor and target network as in BYOL, and the code's length as the objective.

    Source: "Self-Supervised Learning via Maximum Entropy Coding", 2022,
    https://arxiv.org/abs/2210.11464. Simplified: the length is taken per embedding, so that the
    learning rate does not depend on the batch, and the distortion is constant during training.
    """

    name = "mec"
    title = "MEC"
    paper = "Liu et al., NeurIPS 2022"
    url = "https://arxiv.org/abs/2210.11464"
    Options = MECOptions

    def compare(self, first: Embedded, second: Embedded) -> Tensor:
        """Minus the coding length."""
        o: MECOptions = self.options
        return -coding_length(first.embedding, second.embedding, o.distortion, o.order)
