"""The photographs that scikit-image and scikit-learn ship, cut into texture classes.

Only files inside the two wheels are used: nothing is downloaded. Every class owns two boxes of
its photograph that share no pixel, one for the training scenes and one for the held-out scenes,
so a probe cannot score by remembering pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Split = Literal["train", "heldout"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Texture:
    """One class: where its pixels come from.

    Attributes:
        name: Name of the class.
        package: ``"skimage"`` or ``"sklearn"``, the package that ships the photograph.
        file: File name of the photograph.
        train: Box ``(left, top, right, bottom)`` in pixels for training scenes.
        heldout: Box for held-out scenes; shares no pixel with ``train``.
        across: Least and greatest number of photograph pixels shown across a scene's width.
    """

    name: str
    package: Literal["skimage", "sklearn"]
    file: str
    train: Box
    heldout: Box
    across: tuple[float, float]


TEXTURES: tuple[Texture, ...] = (
    Texture("brick", "skimage", "brick.png", (0, 0, 256, 512), (256, 0, 512, 512), (120, 200)),
    Texture("grass", "skimage", "grass.png", (0, 0, 256, 512), (256, 0, 512, 512), (100, 170)),
    Texture("gravel", "skimage", "gravel.png", (0, 0, 256, 512), (256, 0, 512, 512), (100, 170)),
    Texture("tissue", "skimage", "ihc.png", (0, 0, 256, 512), (256, 0, 512, 512), (120, 200)),
    Texture(
        "stars",
        "skimage",
        "hubble_deep_field.jpg",
        (0, 0, 500, 872),
        (500, 0, 1000, 872),
        (180, 300),
    ),
    Texture("fur", "skimage", "chelsea.png", (40, 0, 195, 250), (195, 0, 345, 230), (60, 100)),
    Texture("coins", "skimage", "coins.png", (0, 0, 192, 295), (192, 0, 370, 295), (110, 180)),
    Texture("print", "skimage", "page.png", (0, 0, 192, 191), (192, 0, 384, 191), (80, 140)),
    Texture("wood", "skimage", "coffee.png", (482, 50, 600, 400), (0, 170, 76, 400), (50, 80)),
    Texture("foliage", "sklearn", "china.jpg", (340, 290, 640, 427), (0, 335, 260, 427), (60, 100)),
    Texture("roof", "sklearn", "china.jpg", (75, 80, 200, 330), (200, 80, 340, 330), (90, 140)),
    Texture("petals", "sklearn", "flower.jpg", (175, 95, 305, 345), (305, 95, 440, 345), (80, 130)),
)
"""The classes, in label order."""

_FOLDERS = {"skimage": ("data",), "sklearn": ("datasets", "images")}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def photograph_path(package: str, file: str) -> Path:
    """Returns the path of a photograph inside an installed package.

    Args:
        package: ``"skimage"`` or ``"sklearn"``.
        file: File name, such as ``"brick.png"``.

    Returns:
        The path of the file.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        FileNotFoundError: If the installed version does not ship the file.
    """
    # find_spec, because importing scikit-learn to read a JPEG would take a second.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"TextureScenes reads {file!r} out of {_DISTRIBUTIONS[package]}, which is not "
            f"installed: pip install {_DISTRIBUTIONS[package]}"
        )
    path = Path(spec.submodule_search_locations[0], *_FOLDERS[package], file)
    if not path.is_file():
        raise FileNotFoundError(
            f"TextureScenes needs the photograph {file!r}, which the installed "
            f"{_DISTRIBUTIONS[package]} does not ship (looked for {path})"
        )
    return path


@dataclass(frozen=True)
class TextureLevel:
    """A box of a photograph at one resolution, mirrored beyond its edges.

    Attributes:
        image: RGB image of the box with a mirrored margin on each side.
        margin: Width of that margin in pixels.
        inner: Width and height of the box itself in pixels.
        scale: Pixels of this level per pixel of the photograph, at most 1.
    """

    image: Image.Image
    margin: int
    inner: tuple[int, int]
    scale: float


@cache
def texture_levels(index: int, split: Split) -> tuple[TextureLevel, ...]:
    """Returns the image pyramid of one class and split.

    A scene shows a texture smaller than the photograph does; sampling from a level of about the
    right resolution avoids aliasing. The mirrored margin lets a rotated window of any position
    in the box be filled without ever reading the other split's pixels.

    Args:
        index: Index into :data:`TEXTURES`.
        split: ``"train"`` or ``"heldout"``.

    Returns:
        Levels from full resolution downwards, each half the size of the one before.
    """
    texture = TEXTURES[index]
    box = texture.train if split == "train" else texture.heldout
    with Image.open(photograph_path(texture.package, texture.file)) as photograph:
        crop = photograph.convert("RGB").crop(box)
    levels = []
    scale = 1.0
    # The widest window is `across` pixels; the coarsest level still shows it with >= 48 pixels.
    while True:
        size = (max(round(crop.width * scale), 1), max(round(crop.height * scale), 1))
        level = (
            crop if scale == 1.0 else crop.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
        )
        # Half of the diagonal of the widest window, plus the bicubic kernel's reach.
        margin = int(np.ceil(texture.across[1] * scale * 0.7072)) + 3
        pixels: npt.NDArray[np.uint8] = np.asarray(level)
        mirrored = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
        levels.append(TextureLevel(Image.fromarray(mirrored), margin, level.size, scale))
        scale /= 2
        if texture.across[1] * scale < 48:
            return tuple(levels)
