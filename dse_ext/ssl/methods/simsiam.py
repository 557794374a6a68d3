"""SimSiam: BYOL without a target network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dse_ext.ssl.methods.options import at_least
from dse_ext.ssl.methods.siamese import RESNET, Embedded, Predictive, ProjectorOptions


@dataclass(frozen=True)
class SimSiamOptions(ProjectorOptions):
    """Options of SimSiam.

    Attributes:
        predictor_dim: Width of the predictor's hidden layer.
    """

    predictor_dim: int = 512

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 1, "predictor_dim")


class SimSiam(Predictive):
    """SimSiam with lightly's heads, loss and transform.

    Eq. 4 of the paper: D(p_1, stopgrad(z_2)) / 2 + D(p_2, stopgrad(z_1)) / 2. Source: "Exploring
    Simple Siamese Representation Learning", 2021, https://arxiv.org/abs/2011.10566.
    """

    name = "simsiam"
    title = "SimSiam"
    paper = "Chen and He, CVPR 2021"
    url = "https://arxiv.org/abs/2011.10566"
    momentum = False
    augmentation = "simsiam"
    Options = SimSiamOptions
    recipe = RESNET

    def make_projector(self) -> nn.Module:
        """Lightly's SimSiam projection head."""
        from lightly.models.modules.heads import SimSiamProjectionHead

        o = self.options
        return SimSiamProjectionHead(self.student.dim, o.hidden_dim, o.output_dim)

    def make_predictor(self) -> nn.Module:
        """Lightly's SimSiam prediction head."""
        from lightly.models.modules.heads import SimSiamPredictionHead

        o = self.options
        return SimSiamPredictionHead(o.output_dim, o.predictor_dim, o.output_dim)

    def compare(self, first: Embedded, second: Embedded) -> Tensor:
        """Negative cosine similarity of prediction and target."""
        from lightly.loss.negative_cosine_similarity import NegativeCosineSimilarity

        return NegativeCosineSimilarity()(first.embedding, second.embedding)
