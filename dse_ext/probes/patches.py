"""Patches and their true classes: what a probe is fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of the positions of an image."""


@dataclass(frozen=True)
class PatchTargets:
    """The shares of the classes among the pixels of each patch, without the zeros.

    Most patches lie within one region, so this takes little more than one entry a patch where
    a matrix would take one for each class.

    Attributes:
        patch: Index of the patch of each entry, int64 (K,), ascending.
        label: Class of each entry, int64 (K,).
        share: Share of the patch's pixels that have the class, float32 (K,), in (0, 1]. Pixels
            that are ignored count in none, so the shares of a patch add up to 1 or less.
        patches: Number of patches.
    """

    patch: Tensor
    label: Tensor
    share: Tensor
    patches: int

    def weight(self) -> Tensor:
        """Sum of the shares of each patch, float32 (patches,)."""
        return self.share.new_zeros(self.patches).index_add_(0, self.patch, self.share)

    def dense(self, num_classes: int) -> Tensor:
        """The shares as a matrix, float32 (patches, num_classes)."""
        matrix = self.share.new_zeros(self.patches, num_classes)
        matrix[self.patch, self.label] = self.share
        return matrix

    def rows(self, start: int, stop: int) -> PatchTargets:
        """The targets of patches start, ..., stop - 1, numbered from 0."""
        bounds = torch.tensor([start, stop], device=self.patch.device)
        first, last = torch.searchsorted(self.patch, bounds).tolist()
        part = slice(first, last)
        return PatchTargets(
            self.patch[part] - start, self.label[part], self.share[part], stop - start
        )

    def to(self, device: torch.device) -> PatchTargets:
        """The same on another device."""
        return PatchTargets(
            self.patch.to(device), self.label.to(device), self.share.to(device), self.patches
        )

    @staticmethod
    def cat(parts: list[PatchTargets]) -> PatchTargets:
        """The targets of several sets of patches, one after the other."""
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.patches)
        return PatchTargets(
            torch.cat([p.patch + o for p, o in zip(parts, offsets, strict=False)]),
            torch.cat([p.label for p in parts]),
            torch.cat([p.share for p in parts]),
            offsets[-1],
        )


def patch_targets(
    labels: Tensor, grid: Grid, num_classes: int, ignore_index: int | None = None
) -> PatchTargets:
    """Counts the classes among the pixels of each patch.

    A pixel belongs to the patch that its centre lies in. Labels that are coarser than the grid
    are repeated.

    Args:
        labels: Pixel labels of shape ``(B, H, W)``, integers in ``[0, num_classes)`` or
            ``ignore_index``.
        grid: Rows and columns of patches of an image.
        num_classes: Number of classes.
        ignore_index: Label of pixels that do not count.

    Returns:
        Targets of ``B * rows * columns`` patches, in row order, image by image.
    """
    rows, columns = grid
    size = (max(labels.shape[1], rows), max(labels.shape[2], columns))
    if size != tuple(labels.shape[1:]):
        labels = F.interpolate(labels[:, None].double(), size=size, mode="nearest-exact")[:, 0]
    labels = labels.long()
    device = labels.device
    # (2y + 1) / 2H is the height of a pixel's centre: integer arithmetic puts none on both sides.
    y = (torch.arange(size[0], device=device) * 2 + 1) * rows // (2 * size[0])
    x = (torch.arange(size[1], device=device) * 2 + 1) * columns // (2 * size[1])
    cell = y[:, None] * columns + x
    images = labels.shape[0]
    patch = cell + torch.arange(images, device=device)[:, None, None] * (rows * columns)
    area = torch.bincount(cell.flatten(), minlength=rows * columns).float()
    counted = labels >= 0 if ignore_index is None else labels != ignore_index
    bins = images * rows * columns * num_classes
    counts = torch.bincount(patch[counted] * num_classes + labels[counted], minlength=bins)
    key = counts.nonzero()[:, 0]
    index = key // num_classes
    share = counts[key].float() / area[index % (rows * columns)]
    return PatchTargets(index, key % num_classes, share, images * rows * columns)


def check_features(features: Tensor, grid: Grid | None = None) -> Grid:
    """Checks dense features and returns their grid.

    Args:
        features: Of shape ``(B, N, d)``.
        grid: Rows and columns; None is a square.

    Raises:
        ValueError: If the shape is wrong or the positions do not form the grid.
    """
    if features.ndim != 3 or min(features.shape) == 0:
        raise ValueError(
            f"features must have shape (B, N, d) without empty axes, got {tuple(features.shape)}."
        )
    positions = features.shape[1]
    if grid is None:
        side = math.isqrt(positions)
        if side * side != positions:
            raise ValueError(
                f"features must lie on a square grid, got N = {positions} positions: give the "
                "grid's rows and columns."
            )
        return side, side
    if grid[0] * grid[1] != positions:
        raise ValueError(
            f"features must have N = {grid[0]} x {grid[1]} = {grid[0] * grid[1]} positions as the "
            f"grid, got {positions}."
        )
    return grid


def check_labels(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None
) -> None:
    """Checks pixel labels that go with features.

    Raises:
        ValueError: If shapes do not match or a label is out of range.
    """
    if labels.ndim != 3 or labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"labels must have shape (B, H, W) with B = {features.shape[0]} as in features, "
            f"got {tuple(labels.shape)}."
        )
    if labels.dtype.is_floating_point:
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    counted = labels if ignore_index is None else labels[labels != ignore_index]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got values from "
            f"{int(counted.min())} to {int(counted.max())}."
        )


def to_map(patches: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Values of patches as maps of pixels, by bilinear interpolation.

    Args:
        patches: ``(B, N, C)``.
        grid: Rows and columns of the N patches.
        size: Height and width of the wanted maps.

    Returns:
        ``(B, C, H, W)``.
    """
    maps = patches.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
