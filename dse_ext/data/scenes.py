"""Scenes composed on the fly out of photographs, with their true pixel labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dse_ext.data.layouts import LAYOUTS, smooth_noise
from dse_ext.data.photographs import TEXTURES, Split, texture_levels

Scene: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
"""Pixels (size, size, 3) and labels (size, size)."""

_SPLITS: dict[str, int] = {"train": 0, "heldout": 1}
_LUMA = np.array([0.299, 0.587, 0.114])
# Any two directions that are orthogonal to grey and to each other span the colour plane.
_CHROMA = np.array([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / np.sqrt([[2.0], [6.0]])


class TextureScenes(Dataset[tuple[Any, Tensor]]):
    """Scenes of 2 to 4 textured regions, each image with its true pixel labels.

    A scene is a function of ``(seed, split, index)`` alone: a random layout (bent Voronoi cells,
    bands, half-planes or blobs), one texture class per region, and a randomly placed, rotated,
    mirrored and scaled window of that class's photograph in each. The photographs are those
    that ship inside the scikit-image and scikit-learn wheels; nothing is downloaded. The
    training and held-out splits read disjoint parts of every photograph.

    The mean colour of a region lies halfway between its photograph's and one that is drawn
    without regard to the class, as is its contrast: colour is a hint, texture decides.

    Examples:
        >>> from dse_ext.data import TextureScenes
        >>> scenes = TextureScenes(length=100, size=64, seed=0)
        >>> image, labels = scenes[7]        # PIL image, int64 tensor of shape (64, 64)
        >>> scenes.classes[int(labels[0, 0])]
        'foliage'

    Attributes:
        classes: Names of the classes, in label order.
        size: Width and height of a scene in pixels.
        split: ``"train"`` or ``"heldout"``.
        seed: Seed of the whole data set.
    """

    classes: tuple[str, ...] = tuple(texture.name for texture in TEXTURES)

    def __init__(
        self,
        length: int = 2048,
        size: int = 64,
        *,
        split: Split = "train",
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        cache: bool = False,
    ) -> None:
        """Describes the data set; no image is composed yet.

        Args:
            length: Number of scenes, at least 1.
            size: Width and height of a scene in pixels, at least 16.
            split: ``"train"`` or ``"heldout"``.
            seed: Non-negative seed of the data set.
            transform: Applied to the PIL image of every item; None returns it as it is.
            cache: Keep composed scenes in memory, 4 bytes per pixel: 16 kB for 64 x 64 pixels.

        Raises:
            ValueError: If an argument is out of range.
        """
        if length < 1:
            raise ValueError(f"length must be >= 1, got {length}.")
        if size < 16:
            raise ValueError(f"size must be >= 16 pixels, got {size}.")
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {sorted(_SPLITS)}, got {split!r}.")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}.")
        self.length = length
        self.size = size
        self.split: Split = split
        self.seed = seed
        self.transform = transform
        self._cache: dict[int, Scene] | None = {} if cache else None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """Composes one scene.

        Args:
            index: From 0 to ``len(self) - 1``; negative indices count from the end.

        Returns:
            The image (RGB PIL image, or what ``transform`` makes of it) and its labels, an int64
            tensor of shape ``(size, size)``.

        Raises:
            IndexError: If the index is out of range.
        """
        pixels, labels = self._scene(self._check_index(index))
        picture = Image.fromarray(pixels)
        return (
            picture if self.transform is None else self.transform(picture),
            torch.from_numpy(labels.astype(np.int64)),
        )

    def load(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """Returns the image of a scene alone, as the training loop asks for it.

        Args:
            index: As in :meth:`__getitem__`.

        Returns:
            The RGB image, and an empty tuple: a scene can always be read.
        """
        return Image.fromarray(self._scene(self._check_index(index))[0]), ()

    def _check_index(self, index: int) -> int:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} scenes.")
        return index % self.length

    def _scene(self, index: int) -> Scene:
        if self._cache is None:
            return self._compose(index)
        if index not in self._cache:
            self._cache[index] = self._compose(index)
        return self._cache[index]

    def _compose(self, index: int) -> Scene:
        rng = np.random.default_rng([self.seed, _SPLITS[self.split], index])
        regions = int(rng.integers(2, 5))
        layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))](rng, self.size, regions)
        chosen = rng.choice(self.num_classes, size=regions, replace=False).astype(np.int64)
        scene = np.empty((self.size, self.size, 3))
        for region, texture in enumerate(chosen):
            mask = layout == region
            if mask.any():
                scene[mask] = _recoloured(rng, self._window(rng, int(texture))[mask])
        scene *= _lighting(rng, self.size)
        scene += rng.normal(0.0, 0.01, size=scene.shape)
        pixels = np.rint(scene.clip(0.0, 1.0) * 255).astype(np.uint8)
        return pixels, chosen[layout].astype(np.uint8)

    def _window(self, rng: np.random.Generator, texture: int) -> npt.NDArray[np.float64]:
        """A rotated, mirrored and scaled window of a texture, (size, size, 3) in [0, 1]."""
        low, high = TEXTURES[texture].across
        across = rng.uniform(low, high)
        levels = texture_levels(texture, self.split)
        # The coarsest level with at least one sample per pixel of the scene.
        level = [lv for lv in levels if lv is levels[0] or across * lv.scale >= self.size][-1]
        step = across * level.scale / self.size
        angle = rng.uniform(0, 2 * np.pi)
        mirror = -1.0 if rng.random() < 0.5 else 1.0
        centre_x = level.margin + rng.uniform(0, level.inner[0])
        centre_y = level.margin + rng.uniform(0, level.inner[1])
        a, b = mirror * step * np.cos(angle), -step * np.sin(angle)
        d, e = mirror * step * np.sin(angle), step * np.cos(angle)
        half = self.size / 2
        window = level.image.transform(
            (self.size, self.size),
            Image.Transform.AFFINE,
            (a, b, centre_x - (a + b) * half, d, e, centre_y - (d + e) * half),
            resample=Image.Resampling.BICUBIC,
        )
        return np.asarray(window, dtype=np.float64) / 255.0


# Share of its photograph's own colour that a region keeps; the rest is drawn at random.
_OWN_COLOUR = 0.5


def _recoloured(
    rng: np.random.Generator, pixels: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Gives a region's pixels (n, 3) a random contrast, and half of their mean colour at random."""
    mean = pixels.mean(axis=0)
    deviation = pixels - mean
    luma = deviation @ _LUMA
    # The floor keeps an empty piece of sky or page from being blown up to pure noise.
    spread = max(float(luma.std()), 0.02)
    contrast = rng.uniform(0.10, 0.20)
    turn = rng.uniform(0, 2 * np.pi) * (1 - _OWN_COLOUR)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    chroma = deviation @ (_CHROMA.T @ rotation @ _CHROMA) * rng.uniform(0.3, 1.0)
    colour = rng.uniform(0.3, 0.7) + rng.normal(0.0, 0.07, size=2) @ _CHROMA
    colour = _OWN_COLOUR * mean + (1 - _OWN_COLOUR) * colour
    recoloured: npt.NDArray[np.float64] = colour + (luma[:, None] + chroma) * (contrast / spread)
    return recoloured


def _lighting(rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """A smooth brightness factor over the scene, (size, size, 1), around 1."""
    factor: npt.NDArray[np.float64] = 1.0 + 0.08 * smooth_noise(rng, size, waves=2)[..., None]
    return factor
