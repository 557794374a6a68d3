"""What methods with two views of equal rank share: projector, predictor, target network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import Method, MethodOutput, recipe
from dse_ext.ssl.methods.options import TwoViewOptions, at_least, shares
from dse_ext.ssl.methods.parts import follow, full_precision, teacher_of

RESNET = recipe(
    backbone="resnet18",
    # Positions of 16 x 16 pixels, as those of a ViT with patches of 16.
    backbone_args={"output_stride": 16},
    optimizer="sgd",
    lr=0.05,
    min_lr=0.0,
    weight_decay=1e-4,
    weight_decay_end=1e-4,
    clip_grad=0.0,
)
"""A recipe for methods that were published with ResNets and SGD."""


@dataclass(frozen=True)
class ProjectorOptions(TwoViewOptions):
    """Two views and a projector.

    Attributes:
        hidden_dim: Width of the hidden layers of the projector (and predictor).
        output_dim: Width of the embedding that the loss compares.
    """

    hidden_dim: int = 2048
    output_dim: int = 2048

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 1, "hidden_dim", "output_dim")


@dataclass(frozen=True)
class MomentumOptions(ProjectorOptions):
    """Two views, a projector, a predictor and a target network that is a moving average.

    Attributes:
        momentum: Momentum of the target network at the first step; rises to 1 along a cosine.
    """

    output_dim: int = 256
    momentum: float = 0.99

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        shares(self, "momentum")


def two_views(
    image_size: int, options: TwoViewOptions, transform: str
) -> Callable[[Image.Image], list[Tensor]]:
    """One of lightly's transforms that give two views.

    Args:
        image_size: Width of a view in pixels.
        options: Strength of the augmentation.
        transform: ``"byol"`` (the views' blur and solarization differ; also used for MoCo v3,
            Barlow Twins, MEC and ReSA), ``"simsiam"``, ``"vicreg"`` or ``"densecl"``.
    """
    arguments: dict[str, Any] = {
        "input_size": image_size,
        "cj_strength": options.color_jitter,
        "min_scale": options.crop_scale,
        "random_gray_scale": options.gray_scale,
        "sigmas": (0.1, options.blur),
    }
    views: Any
    if transform == "byol":
        from lightly.transforms.byol_transform import (
            BYOLTransform,
            BYOLView1Transform,
            BYOLView2Transform,
        )

        views = BYOLTransform(BYOLView1Transform(**arguments), BYOLView2Transform(**arguments))
    elif transform == "simsiam":
        from lightly.transforms.simsiam_transform import SimSiamTransform

        views = SimSiamTransform(**arguments)
    elif transform == "vicreg":
        from lightly.transforms.vicreg_transform import VICRegTransform

        views = VICRegTransform(**arguments)
    else:
        from lightly.transforms.densecl_transform import DenseCLTransform

        views = DenseCLTransform(**arguments)
    return views


class Embedded(NamedTuple):
    """What a network makes of one view.

    Attributes:
        encoding: Image vectors of the backbone ``(B, d)``.
        embedding: Output of the projector, or of the predictor where there is one.
    """

    encoding: Tensor
    embedding: Tensor


class Siamese(Method):
    """Two views, one network, a loss between the embeddings of both.

    Each view goes through the networks by itself, so that batch normalization sees one view, as
    in the papers. Sub-classes give the projector and :meth:`compare`.
    """

    min_batch = 2
    augmentation: ClassVar[str] = "byol"
    regularizes = "the network's dense features of both views"
    Options: ClassVar[type] = ProjectorOptions

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: ProjectorOptions
    ) -> None:
        super().__init__(backbone, image_size, steps, options)
        self.student = backbone
        self.projector = self.make_projector()

    @abstractmethod
    def make_projector(self) -> nn.Module:
        """Creates the projector: image vectors ``(B, d)`` to embeddings."""

    @abstractmethod
    def compare(self, first: Embedded, second: Embedded) -> Tensor:
        """The loss between two views, in float32."""

    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Two random crops."""
        return two_views(self.image_size, self.options, self.augmentation)

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes the loss; the dense features are those of both views."""
        encoded = [self.student.encode(view) for view in views]
        embedded = [Embedded(part.pooled, self.projector(part.pooled)) for part in encoded]
        loss = full_precision(self.compare, *embedded)
        tokens = torch.cat([part.regularized for part in encoded])
        return MethodOutput(loss, tokens, views=len(views))

    def trained(self) -> list[nn.Module]:
        """Backbone and projector."""
        return [self.student, self.projector]

    def scored(self) -> DenseBackbone:
        """The backbone."""
        return self.student


class Predictive(Siamese):
    """A predictor on top of the projector, and targets that are not differentiated.

    The targets come from the network itself (``momentum = False``) or from its moving average.
    The loss is the mean of both directions.
    """

    momentum: ClassVar[bool] = True
    regularizes = "the trained network's dense features of both views"
    Options: ClassVar[type] = MomentumOptions

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: ProjectorOptions
    ) -> None:
        super().__init__(backbone, image_size, steps, options)
        self.predictor = self.make_predictor()
        if self.momentum:
            self.target = teacher_of(backbone)
            self.target_projector = teacher_of(self.projector)

    @abstractmethod
    def make_predictor(self) -> nn.Module:
        """Creates the predictor: embeddings to embeddings."""

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes the loss; the dense features are those of both views."""
        encoded = [self.student.encode(view) for view in views]
        projected = [self.projector(part.pooled) for part in encoded]
        predicted = [
            Embedded(part.pooled, self.predictor(z))
            for part, z in zip(encoded, projected, strict=True)
        ]
        if self.momentum:
            with torch.no_grad():
                pooled = [self.target(view)[0] for view in views]
                targets = [Embedded(h, self.target_projector(h)) for h in pooled]
        else:
            targets = [
                Embedded(part.pooled.detach(), z.detach())
                for part, z in zip(encoded, projected, strict=True)
            ]
        losses = [
            full_precision(self.compare, predicted[0], targets[1]),
            full_precision(self.compare, predicted[1], targets[0]),
        ]
        tokens = torch.cat([part.regularized for part in encoded])
        return MethodOutput(torch.stack(losses).mean(), tokens, views=len(views))

    def trained(self) -> list[nn.Module]:
        """Backbone, projector and predictor."""
        return [self.student, self.projector, self.predictor]

    def after_optimizer(self, step: int) -> None:
        """Moves the target network."""
        if self.momentum:
            pairs = [(self.student, self.target), (self.projector, self.target_projector)]
            follow(pairs, step, self.steps, self.options.momentum)
