"""I-JEPA: the features of target blocks are predicted from a context block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.config import ConfigError
from dse_ext.ssl.methods.base import Method, MethodOutput, recipe
from dse_ext.ssl.methods.masking import MaskedEncoder, context_and_targets
from dse_ext.ssl.methods.options import above, at_least, shares
from dse_ext.ssl.methods.parts import follow, full_precision, teacher_of


@dataclass(frozen=True)
class IJEPAOptions:
    """Options of I-JEPA.

    Attributes:
        targets: Number of target blocks.
        target_min_scale: Least share of the patches in a target block.
        target_max_scale: Greatest share of the patches in a target block.
        context_min_scale: Least share of the patches in the context block, before the targets
            are cut out of it.
        predictor_dim: Width of the predictor.
        predictor_depth: Number of blocks of the predictor.
        predictor_heads: Number of attention heads of the predictor.
        momentum: Momentum of the target encoder at the first step; rises to 1 along a cosine.
        crop_scale: Least share of the image's area in a view.
    """

    targets: int = 4
    target_min_scale: float = 0.15
    target_max_scale: float = 0.2
    context_min_scale: float = 0.85
    predictor_dim: int = 96
    predictor_depth: int = 3
    predictor_heads: int = 6
    momentum: float = 0.996
    crop_scale: float = 0.3

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        at_least(self, 1, "targets", "predictor_dim", "predictor_depth", "predictor_heads")
        above(self, 0, "target_min_scale", "context_min_scale", "crop_scale")
        shares(self, "context_min_scale", "crop_scale", "momentum")
        if not self.target_min_scale <= self.target_max_scale <= 1:
            raise ConfigError(
                "method options must satisfy target_min_scale <= target_max_scale <= 1, "
                f"got {self.target_min_scale} and {self.target_max_scale}."
            )
        if self.predictor_dim % self.predictor_heads:
            raise ConfigError(
                "method option predictor_dim must be a multiple of predictor_heads "
                f"({self.predictor_heads}), got {self.predictor_dim}."
            )


class IJEPA(Method):
    """I-JEPA with lightly's masked ViT and predictor.

    The target encoder is a moving average and sees whole images; its patch features, normalized
    over d, are what the predictor has to give at the positions of each target block (smooth L1
    distance, as in the authors' release; Section 3 of the paper has the squared distance). The
    target encoder is scored. Source: "Self-Supervised Learning from Images with a Joint-Embedding
    Predictive Architecture", 2023, https://arxiv.org/abs/2301.08243.
    """

    name = "ijepa"
    title = "I-JEPA"
    paper = "Assran et al., CVPR 2023"
    url = "https://arxiv.org/abs/2301.08243"
    families = ("vit",)
    regularizes = "the context encoder's tokens of the context block"
    Options = IJEPAOptions
    recipe = recipe(
        # The paper's ViT has no class token; the final norm belongs to the patch tokens.
        backbone_args={"class_token": False, "global_pool": "avg", "fc_norm": False},
        lr=1e-3,
    )

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: IJEPAOptions
    ) -> None:
        from lightly.models.modules import IJEPAPredictorTIMM

        super().__init__(backbone, image_size, steps, options)
        self.target_encoder = teacher_of(backbone)
        self.context_encoder = MaskedEncoder(backbone, image_size, self.name)
        self.predictor = IJEPAPredictorTIMM(
            num_patches=self.context_encoder.patches,
            depth=options.predictor_depth,
            mlp_dim=backbone.dim,
            predictor_embed_dim=options.predictor_dim,
            num_heads=options.predictor_heads,
        )

    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """One random crop."""
        from lightly.transforms.ijepa_transform import IJEPATransform

        view = IJEPATransform(input_size=self.image_size, min_scale=self.options.crop_scale)
        return _SingleView(view)

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes the prediction loss; the dense features are those of the context."""
        from lightly.models.utils import apply_masks

        o: IJEPAOptions = self.options
        images = views[0]
        context, targets = context_and_targets(
            len(images),
            self.context_encoder.grid,
            o.targets,
            (o.target_min_scale, o.target_max_scale),
            (0.75, 1.5),
            (o.context_min_scale, 1.0),
            images.device,
        )
        with torch.no_grad():
            features = self.target_encoder(images)[1].float()
            wanted = apply_masks(F.layer_norm(features, features.shape[-1:]), targets)
        encoded = self.context_encoder(images, keep=context)
        predicted = self.predictor(encoded.dense, context, targets)
        loss = full_precision(F.smooth_l1_loss, predicted, wanted)
        return MethodOutput(loss, encoded.regularized)

    def trained(self) -> list[nn.Module]:
        """Context encoder and predictor."""
        return [self.context_encoder, self.predictor]

    def scored(self) -> DenseBackbone:
        """The target encoder."""
        assert isinstance(self.target_encoder, DenseBackbone)
        return self.target_encoder

    def after_optimizer(self, step: int) -> None:
        """Moves the target encoder towards the context encoder."""
        pairs = [(self.context_encoder.backbone, self.target_encoder)]
        follow(pairs, step, self.steps, self.options.momentum)


class _SingleView:
    """A transform that gives one view, as a list of one; a class, so that workers can get it."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self.transform(image)]
