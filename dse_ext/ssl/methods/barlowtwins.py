"""Barlow Twins: the cross-correlation of two views' embeddings is pulled to the identity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dse_ext.ssl.methods.base import recipe
from dse_ext.ssl.methods.options import at_least
from dse_ext.ssl.methods.siamese import RESNET, Embedded, ProjectorOptions, Siamese


@dataclass(frozen=True)
class BarlowTwinsOptions(ProjectorOptions):
    """Options of Barlow Twins.

    Attributes:
        redundancy: Weight λ of the off-diagonal entries.
    """

    redundancy: float = 5e-3

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 0, "redundancy")


class BarlowTwins(Siamese):
    """Barlow Twins with lightly's head and loss, and the transform of BYOL, as in the paper.

    Eq. 1 of "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", 2021,
    https://arxiv.org/abs/2103.03230.
    """

    name = "barlowtwins"
    title = "Barlow Twins"
    paper = "Zbontar et al., ICML 2021"
    url = "https://arxiv.org/abs/2103.03230"
    Options = BarlowTwinsOptions
    recipe = recipe(RESNET, optimizer="lars", lr=0.1, weight_decay=1.5e-6, weight_decay_end=1.5e-6)

    def make_projector(self) -> nn.Module:
        """Lightly's Barlow Twins projection head."""
        from lightly.models.modules.heads import BarlowTwinsProjectionHead

        o = self.options
        return BarlowTwinsProjectionHead(self.student.dim, o.hidden_dim, o.output_dim)

    def compare(self, first: Embedded, second: Embedded) -> Tensor:
        """Distance of the cross-correlation matrix from the identity."""
        from lightly.loss.barlow_twins_loss import BarlowTwinsLoss

        return BarlowTwinsLoss(self.options.redundancy)(first.embedding, second.embedding)
