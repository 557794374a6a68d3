"""EsViT: DINO between views, and between the regions that correspond in them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import MethodOutput, recipe
from dse_ext.ssl.methods.distillation import SelfDistillation
from dse_ext.ssl.methods.options import DistillationOptions
from dse_ext.ssl.methods.parts import full_precision, teacher_of


def region_matching(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_features: Tensor,
    teacher_features: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Cross-entropy between each region of the student and the teacher's most similar one.

    Eq. 2 of the paper: with j*(i) the teacher's region of largest cosine similarity to the
    student's region i, the mean over the N regions of −Σ_k p_t[j*(i), k] log p_s[i, k].

    Args:
        student_logits: ``(B, N, K)`` of one view.
        teacher_logits: ``(B, N', K)`` of another view of the same images.
        student_features: ``(B, N, d)``, before the head.
        teacher_features: ``(B, N', d)``.
        center: Centre of the teacher's logits ``(1, 1, K)``.
        student_temp: Temperature of the student.
        teacher_temp: Temperature of the teacher.

    Returns:
        The loss, 0-dim.
    """
    from lightly.models.utils import get_at_index, most_similar_index

    targets = F.softmax((teacher_logits - center) / teacher_temp, dim=-1)
    matched = get_at_index(targets, most_similar_index(student_features, teacher_features))
    return -(matched * F.log_softmax(student_logits / student_temp, dim=-1)).sum(-1).mean()


class EsViT(SelfDistillation):
    """EsViT: view-level and region-level matching, L = L_V + L_R (Eqs. 1 and 2).

    Both levels have a head and a centre of their own. L_R runs over the pairs of different
    global views and of each global view with the small ones, as L_V does. Source: "Efficient
    Self-supervised Vision Transformers for Representation Learning", 2022,
    https://arxiv.org/abs/2106.09785. Simplified: the two levels have one schedule, and the mean of
    both terms is taken, so that the loss has the size of DINO's.
    """

    name = "esvit"
    title = "EsViT"
    paper = "Li et al., ICLR 2022"
    url = "https://arxiv.org/abs/2106.09785"
    regularizes = "the student's regions (last stage) of both global views"
    recipe = recipe(
        backbone="swin_tiny_patch4_window7_224",
        backbone_args={
            "embed_dim": 48,
            "depths": [2, 2, 2, 2],
            "num_heads": [2, 4, 8, 16],
            "patch_size": 2,
            "window_size": 6,
            "drop_path_rate": 0.0,
        },
        method_args={"local_views": 2},
    )

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: DistillationOptions
    ) -> None:
        from lightly.models.modules.center import Center

        super().__init__(backbone, image_size, steps, options)
        self.student_region_head = self._head()
        self.teacher_region_head = teacher_of(self.student_region_head, self._head)
        self.region_center = Center((1, 1, options.output_dim), momentum=options.center_momentum)

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes L_V and L_R; the dense features are the student's of both global views."""
        batch = len(views[0])
        temperature = self._teacher_temp(step)
        with torch.no_grad():
            pooled, regions = self.teacher(torch.cat(views[:2]))
            targets = self.teacher_head(pooled)
            region_targets = _per_region(self.teacher_region_head, regions)
        groups = [views[:2], views[2:]] if len(views) > 2 else [views]
        encoded = [self.student.encode(torch.cat(group)) for group in groups]
        predictions = self.student_head(torch.cat([part.pooled for part in encoded]))
        view_loss = full_precision(
            self.criterion,
            list(targets.split(batch)),
            list(predictions.split(batch)),
            teacher_temp=temperature,
        )
        students = [
            pair
            for part in encoded
            for pair in zip(
                _per_region(self.student_region_head, part.dense).split(batch),
                part.dense.split(batch),
                strict=True,
            )
        ]
        teachers = list(zip(region_targets.split(batch), regions.split(batch), strict=True))
        losses = [
            full_precision(
                region_matching,
                student_logits,
                teacher_logits,
                student_features,
                teacher_features,
                self.region_center.value,
                student_temp=self.options.student_temp,
                teacher_temp=temperature,
            )
            for t, (teacher_logits, teacher_features) in enumerate(teachers)
            for s, (student_logits, student_features) in enumerate(students)
            if s != t
        ]
        self.region_center.update(region_targets.float())
        loss = (view_loss + torch.stack(losses).mean()) / 2
        return MethodOutput(loss, encoded[0].regularized, views=2)

    def trained(self) -> list[nn.Module]:
        """Student and both of its heads."""
        return [*super().trained(), self.student_region_head]

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Trained networks and those that follow them."""
        return [*super().pairs(), (self.student_region_head, self.teacher_region_head)]

    def before_optimizer(self, step: int) -> None:
        """Keeps the prototypes of both heads fixed in the first steps."""
        super().before_optimizer(step)
        self.student_region_head.cancel_last_layer_gradients(step)  # type: ignore[operator]


def _per_region(head: nn.Module, regions: Tensor) -> Tensor:
    """Applies a head to ``(B, N, d)``; batch normalization wants rows."""
    logits: Tensor = head(regions.flatten(0, 1))
    return logits.unflatten(0, regions.shape[:2])
