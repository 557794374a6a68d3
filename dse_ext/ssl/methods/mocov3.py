"""MoCo v3: contrastive prediction of a momentum encoder's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import recipe
from dse_ext.ssl.methods.options import above
from dse_ext.ssl.methods.parts import info_nce
from dse_ext.ssl.methods.siamese import Embedded, MomentumOptions, Predictive


@dataclass(frozen=True)
class MoCoV3Options(MomentumOptions):
    """Options of MoCo v3.

    Attributes:
        temperature: τ of the contrastive loss.
        freeze_patch_embedding: Keep a ViT's random patch projection fixed, which the paper finds
            to make training stable.
    """

    temperature: float = 0.2
    freeze_patch_embedding: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        above(self, 0, "temperature")


class MoCoV3(Predictive):
    """MoCo v3 with lightly's heads and the transform of BYOL, as in the paper.

    Algorithm 1: 2τ times the cross-entropy of finding the own key among the batch's, in both
    directions (here their mean). Source: "An Empirical Study of Training Self-Supervised Vision
    Transformers", 2021, https://arxiv.org/abs/2104.02057. Simplified: timm's position embeddings.
    """

    name = "mocov3"
    title = "MoCo v3"
    paper = "Chen et al., ICCV 2021"
    url = "https://arxiv.org/abs/2104.02057"
    Options = MoCoV3Options
    recipe = recipe(weight_decay=0.1, weight_decay_end=0.1)

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: MoCoV3Options
    ) -> None:
        super().__init__(backbone, image_size, steps, options)
        if options.freeze_patch_embedding and backbone.family == "vit":
            embedding: Any = backbone.model.patch_embed
            for parameter in embedding.parameters():
                parameter.requires_grad = False

    def make_projector(self) -> nn.Module:
        """Lightly's MoCo head with three layers, all batch-normalized."""
        return self._head(self.student.dim, layers=3)

    def make_predictor(self) -> nn.Module:
        """The same with two layers."""
        return self._head(self.options.output_dim, layers=2)

    def _head(self, dim: int, layers: int) -> nn.Module:
        from lightly.models.modules.heads import MoCoProjectionHead

        o = self.options
        return MoCoProjectionHead(dim, o.hidden_dim, o.output_dim, layers, batch_norm=True)

    def compare(self, first: Embedded, second: Embedded) -> Tensor:
        """Contrastive loss of queries and keys."""
        tau = self.options.temperature
        return 2 * tau * info_nce(first.embedding, second.embedding, None, tau)
