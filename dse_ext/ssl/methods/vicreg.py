"""VICReg: invariance between views, variance and covariance within each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dse_ext.ssl.methods.base import recipe
from dse_ext.ssl.methods.options import at_least
from dse_ext.ssl.methods.siamese import RESNET, Embedded, ProjectorOptions, Siamese


@dataclass(frozen=True)
class VICRegOptions(ProjectorOptions):
    """Options of VICReg.

    Attributes:
        invariance: Weight of the invariance term.
        variance: Weight of the variance term.
        covariance: Weight of the covariance term.
    """

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 0, "invariance", "variance", "covariance")


class VICReg(Siamese):
    """VICReg with lightly's head, loss and transform.

    Eq. 6 of "VICReg: Variance-Invariance-Covariance Regularization", 2022,
    https://arxiv.org/abs/2105.04906.
    """

    name = "vicreg"
    title = "VICReg"
    paper = "Bardes et al., ICLR 2022"
    url = "https://arxiv.org/abs/2105.04906"
    augmentation = "vicreg"
    Options = VICRegOptions
    recipe = recipe(RESNET, optimizer="lars", lr=0.2, weight_decay=1e-6, weight_decay_end=1e-6)

    def make_projector(self) -> nn.Module:
        """Lightly's VICReg projection head."""
        from lightly.models.modules.heads import VICRegProjectionHead

        o = self.options
        return VICRegProjectionHead(self.student.dim, o.hidden_dim, o.output_dim)

    def compare(self, first: Embedded, second: Embedded) -> Tensor:
        """The three terms."""
        from lightly.loss.vicreg_loss import VICRegLoss

        o: VICRegOptions = self.options
        loss = VICRegLoss(o.invariance, o.variance, o.covariance)
        return loss(first.embedding, second.embedding)
