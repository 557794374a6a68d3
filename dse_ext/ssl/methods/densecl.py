"""DenseCL: contrastive learning of image vectors and of corresponding positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import Method, MethodOutput
from dse_ext.ssl.methods.options import above, at_least, shares
from dse_ext.ssl.methods.parts import follow, full_precision, persistent, teacher_of
from dse_ext.ssl.methods.siamese import RESNET, MomentumOptions, two_views


@dataclass(frozen=True)
class DenseCLOptions(MomentumOptions):
    """Options of DenseCL.

    Attributes:
        temperature: Temperature of both contrastive losses.
        queue: Number of negative keys that are kept, for each of the two losses.
        dense_weight: Weight λ of the dense loss; that of the global one is 1 − λ.
    """

    output_dim: int = 128
    momentum: float = 0.999
    temperature: float = 0.2
    queue: int = 4096
    dense_weight: float = 0.5

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        above(self, 0, "temperature")
        at_least(self, 1, "queue")
        shares(self, "dense_weight")


class DenseCL(Method):
    """DenseCL with lightly's heads, losses with memory banks, and transform.

    Eqs. 1 to 3 of "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", 2021,
    https://arxiv.org/abs/2011.09157. Positions correspond where the backbone's features are most
    similar. As in lightly, the dense loss draws its negatives from a bank of position keys
    (the paper: of pooled dense keys).
    """

    name = "densecl"
    title = "DenseCL"
    paper = "Wang et al., CVPR 2021"
    url = "https://arxiv.org/abs/2011.09157"
    regularizes = "the query network's dense features of the first view"
    Options = DenseCLOptions
    recipe = RESNET

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: DenseCLOptions
    ) -> None:
        super().__init__(backbone, image_size, steps, options)
        self.query = backbone
        self.query_head, self.query_dense_head = self._head(), self._head()
        self.key = teacher_of(backbone)
        self.key_head = teacher_of(self.query_head)
        self.key_dense_head = teacher_of(self.query_dense_head)
        self.criterion, self.dense_criterion = self._loss(), self._loss()

    def _head(self) -> nn.Module:
        from lightly.models.modules.heads import DenseCLProjectionHead

        head: nn.Module = DenseCLProjectionHead(
            self.query.dim, self.options.hidden_dim, self.options.output_dim
        )
        return head

    def _loss(self) -> Any:
        from lightly.loss.ntx_ent_loss import NTXentLoss

        o: DenseCLOptions = self.options
        loss = NTXentLoss(o.temperature, memory_bank_size=(o.queue, o.output_dim))
        persistent(loss.memory_bank)
        return loss

    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Two random crops."""
        return two_views(self.image_size, self.options, "densecl")

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes both losses; the dense features are those of the query's view."""
        from lightly.models.utils import select_most_similar

        queries = self.query.encode(views[0])
        with torch.no_grad():
            pooled, dense = self.key(views[1])
            key, dense_key = self.key_head(pooled), self.key_dense_head(dense)
            dense_key = select_most_similar(queries.dense, dense, dense_key)
        loss = full_precision(self.criterion, self.query_head(queries.pooled), key)
        dense_loss = full_precision(
            self.dense_criterion,
            self.query_dense_head(queries.dense).flatten(0, 1),
            dense_key.flatten(0, 1),
        )
        weight = self.options.dense_weight
        return MethodOutput((1 - weight) * loss + weight * dense_loss, queries.regularized)

    def trained(self) -> list[nn.Module]:
        """Query network and its heads."""
        return [self.query, self.query_head, self.query_dense_head]

    def scored(self) -> DenseBackbone:
        """The query network."""
        return self.query

    def after_optimizer(self, step: int) -> None:
        """Moves the key network."""
        pairs = [
            (self.query, self.key),
            (self.query_head, self.key_head),
            (self.query_dense_head, self.key_dense_head),
        ]
        follow(pairs, step, self.steps, self.options.momentum)
