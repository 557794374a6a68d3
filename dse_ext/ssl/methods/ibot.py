"""iBOT: DINO, and the teacher's patch tokens predicted where the student's are masked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.methods.base import MethodOutput
from dse_ext.ssl.methods.distillation import SelfDistillation
from dse_ext.ssl.methods.masking import MaskedEncoder, block_mask
from dse_ext.ssl.methods.options import DistillationOptions, above, shares
from dse_ext.ssl.methods.parts import full_precision


@dataclass(frozen=True)
class IBOTOptions(DistillationOptions):
    """Options of iBOT: those of DINO, and the masks.

    Attributes:
        masked_images: Share of the global views that are masked.
        mask_ratio: Greatest share of a view's patches that is masked.
    """

    masked_images: float = 0.5
    mask_ratio: float = 0.5

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        above(self, 0, "mask_ratio", "masked_images")
        shares(self, "mask_ratio", "masked_images")


class IBOT(SelfDistillation):
    """iBOT with lightly's head, block masks and losses; image and patch level share the head.

    L = L_[CLS] + L_MIM (Section 3 of the paper), as the mean of both. The student sees masked
    global views, the teacher whole ones. Source: "iBOT: Image BERT Pre-Training with Online
    Tokenizer", 2022, https://arxiv.org/abs/2111.07832.
    """

    name = "ibot"
    title = "iBOT"
    paper = "Zhou et al., ICLR 2022"
    url = "https://arxiv.org/abs/2111.07832"
    families = ("vit",)
    regularizes = "the student's patch tokens of both (masked) global views"
    Options = IBOTOptions

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: IBOTOptions
    ) -> None:
        from lightly.loss.ibot_loss import IBOTPatchLoss

        super().__init__(backbone, image_size, steps, options)
        self.masked_student = MaskedEncoder(backbone, image_size, self.name, mask_token=True)
        self.patch_criterion = IBOTPatchLoss(
            output_dim=options.output_dim,
            student_temp=options.student_temp,
            center_momentum=options.center_momentum,
        )

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes both losses; the patch tokens are the student's of both global views."""
        o: IBOTOptions = self.options
        batch = len(views[0])
        both = torch.cat(views[:2])
        mask = block_mask(
            len(both), self.masked_student.grid, o.masked_images, o.mask_ratio, both.device
        )
        flat = mask.flatten(1)
        with torch.no_grad():
            pooled, dense = self.teacher(both)
            targets = self.teacher_head(pooled)
            patch_targets = self.teacher_head(dense[flat])
        encoded = self.masked_student(both, mask=flat)
        vectors = [encoded.pooled]
        if len(views) > 2:
            vectors.append(self.student(torch.cat(views[2:]))[0])
        temperature = self._teacher_temp(step)
        image_loss = full_precision(
            self.criterion,
            list(targets.split(batch)),
            list(self.student_head(torch.cat(vectors)).split(batch)),
            teacher_temp=temperature,
        )
        patch_loss = full_precision(
            self.patch_criterion,
            patch_targets,
            self.student_head(encoded.dense[flat]),
            mask,
            teacher_temp=temperature,
        )
        return MethodOutput((image_loss + patch_loss) / 2, encoded.regularized, views=2)

    def trained(self) -> list[nn.Module]:
        """Student with its mask token, and its head."""
        return [self.masked_student, self.student_head]
