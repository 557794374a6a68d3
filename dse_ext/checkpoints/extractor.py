"""A frozen network as a source of one image vector and a grid of dense features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dse_ext.hooks import DenseFeatures

FINAL = -1
"""The value of ``layer`` that means the last layer, after the final norm."""


class DenseExtractor(nn.Module):
    """A frozen timm model whose forward pass gives pooled and dense features of one layer.

    Attributes:
        model: The timm model without its classifier, in evaluation mode.
        layer: The layer, as it was asked for.
        image_size: Width and height in pixels that :attr:`transform` makes.
        dim: Number of features d.
        transform: Makes a normalized tensor ``(3, H, W)`` of a PIL image: the shorter side is
            scaled to ``image_size`` (bicubic), the middle is cut out.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        transform: Callable[[Any], Tensor],
        layer: int | str = FINAL,
        prefix_tokens: int | None = None,
    ) -> None:
        """Takes the layer's output of a model.

        Args:
            model: A timm model without classifier.
            image_size: Width and height of an image in pixels.
            transform: As in the attribute.
            layer: ``-1`` is the last layer after the final norm, whose image vector is the model's
                own pooling of it. Another integer is the output of a block or stage, as it is: from
                0, or from the end (``-2`` is the last but one). A string is a module of that
                name. The image vector of these is the mean over the positions.
            prefix_tokens: Number of tokens in front of the patch tokens; None takes timm's number.

        Raises:
            ValueError: If there is no such layer, or it is not dense.
        """
        super().__init__()
        self.model = model.requires_grad_(False)
        self.eval()
        self.layer = layer
        self.image_size = image_size
        self.transform = transform
        self._features = DenseFeatures(
            model, None if layer == FINAL else layer, prefix_tokens=prefix_tokens
        )
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self.grid(image_size, image_size)
        self.dim = self._dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image vectors and the dense features.

        Args:
            images: Normalized images of shape ``(B, 3, H, W)``.

        Returns:
            Pooled features ``(B, d)`` and dense features ``(B, N, d)``, N in row order.
        """
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        dense = self._features.take()
        if self.layer != FINAL:
            return dense.mean(dim=1), dense
        pooled: Tensor = self.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return pooled, dense

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the dense features of an image of a size in pixels.

        Raises:
            ValueError: If the model does not take images of that size, or the layer gives no grid.
        """
        if (height, width) not in self._grids:
            like = next(self.model.parameters())
            image = torch.zeros(1, 3, height, width, dtype=like.dtype, device=like.device)
            try:
                _, dense = self(image)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"no dense features of images of {height} x {width} pixels: {error}"
                ) from error
            grid = self._features.grid
            if grid is None:
                raise ValueError(
                    f"layer {self.layer!r} gives {dense.shape[1]} positions for an image of "
                    f"{height} x {width} pixels, which are not the cells of a grid."
                )
            self._grids[height, width] = grid
            self._dim = int(dense.shape[2])
        return self._grids[height, width]


def evaluation_transform(
    image_size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Callable[[Any], Tensor]:
    """The transform of :class:`DenseExtractor`.

    Args:
        image_size: Width and height of the result in pixels.
        mean: Mean that colours are normalized with.
        std: Standard deviation.
    """
    from timm.data.transforms_factory import create_transform

    transform: Callable[[Any], Tensor] = create_transform(
        image_size, interpolation="bicubic", mean=mean, std=std, crop_pct=1.0
    )
    return transform
