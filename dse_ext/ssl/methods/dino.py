"""DINO: a student learns to predict the output of its own moving average."""

from __future__ import annotations

import torch
from torch import Tensor

from dse_ext.ssl.methods.base import MethodOutput
from dse_ext.ssl.methods.distillation import SelfDistillation
from dse_ext.ssl.methods.parts import encode_crops, full_precision


class DINO(SelfDistillation):
    """DINO with lightly's projection head, loss and multi-view transform.

    Source: "Emerging Properties in Self-Supervised Vision Transformers", 2021,
    https://arxiv.org/abs/2104.14294.
    """

    name = "dino"
    title = "DINO"
    paper = "Caron et al., ICCV 2021"
    url = "https://arxiv.org/abs/2104.14294"
    regularizes = "the student's patch tokens of both global views"

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes DINO's loss; the patch tokens are the student's of both global views."""
        batch = len(views[0])
        with torch.no_grad():
            targets = self.teacher_head(self.teacher(torch.cat(views[:2]))[0])
        encoded, pooled = encode_crops(self.student, views)
        loss = full_precision(
            self.criterion,
            list(targets.split(batch)),
            list(self.student_head(pooled).split(batch)),
            teacher_temp=self._teacher_temp(step),
        )
        return MethodOutput(loss, encoded.regularized, views=2)
