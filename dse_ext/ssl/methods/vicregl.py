"""VICRegL: VICReg of image vectors, and of the positions that correspond in two views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import Method, MethodOutput
from dse_ext.ssl.methods.options import at_least, shares
from dse_ext.ssl.methods.parts import full_precision
from dse_ext.ssl.methods.siamese import ProjectorOptions
from dse_ext.ssl.methods.vicreg import VICReg


@dataclass(frozen=True)
class VICRegLOptions(ProjectorOptions):
    """Options of VICRegL.

    Attributes:
        local_hidden_dim: Width of the hidden layers of the local projector.
        local_output_dim: Width of the local embedding.
        alpha: Weight of the global loss; that of the local one is 1 − alpha.
        invariance: Weight of the invariance term.
        variance: Weight of the variance term.
        covariance: Weight of the covariance term.
        matches: Number of matched positions per image, first search.
        matches_back: Number of matched positions per image, search in the other direction.
    """

    local_hidden_dim: int = 512
    local_output_dim: int = 512
    alpha: float = 0.75
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    matches: int = 20
    matches_back: int = 4

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 1, "local_hidden_dim", "local_output_dim", "matches", "matches_back")
        at_least(self, 0, "invariance", "variance", "covariance")
        shares(self, "alpha")


class VICRegL(Method):
    """VICRegL with lightly's heads, loss and transform.

    Positions are matched by their features and by their place in the image. Source: Section 3 of
    "VICRegL: Self-Supervised Learning of Local Visual Features", 2022,
    https://arxiv.org/abs/2210.01571. Two global views, as the paper trains ResNets.
    """

    name = "vicregl"
    title = "VICRegL"
    paper = "Bardes et al., NeurIPS 2022"
    url = "https://arxiv.org/abs/2210.01571"
    regularizes = "the network's dense features of both views"
    min_batch = 2
    Options = VICRegLOptions
    recipe = VICReg.recipe

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: VICRegLOptions
    ) -> None:
        from lightly.loss.vicregl_loss import VICRegLLoss
        from lightly.models.modules.heads import VicRegLLocalProjectionHead, VICRegProjectionHead

        super().__init__(backbone, image_size, steps, options)
        o = options
        self.student = backbone
        self.grid = backbone.grid(image_size)
        self.projector = VICRegProjectionHead(backbone.dim, o.hidden_dim, o.output_dim)
        self.local_projector = VicRegLLocalProjectionHead(
            backbone.dim, o.local_hidden_dim, o.local_output_dim
        )
        self.criterion = VICRegLLoss(
            o.invariance,
            o.variance,
            o.covariance,
            alpha=o.alpha,
            num_matches=(o.matches, o.matches_back),
        )

    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Two views, and where in the image each of their positions lies."""
        from lightly.transforms.vicregl_transform import VICRegLTransform

        o: VICRegLOptions = self.options
        views: Any = VICRegLTransform(
            global_crop_size=self.image_size,
            n_local_views=0,
            global_crop_scale=(o.crop_scale, 1.0),
            global_grid_size=self.grid,
            global_gaussian_blur_sigmas=(0.1, o.blur),
            cj_strength=o.color_jitter,
            random_gray_scale=o.gray_scale,
        )
        return views

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes the loss; the dense features are those of both views.

        Args:
            views: Two views, then their grids ``(B, grid, grid, 2)`` in pixels of the image.
            step: Number of optimizer steps done so far.
        """
        encoded = [self.student.encode(view) for view in views[:2]]
        features = [
            (
                self.projector(part.pooled),
                self.local_projector(part.dense).unflatten(1, (self.grid, self.grid)),
            )
            for part in encoded
        ]
        loss = full_precision(self.criterion, features, views[2:])
        return MethodOutput(loss, torch.cat([part.regularized for part in encoded]), views=2)

    def trained(self) -> list[nn.Module]:
        """Backbone and both projectors."""
        return [self.student, self.projector, self.local_projector]

    def scored(self) -> DenseBackbone:
        """The backbone."""
        return self.student
