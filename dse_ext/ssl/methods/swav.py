"""SwAV: one view's assignment to prototypes is predicted from the other views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import Method, MethodOutput, recipe
from dse_ext.ssl.methods.options import MultiCropOptions, above, at_least, shares
from dse_ext.ssl.methods.parts import encode_crops, full_precision, memory_bank
from dse_ext.ssl.methods.siamese import RESNET


@dataclass(frozen=True)
class SwAVOptions(MultiCropOptions):
    """Options of SwAV.

    Attributes:
        hidden_dim: Width of the projector's hidden layer.
        output_dim: Width of the embedding.
        prototypes: Number of prototypes.
        temperature: Temperature of the predictions.
        sinkhorn_temperature: ε of the assignment.
        sinkhorn_iterations: Number of Sinkhorn–Knopp iterations.
        freeze_prototypes: Share of the steps during which the prototypes stay fixed.
        queue: Number of past embeddings of each global view that take part in the assignment,
            which batches smaller than the number of prototypes need; 0 for none.
        queue_start: Share of the steps after which the queue is used.
    """

    local_views: int = 4
    hidden_dim: int = 2048
    output_dim: int = 128
    prototypes: int = 256
    temperature: float = 0.1
    sinkhorn_temperature: float = 0.05
    sinkhorn_iterations: int = 3
    freeze_prototypes: float = 0.01
    queue: int = 512
    queue_start: float = 0.15

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 1, "hidden_dim", "output_dim", "prototypes", "sinkhorn_iterations")
        at_least(self, 0, "queue")
        above(self, 0, "temperature", "sinkhorn_temperature")
        shares(self, "freeze_prototypes", "queue_start")


class SwAV(Method):
    """SwAV with lightly's head, prototypes, loss, transform and memory bank.

    Eqs. 1 to 5 of "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
    2020, https://arxiv.org/abs/2006.09882.
    """

    name = "swav"
    title = "SwAV"
    paper = "Caron et al., NeurIPS 2020"
    url = "https://arxiv.org/abs/2006.09882"
    regularizes = "the network's dense features of both global views"
    min_batch = 2
    Options = SwAVOptions
    recipe = recipe(RESNET, lr=0.1, weight_decay=1e-6, weight_decay_end=1e-6)

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: SwAVOptions
    ) -> None:
        from lightly.loss.swav_loss import SwaVLoss
        from lightly.models.modules.heads import SwaVProjectionHead, SwaVPrototypes

        super().__init__(backbone, image_size, steps, options)
        self.student = backbone
        self.projector = SwaVProjectionHead(backbone.dim, options.hidden_dim, options.output_dim)
        self.prototypes = SwaVPrototypes(
            options.output_dim, options.prototypes, round(options.freeze_prototypes * steps)
        )
        self.queues = nn.ModuleList(
            memory_bank(options.queue, options.output_dim) for _ in range(2 if options.queue else 0)
        )
        self.criterion = SwaVLoss(
            options.temperature, options.sinkhorn_iterations, options.sinkhorn_temperature
        )

    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Two global and several local views."""
        from lightly.transforms.swav_transform import SwaVTransform

        o: SwAVOptions = self.options
        views: Any = SwaVTransform(
            crop_sizes=(self.image_size, o.local_size or self.image_size // 2),
            crop_counts=(2, o.local_views),
            crop_min_scales=(o.global_scale, o.local_scale),
            crop_max_scales=(1.0, o.global_scale),
            cj_strength=o.color_jitter,
            random_gray_scale=o.gray_scale,
            sigmas=(0.1, o.blur),
        )
        return views

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes the loss; the dense features are those of both global views."""
        batch = len(views[0])
        self.prototypes.normalize()
        encoded, pooled = encode_crops(self.student, views)
        embeddings = F.normalize(self.projector(pooled).float(), dim=1)
        scores = self.prototypes(embeddings, step).split(batch)
        loss = full_precision(
            self.criterion, list(scores[:2]), list(scores[2:]), self._past(embeddings, batch, step)
        )
        return MethodOutput(loss, encoded.regularized, views=2)

    def _past(self, embeddings: Tensor, batch: int, step: int) -> list[Tensor] | None:
        """Scores of past embeddings; keeps the current ones."""
        parts = embeddings.detach().split(batch)
        past = [
            queue(part, update=True)[1] for queue, part in zip(self.queues, parts, strict=False)
        ]
        # Until the queue is full it holds random vectors.
        begin = max(self.options.queue_start * self.steps, -(-self.options.queue // batch))
        if not past or step < begin:
            return None
        with torch.no_grad():
            return [self.prototypes(features, step) for features in past]

    def trained(self) -> list[nn.Module]:
        """Backbone, projector and prototypes."""
        return [self.student, self.projector, self.prototypes]

    def scored(self) -> DenseBackbone:
        """The backbone."""
        return self.student
