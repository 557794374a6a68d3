"""MAE: the pixels of masked patches are predicted from the visible ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.config import ConfigError
from dse_ext.ssl.methods.base import Method, MethodOutput, recipe
from dse_ext.ssl.methods.masking import MaskedEncoder
from dse_ext.ssl.methods.options import above, at_least, shares
from dse_ext.ssl.methods.parts import full_precision


@dataclass(frozen=True)
class MAEOptions:
    """Options of MAE.

    Attributes:
        mask_ratio: Share of the patches that are masked.
        decoder_dim: Width of the decoder.
        decoder_depth: Number of blocks of the decoder.
        decoder_heads: Number of attention heads of the decoder.
        normalize_pixels: Predict each patch's pixels with its own mean and deviation removed.
        crop_scale: Least share of the image's area in a view.
    """

    mask_ratio: float = 0.75
    decoder_dim: int = 192
    decoder_depth: int = 2
    decoder_heads: int = 6
    normalize_pixels: bool = True
    crop_scale: float = 0.2

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        above(self, 0, "mask_ratio", "crop_scale")
        shares(self, "mask_ratio", "crop_scale")
        at_least(self, 1, "decoder_dim", "decoder_depth", "decoder_heads")
        if self.decoder_dim % self.decoder_heads:
            raise ConfigError(
                "method option decoder_dim must be a multiple of decoder_heads "
                f"({self.decoder_heads}), got {self.decoder_dim}."
            )


class MAE(Method):
    """MAE with lightly's masked ViT, decoder and masks.

    The encoder sees the visible patches only; their tokens are the dense features of a step. The
    loss is the mean squared error of the masked patches' pixels. Source: "Masked Autoencoders Are
    Scalable Vision Learners", 2022, https://arxiv.org/abs/2111.06377.
    """

    name = "mae"
    title = "MAE"
    paper = "He et al., CVPR 2022"
    url = "https://arxiv.org/abs/2111.06377"
    families = ("vit",)
    regularizes = "the encoder's tokens of the visible patches"
    Options = MAEOptions
    recipe = recipe(weight_decay=0.05, weight_decay_end=0.05)

    def __init__(
        self, backbone: DenseBackbone, image_size: int, steps: int, options: MAEOptions
    ) -> None:
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM

        super().__init__(backbone, image_size, steps, options)
        self.encoder = MaskedEncoder(backbone, image_size, self.name)
        self.patch_size = image_size // self.encoder.grid
        visible = int(self.encoder.patches * (1 - options.mask_ratio))
        if not 0 < visible < self.encoder.patches:
            raise ConfigError(
                f"method option mask_ratio must leave some of the {self.encoder.patches} patches "
                f"visible and mask some, got {options.mask_ratio}."
            )
        self.embed = nn.Linear(backbone.dim, options.decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=self.encoder.patches,
            embed_dim=options.decoder_dim,
            depth=options.decoder_depth,
            num_heads=options.decoder_heads,
            num_prefix_tokens=0,
        )
        self.predict = nn.Linear(options.decoder_dim, 3 * self.patch_size**2)

    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """One random crop."""
        from lightly.transforms.mae_transform import MAETransform

        views: Callable[[Image.Image], list[Tensor]] = MAETransform(
            input_size=self.image_size, min_scale=self.options.crop_scale
        )
        return views

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes the reconstruction loss; the dense features are those of visible patches."""
        from lightly.models.utils import (
            get_at_index,
            normalize_mean_var,
            patchify,
            random_token_mask,
            repeat_token,
            set_at_index,
        )

        images = views[0]
        size = (len(images), self.encoder.patches)
        keep, masked = random_token_mask(
            size,
            mask_ratio=self.options.mask_ratio,
            mask_class_token=True,
            device=images.device,
        )
        encoded = self.encoder(images, keep=keep)
        visible = self.embed(encoded.dense)
        tokens = repeat_token(self.decoder.mask_token, size).to(visible.dtype)
        decoded = self.decoder(set_at_index(tokens, keep, visible))
        predicted = self.predict(get_at_index(decoded, masked))
        pixels = get_at_index(patchify(images, self.patch_size), masked)
        if self.options.normalize_pixels:
            pixels = normalize_mean_var(pixels, dim=-1)
        return MethodOutput(full_precision(F.mse_loss, predicted, pixels), encoded.regularized)

    def trained(self) -> list[nn.Module]:
        """Encoder and decoder."""
        return [self.encoder, self.embed, self.decoder, self.predict]

    def scored(self) -> DenseBackbone:
        """The encoder."""
        return self.encoder.backbone
