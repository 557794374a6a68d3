"""Any timm model as a source of one image vector and a grid of dense features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dse_ext.hooks import DenseFeatures
from dse_ext.ssl.config import ConfigError

FAMILIES: dict[str, str] = {"vit": "ViT", "swin": "Swin", "resnet": "ResNet"}
"""Families of backbones: token sequences, channels-last maps, channels-first maps."""


class Encoded(NamedTuple):
    """What a backbone makes of a batch of images.

    Attributes:
        pooled: Image vectors ``(B, d)``.
        dense: Dense features ``(B, N, d)`` after the final norm.
        regularized: Dense features ``(B, N', d')`` that DSE is applied to: ``dense``, or those of
            the layer that was chosen by :meth:`DenseBackbone.tap`.
    """

    pooled: Tensor
    dense: Tensor
    regularized: Tensor


class DenseBackbone(nn.Module):
    """A timm model whose forward pass gives pooled and dense features.

    The dense features are the last feature map after the final norm: of a ViT the patch tokens
    without class and register tokens, of a convolutional network every position.

    Attributes:
        model: The timm model without its classifier.
        dim: Number of features.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dim = int(model.num_features)  # type: ignore[arg-type]
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._tap: DenseFeatures | None = None

    @property
    def family(self) -> str:
        """The key of :data:`FAMILIES` that the model belongs to."""
        if self.channels_last:
            return "swin"
        return "vit" if hasattr(self.model, "num_prefix_tokens") else "resnet"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image vectors and the dense features.

        Args:
            images: Normalized images of shape ``(B, 3, H, W)``.

        Returns:
            Pooled features ``(B, d)`` and dense features ``(B, N, d)``, N in row order.
        """
        encoded = self.encode(images)
        return encoded.pooled, encoded.dense

    def encode(self, images: Tensor) -> Encoded:
        """Returns what :meth:`forward` does, and the features that DSE is applied to.

        Args:
            images: Normalized images of shape ``(B, 3, H, W)``.
        """
        return self.split(self.model.forward_features(images))  # type: ignore[operator]

    def split(self, features: Tensor) -> Encoded:
        """Takes the output of the model's ``forward_features`` apart.

        Args:
            features: Tokens or a feature map of the pass that has just been made.
        """
        pooled: Tensor = self.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        if features.ndim == 3:
            dense = features[:, self.prefix :]
        elif self.channels_last:
            dense = features.flatten(1, 2)
        else:
            dense = features.flatten(2).transpose(1, 2)
        return Encoded(pooled, dense, dense if self._tap is None else self._tap.take())

    def tap(self, layer: str) -> None:
        """Chooses the layer whose dense features DSE is applied to.

        Copies that were made before, such as a teacher, are left alone.

        Args:
            layer: ``"last"`` (the dense features themselves), the number of a block or stage
                (negative: from the end), or the name of a module.

        Raises:
            ConfigError: If the model has no such layer.
        """
        if self._tap is not None:
            self._tap.remove()
            self._tap = None
        if layer == "last":
            return
        number = int(layer) if layer.lstrip("-").isdigit() else layer
        try:
            self._tap = DenseFeatures(self.model, number)
        except ValueError as error:
            raise ConfigError(f"dse_layer: {error}") from error

    @torch.no_grad()
    def grid(self, image_size: int) -> int:
        """Rows (and columns) of the dense features of a square image.

        Args:
            image_size: Its width in pixels.
        """
        training = self.training
        weight = next(self.parameters())
        self.eval()
        dense = self.encode(weight.new_zeros(1, 3, image_size, image_size)).dense
        self.train(training)
        return math.isqrt(dense.shape[1])


def create_backbone(
    name: str, image_size: int, patch_size: int | None = None, args: Mapping[str, Any] | None = None
) -> DenseBackbone:
    """Creates an untrained timm model for images of one size.

    Args:
        name: A timm model name, such as ``"vit_small_patch16_224"`` or ``"resnet18"``.
        image_size: Image width and height in pixels.
        patch_size: Patch size of a ViT in pixels; None leaves the model's own.
        args: Further keyword arguments for ``timm.create_model``.

    Returns:
        The backbone.

    Raises:
        ConfigError: If timm has no such model, or the model refuses the arguments.
    """
    import timm

    given = dict(args or {})
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:8] or timm.list_models("vit_*")[:8]
        raise ConfigError(f"backbone: timm has no model {name!r}; it has {', '.join(similar)}, ...")
    if patch_size is not None:
        given["patch_size"] = patch_size
    # Local views are smaller than global ones: position embeddings must follow the input's size.
    flexible = {"img_size": image_size, "dynamic_img_size": True}
    try:
        model = _create(name, {**flexible, **given})
    except TypeError:
        # Convolutional networks take images of any size and know neither keyword.
        try:
            model = _create(name, given)
        except TypeError as error:
            raise ConfigError(
                f"backbone: {name} does not accept {', '.join(sorted(given))}: {error}"
            ) from error
    backbone = DenseBackbone(model)
    backbone.eval()
    with torch.no_grad():
        try:
            pooled, dense = backbone(torch.zeros(1, 3, image_size, image_size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"backbone: {name} cannot take {image_size} x {image_size} images: {error}"
            ) from error
    if pooled.shape != (1, backbone.dim) or dense.ndim != 3 or dense.shape[2] != backbone.dim:
        raise ConfigError(
            f"backbone: {name} gives pooled features {tuple(pooled.shape)} and dense features "
            f"{tuple(dense.shape)}; both must have {backbone.dim} features."
        )
    return backbone.train()


def _create(name: str, args: Mapping[str, Any]) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **args)
    return model
