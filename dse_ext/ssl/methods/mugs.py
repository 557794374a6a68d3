"""Mugs: supervision at the level of instances, of local groups and of groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import MethodOutput
from dse_ext.ssl.methods.distillation import SelfDistillation
from dse_ext.ssl.methods.options import DistillationOptions, above, at_least
from dse_ext.ssl.methods.parts import (
    encode_crops,
    full_precision,
    info_nce,
    memory_bank,
    teacher_of,
)


@dataclass(frozen=True)
class MugsOptions(DistillationOptions):
    """Options of Mugs: those of DINO for the groups, and those of the two finer levels.

    Attributes:
        instance_dim: Width of the embeddings that are contrasted.
        temperature: Temperature of both contrastive losses.
        queue: Number of past images that are kept: negatives of both losses, and neighbours.
        neighbours: Number of neighbours in a local group.
        group_heads: Number of attention heads that aggregate a local group.
    """

    instance_dim: int = 128
    temperature: float = 0.2
    queue: int = 1024
    neighbours: int = 8
    group_heads: int = 4

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 1, "instance_dim", "queue", "neighbours", "group_heads")
        above(self, 0, "temperature")


class LocalGroup(nn.Module):
    """Aggregates an image's features with those of its neighbours by one transformer block."""

    def __init__(self, dim: int, heads: int, output_dim: int) -> None:
        super().__init__()
        # A head count that the width allows.
        heads = next(h for h in range(min(heads, dim), 0, -1) if dim % h == 0)
        self.block = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, output_dim)

    def forward(self, features: Tensor, bank: Tensor, neighbours: int) -> Tensor:
        """Returns the local-group embedding of each image.

        Args:
            features: Mean patch features ``(B, d)``.
            bank: Mean patch features of past images ``(K, d)``.
            neighbours: Number of neighbours by cosine similarity.
        """
        with torch.no_grad():
            similarity = F.normalize(features.float(), dim=1) @ F.normalize(bank, dim=1).T
            nearest = bank[similarity.topk(min(neighbours, len(bank)), dim=1).indices]
        group = torch.cat([features[:, None], nearest.to(features.dtype)], dim=1)
        return self.project(self.norm(self.block(group)[:, 0]))


class Mugs(SelfDistillation):
    """Mugs: the mean of three losses (Section 3 of the paper).

    Instances: InfoNCE between the student's prediction and the teacher's embedding of the other
    global view. Local groups: the same of features that a transformer aggregates from an image
    and its nearest neighbours in a memory bank. Groups: DINO's assignment to prototypes. Source:
    "Mugs: A Multi-Granular Self-Supervised Learning Framework", 2022,
    https://arxiv.org/abs/2203.14415. Simplified: one augmentation for all levels (DINO's),
    small views take part in the group level only, the aggregation is one block deep, and the
    group level has the image vector as its input.
    """

    name = "mugs"
    title = "Mugs"
    paper = "Zhou et al., 2022"
    url = "https://arxiv.org/abs/2203.14415"
    regularizes = "the student's patch tokens of both global views"
    min_batch = 2
    Options = MugsOptions

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: MugsOptions
    ) -> None:
        from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead

        super().__init__(backbone, image_size, steps, options)
        o, dim = options, backbone.dim
        self.instance = BYOLProjectionHead(dim, o.hidden_dim, o.instance_dim)
        self.instance_predictor = BYOLPredictionHead(o.instance_dim, o.hidden_dim, o.instance_dim)
        self.local_group = LocalGroup(dim, o.group_heads, o.instance_dim)
        self.local_predictor = BYOLPredictionHead(o.instance_dim, o.hidden_dim, o.instance_dim)
        self.teacher_instance = teacher_of(self.instance)
        self.teacher_local_group = teacher_of(self.local_group)
        self.instance_bank = memory_bank(o.queue, o.instance_dim)
        self.local_bank = memory_bank(o.queue, o.instance_dim)
        self.feature_bank = memory_bank(o.queue, dim)

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes the three losses; the patch tokens are the student's of both global views."""
        o: MugsOptions = self.options
        batch = len(views[0])
        past = self.feature_bank.bank.clone()
        with torch.no_grad():
            pooled, dense = self.teacher(torch.cat(views[:2]))
            targets = self.teacher_head(pooled)
            means = dense.mean(dim=1)
            keys = self.teacher_instance(pooled).float()
            group_keys = self.teacher_local_group(means, past, o.neighbours).float()
        encoded, vectors = encode_crops(self.student, views)
        queries = self.instance_predictor(self.instance(encoded.pooled))
        groups = self.local_group(encoded.dense.mean(dim=1), past, o.neighbours)
        losses = [
            self._contrast(queries, keys, self.instance_bank, batch),
            self._contrast(self.local_predictor(groups), group_keys, self.local_bank, batch),
            full_precision(
                self.criterion,
                list(targets.split(batch)),
                list(self.student_head(vectors).split(batch)),
                teacher_temp=self._teacher_temp(step),
            ),
        ]
        self.feature_bank(means[:batch].float(), update=True)
        return MethodOutput(torch.stack(losses).mean(), encoded.regularized, views=2)

    def _contrast(self, queries: Tensor, keys: Tensor, bank: nn.Module, batch: int) -> Tensor:
        """InfoNCE of each view's queries with the other view's keys, in both directions."""
        _, negatives = bank(F.normalize(keys[:batch], dim=1), update=True)
        both = [
            full_precision(info_nce, q, k, negatives, temperature=self.options.temperature)
            for q, k in zip(queries.split(batch), reversed(keys.split(batch)), strict=True)
        ]
        return torch.stack(both).mean()

    def trained(self) -> list[nn.Module]:
        """Student and all of its heads."""
        return [
            *super().trained(),
            self.instance,
            self.instance_predictor,
            self.local_group,
            self.local_predictor,
        ]

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Trained networks and those that follow them."""
        return [
            *super().pairs(),
            (self.instance, self.teacher_instance),
            (self.local_group, self.teacher_local_group),
        ]
