"""The embedded texture scenes as a segmentation data set: no download, labels for every pixel."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dse_ext.data import TextureScenes
from dse_ext.probes.datasets.base import Labels, SegmentationData


class _Scenes:
    def __init__(self, scenes: TextureScenes) -> None:
        self._scenes = scenes

    def __len__(self) -> int:
        return len(self._scenes)

    def load(self, index: int) -> tuple[Image.Image, Labels]:
        image, labels = self._scenes[index]
        return image, labels.numpy().astype(np.int16)


def open_texture_scenes(
    size: int = 96, train: int = 512, val: int = 256, seed: int = 0
) -> SegmentationData:
    """Opens scenes composed of embedded photographs.

    Args:
        size: Width and height of a scene in pixels.
        train: Number of scenes to fit probes to.
        val: Number of scenes to measure them on; they share no pixel of a photograph with the
            others.
        seed: Seed of the scenes: that of a training run gives the scenes it was probed on.

    Returns:
        The data set, 12 classes.
    """
    # Composed once and kept: every checkpoint sees the same ones.
    splits = (
        _Scenes(TextureScenes(train, size, seed=seed, cache=True)),
        _Scenes(TextureScenes(val, size, split="heldout", seed=seed, cache=True)),
    )
    return SegmentationData("texture_scenes", TextureScenes.classes, *splits)
