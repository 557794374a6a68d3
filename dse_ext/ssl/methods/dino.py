"""DINO: a student learns to predict the output of its own moving average."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.config import ConfigError
from dse_ext.ssl.methods.base import Method, MethodOutput


@dataclass(frozen=True)
class DINOOptions:
    """Options of DINO.

    Attributes:
        hidden_dim: Width of the projection head.
        bottleneck_dim: Width of the head's bottleneck.
        output_dim: Number of prototypes.
        batch_norm: Batch normalization in the head. An untrained network gives all images nearly
            the same vector; normalizing over the batch pulls them apart from the first step on,
            which a run of a few hundred steps needs.
        local_views: Number of small views per image.
        local_size: Width of a small view in pixels; 0 means half of the image size.
        global_scale: Least share of the image's area in a global view.
        local_scale: Least share of the image's area in a small view; its greatest share is
            ``global_scale``.
        color_jitter: Strength of the colour jitter.
        gray_scale: Probability that a view loses its colours.
        blur: Greatest standard deviation of the Gaussian blur, in pixels of a view.
        momentum: Momentum of the teacher at the first step; rises to 1 along a cosine.
        teacher_temp: Temperature of the teacher.
        warmup_teacher_temp: Temperature of the teacher at the first step.
        warmup_teacher_steps: Share of the steps over which it moves to ``teacher_temp``.
        student_temp: Temperature of the student.
        center_momentum: Momentum of the centre of the teacher's outputs.
        freeze_last_layer: Share of the steps during which the prototypes stay fixed.
    """

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    output_dim: int = 4096
    batch_norm: bool = False
    local_views: int = 6
    local_size: int = 0
    global_scale: float = 0.4
    local_scale: float = 0.05
    color_jitter: float = 0.5
    gray_scale: float = 0.2
    blur: float = 2.0
    momentum: float = 0.996
    teacher_temp: float = 0.04
    warmup_teacher_temp: float = 0.04
    warmup_teacher_steps: float = 0.3
    student_temp: float = 0.1
    center_momentum: float = 0.9
    freeze_last_layer: float = 0.01

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        for name in ("hidden_dim", "bottleneck_dim", "output_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method option {name} must be >= 1, got {getattr(self, name)}.")
        for name in ("local_views", "local_size", "color_jitter"):
            if getattr(self, name) < 0:
                raise ConfigError(f"method option {name} must be >= 0, got {getattr(self, name)}.")
        for name in ("teacher_temp", "warmup_teacher_temp", "student_temp", "blur"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method option {name} must be > 0, got {getattr(self, name)}.")
        for name in (
            "momentum",
            "center_momentum",
            "warmup_teacher_steps",
            "freeze_last_layer",
            "gray_scale",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"method option {name} must lie in [0, 1], got {getattr(self, name)}."
                )
        if not 0 < self.local_scale <= self.global_scale <= 1:
            raise ConfigError(
                "method options must satisfy 0 < local_scale <= global_scale <= 1, "
                f"got {self.local_scale} and {self.global_scale}."
            )


class DINO(Method):
    """DINO with lightly's projection head, loss and multi-view transform.

    The teacher is the network that DINO's users keep, so it is the one that is scored. Source:
    "Emerging Properties in Self-Supervised Vision Transformers", 2021,
    https://arxiv.org/abs/2104.14294.
    """

    name = "dino"
    Options = DINOOptions

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: DINOOptions
    ) -> None:
        from lightly.loss.dino_loss import DINOLoss
        from lightly.models.utils import deactivate_requires_grad

        super().__init__(backbone, image_size, steps, options)
        self.student = backbone
        self.student_head = self._head()
        # The teacher starts as a copy of the student; copying the head by its state, because
        # weight-normalized layers cannot be deep-copied.
        self.teacher = copy.deepcopy(backbone)
        self.teacher_head = self._head()
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(
            output_dim=options.output_dim,
            student_temp=options.student_temp,
            center_momentum=options.center_momentum,
        )

    def _head(self) -> nn.Module:
        from lightly.models.modules.heads import DINOProjectionHead

        o = self.options
        with warnings.catch_warnings():
            # lightly's head uses the older spelling of weight normalization.
            warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
            head: nn.Module = DINOProjectionHead(
                input_dim=self.student.dim,
                hidden_dim=o.hidden_dim,
                bottleneck_dim=o.bottleneck_dim,
                output_dim=o.output_dim,
                batch_norm=o.batch_norm,
                # Counted in steps here: the loop has no epochs.
                freeze_last_layer=round(o.freeze_last_layer * self.steps),
            )
        return head

    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Two global and several local views; blur and crop sizes fit small images."""
        from lightly.transforms.dino_transform import DINOTransform

        o = self.options
        views: Callable[[Image.Image], Any] = DINOTransform(
            global_crop_size=self.image_size,
            global_crop_scale=(o.global_scale, 1.0),
            local_crop_size=o.local_size or self.image_size // 2,
            local_crop_scale=(o.local_scale, o.global_scale),
            n_local_views=o.local_views,
            cj_strength=o.color_jitter,
            random_gray_scale=o.gray_scale,
            sigmas=(0.1, o.blur),
        )
        return views

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes DINO's loss; the patch tokens are the student's of both global views."""
        batch = len(views[0])
        both = torch.cat(views[:2])
        with torch.no_grad():
            targets = self.teacher_head(self.teacher(both)[0])
        pooled, patch_tokens = self.student(both)
        # Views of one size go through the network together.
        if len(views) > 2:
            pooled = torch.cat([pooled, self.student(torch.cat(views[2:]))[0]])
        predictions = self.student_head(pooled)
        loss = self.criterion(
            list(targets.split(batch)),
            list(predictions.split(batch)),
            teacher_temp=self._teacher_temp(step),
        )
        return MethodOutput(loss, patch_tokens)

    def _teacher_temp(self, step: int) -> float:
        o: DINOOptions = self.options
        warmup = max(o.warmup_teacher_steps * self.steps, 1)
        done = min(step / warmup, 1.0)
        return o.warmup_teacher_temp + done * (o.teacher_temp - o.warmup_teacher_temp)

    def trained(self) -> list[nn.Module]:
        """Student and student head."""
        return [self.student, self.student_head]

    def scored(self) -> DenseBackbone:
        """The teacher."""
        return self.teacher

    def before_optimizer(self, step: int) -> None:
        """Keeps the prototypes fixed in the first steps, as DINO does in its first epoch."""
        self.student_head.cancel_last_layer_gradients(step)  # type: ignore[operator]

    def after_optimizer(self, step: int) -> None:
        """Moves the teacher towards the student."""
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        momentum = cosine_schedule(step, self.steps, self.options.momentum, 1.0)
        update_momentum(self.student, self.teacher, momentum)
        update_momentum(self.student_head, self.teacher_head, momentum)
