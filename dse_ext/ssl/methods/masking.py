"""Masks, and encoders that see images through them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone, Encoded
from dse_ext.ssl.config import ConfigError


class MaskedEncoder(nn.Module):
    """A ViT that sees a part of its patches: the others are replaced, or left out.

    Attributes:
        backbone: The same network, for whole images.
        grid: Rows (and columns) of patches.
    """

    def __init__(
        self, backbone: DenseBackbone, image_size: int, method: str, *, mask_token: bool = False
    ) -> None:
        """Wraps a network; its parameters are shared, not copied.

        Args:
            backbone: A ViT.
            image_size: Size of an image in pixels.
            method: Name of the method, for messages.
            mask_token: Whether masked patches are replaced by a learned token (and not left out).

        Raises:
            ConfigError: If the network is no plain ViT with learned position embeddings.
        """
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        model: Any = backbone.model
        if not isinstance(model, VisionTransformer) or model.pos_embed is None:
            raise ConfigError(
                f"method {method} masks patches, which needs a plain ViT with position "
                f"embeddings such as vit_small_patch16_224, got {type(model).__name__}."
            )
        self.backbone = backbone
        self.grid = backbone.grid(image_size)
        self.masked = MaskedVisionTransformerTIMM(
            vit=model, weight_initialization="skip", pos_embed_initialization="skip"
        )
        nn.init.trunc_normal_(self.masked.mask_token, std=0.02)
        self.masked.mask_token.requires_grad = mask_token

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.grid * self.grid

    def forward(
        self, images: Tensor, *, mask: Tensor | None = None, keep: Tensor | None = None
    ) -> Encoded:
        """Encodes images.

        Args:
            images: ``(B, 3, H, W)``.
            mask: Boolean ``(B, N)``; where it is True the mask token takes the patch's place.
            keep: Indices ``(B, K)`` of the patches that are seen, in the order of the result.

        Returns:
            Pooled features ``(B, d)`` and dense features ``(B, N, d)``, or ``(B, K, d)``.
        """
        prefix = self.backbone.prefix
        if mask is not None:
            mask = torch.cat([mask.new_zeros(len(mask), prefix), mask], dim=1)
        if keep is not None:
            always = torch.arange(prefix, device=keep.device).expand(len(keep), -1)
            keep = torch.cat([always, keep + prefix], dim=1)
        # Activation checkpointing is switched on in the ViT itself.
        self.masked.set_grad_checkpointing(self.masked.vit.grad_checkpointing)
        return self.backbone.split(self.masked.encode(images, mask=mask, idx_keep=keep))


def block_mask(images: int, grid: int, share: float, greatest: float, device: torch.device) -> Any:
    """Rectangles of masked patches in a share of the images, as iBOT masks them.

    Args:
        images: Number of images.
        grid: Rows (and columns) of patches.
        share: Share of the images that are masked.
        greatest: Greatest share of an image's patches that is masked.
        device: Where the mask is wanted.

    Returns:
        Boolean ``(images, grid, grid)``; at least one patch of the batch is masked.
    """
    from lightly.models.utils import random_block_mask

    patches = grid * grid
    # At least one patch of an image; blocks of at least four patches where there is room for them.
    least = min(max(0.1, 1.001 / patches), greatest)
    mask = random_block_mask(
        size=(images, grid, grid),
        batch_mask_ratio=share,
        min_image_mask_ratio=least,
        max_image_mask_ratio=greatest,
        min_num_masks_per_block=4 if patches * least >= 4 else 1,
        device=device,
    )
    if not mask.any():
        mask[0, 0, 0] = True
    return mask


def context_and_targets(
    images: int,
    grid: int,
    targets: int,
    target_scale: tuple[float, float],
    target_aspect: tuple[float, float],
    context_scale: tuple[float, float],
    device: torch.device,
) -> tuple[Tensor, list[Tensor]]:
    """The blocks of I-JEPA: several targets, and a context that they are cut out of.

    Section 3 of https://arxiv.org/abs/2301.08243. Sizes are drawn for the whole batch, positions
    for each image, from torch's global generator (whose state a resumed run restores; lightly's
    collator counts its calls outside of it). Contexts of one batch are shortened to the smallest.

    Args:
        images: Number of images.
        grid: Rows (and columns) of patches.
        targets: Number of target blocks.
        target_scale: Least and greatest share of the patches in a target.
        target_aspect: Least and greatest aspect ratio of a target.
        context_scale: Least and greatest share of the patches in the square context.
        device: Where the indices are wanted.

    Returns:
        Indices of the context's patches ``(images, K)`` and of each target's ``(images, L)``.
    """
    target = _block_size(grid, target_scale, target_aspect)
    context = _block_size(grid, context_scale, (1.0, 1.0))
    contexts: list[Tensor] = []
    blocks: list[list[Tensor]] = [[] for _ in range(targets)]
    for _ in range(images):
        free = torch.ones(grid, grid, dtype=torch.bool)
        for block in blocks:
            mask = _block(grid, *target)
            block.append(mask.flatten().nonzero().flatten())
            free &= ~mask
        seen = _block(grid, *context) & free
        if not seen.any():
            # The targets cover the context: what they leave of the image, or one patch of it.
            seen = free if free.any() else _block(grid, 1, 1)
        contexts.append(seen.flatten().nonzero().flatten())
    fewest = min(len(indices) for indices in contexts)
    kept = torch.stack(
        # Of a longer one a random part, so that no corner is always left out.
        [c[torch.randperm(len(c))[:fewest].sort().values] for c in contexts]
    )
    return kept.to(device), [torch.stack(block).to(device) for block in blocks]


def _block_size(
    grid: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int]:
    area = grid * grid * float(torch.empty(()).uniform_(*scale))
    ratio = math.exp(float(torch.empty(()).uniform_(math.log(aspect[0]), math.log(aspect[1]))))
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(max(height, 1), grid), min(max(width, 1), grid)


def _block(grid: int, height: int, width: int) -> Tensor:
    top = int(torch.randint(grid - height + 1, ()))
    left = int(torch.randint(grid - width + 1, ()))
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask
