"""What DINO and the methods that build on it share: student, teacher, heads, schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import Method
from dse_ext.ssl.methods.options import DistillationOptions, MultiCropOptions
from dse_ext.ssl.methods.parts import follow, teacher_of


def prototype_head(dim: int, options: DistillationOptions, steps: int) -> nn.Module:
    """Lightly's DINO head.

    Args:
        dim: Number of features of the backbone.
        options: Sizes.
        steps: Number of steps of the run.
    """
    from lightly.models.modules.heads import DINOProjectionHead

    with warnings.catch_warnings():
        # lightly's head uses the older spelling of weight normalization.
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        head: nn.Module = DINOProjectionHead(
            input_dim=dim,
            hidden_dim=options.hidden_dim,
            bottleneck_dim=options.bottleneck_dim,
            output_dim=options.output_dim,
            batch_norm=options.batch_norm,
            # Counted in steps here: the loop has no epochs.
            freeze_last_layer=round(options.freeze_last_layer * steps),
        )
    return head


def prototype_loss(options: DistillationOptions) -> nn.Module:
    """Lightly's DINO loss: cross-entropy between views, with a centred teacher."""
    from lightly.loss.dino_loss import DINOLoss

    loss: nn.Module = DINOLoss(
        output_dim=options.output_dim,
        student_temp=options.student_temp,
        center_momentum=options.center_momentum,
    )
    return loss


def multi_crop(image_size: int, options: MultiCropOptions) -> Callable[[Image.Image], list[Tensor]]:
    """Lightly's DINO augmentation: two global and several local views.

    Blur and crop sizes fit small images.
    """
    from lightly.transforms.dino_transform import DINOTransform

    views: Callable[[Image.Image], Any] = DINOTransform(
        global_crop_size=image_size,
        global_crop_scale=(options.global_scale, 1.0),
        local_crop_size=options.local_size or image_size // 2,
        local_crop_scale=(options.local_scale, options.global_scale),
        n_local_views=options.local_views,
        cj_strength=options.color_jitter,
        random_gray_scale=options.gray_scale,
        sigmas=(0.1, options.blur),
    )
    return views


class SelfDistillation(Method):
    """A student with a prototype head, and a teacher that is its moving average.

    The teacher is the network that users of these methods keep, so it is the one that is scored.
    """

    Options = DistillationOptions

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: DistillationOptions
    ) -> None:
        super().__init__(backbone, image_size, steps, options)
        self.student = backbone
        self.student_head = self._head()
        self.teacher = teacher_of(backbone)
        self.teacher_head = teacher_of(self.student_head, self._head)
        self.criterion = prototype_loss(options)

    def _head(self) -> nn.Module:
        return prototype_head(self.student.dim, self.options, self.steps)

    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Two global and several local views; blur and crop sizes fit small images."""
        return multi_crop(self.image_size, self.options)

    def _teacher_temp(self, step: int) -> float:
        o: DistillationOptions = self.options
        warmup = max(o.warmup_teacher_steps * self.steps, 1)
        done = min(step / warmup, 1.0)
        return o.warmup_teacher_temp + done * (o.teacher_temp - o.warmup_teacher_temp)

    def trained(self) -> list[nn.Module]:
        """Student and student head."""
        return [self.student, self.student_head]

    def scored(self) -> DenseBackbone:
        """The teacher."""
        assert isinstance(self.teacher, DenseBackbone)
        return self.teacher

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Trained networks and those that follow them."""
        return [(self.student, self.teacher), (self.student_head, self.teacher_head)]

    def before_optimizer(self, step: int) -> None:
        """Keeps the prototypes fixed in the first steps, as DINO does in its first epoch."""
        self.student_head.cancel_last_layer_gradients(step)  # type: ignore[operator]

    def after_optimizer(self, step: int) -> None:
        """Moves the teacher towards the student."""
        follow(self.pairs(), step, self.steps, self.options.momentum)
