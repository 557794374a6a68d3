"""What a probe asks of a segmentation data set: images with label maps, and names of classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

Labels = npt.NDArray[np.int16]

IGNORE = -1
"""Label of pixels that count nowhere, whatever number a data set's files have for them."""

_UNKNOWN = -2


class DatasetError(ValueError):
    """A data set is not laid out as expected; the message says what was looked for."""


class LabelledSource(Protocol):
    """Images with label maps, by number."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, Labels]:
        """Returns an RGB image and its labels (H, W): classes from 0, or :data:`IGNORE`."""
        ...


@dataclass(frozen=True)
class SegmentationData:
    """A data set to probe dense features on.

    Attributes:
        name: Short name, which the columns of results begin with.
        classes: Names of the classes, in label order.
        train: What probes are fitted to.
        val: What they are measured on.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledSource
    val: LabelledSource


class LabelledFiles:
    """Pairs of an image file and a PNG label map.

    Attributes:
        pairs: Path of the image and of the label map, in a fixed order.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Path, Path]],
        classes: Mapping[int, int],
    ) -> None:
        """Describes the pairs; no file is opened yet.

        Args:
            pairs: Path of each image and of its label map.
            classes: The class of each value that label maps may have; :data:`IGNORE` for values
                that stand for no class.
        """
        self.pairs = tuple(pairs)
        self._table = np.full(max(classes) + 1, _UNKNOWN, dtype=np.int16)
        for value, label in classes.items():
            self._table[value] = label

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Image.Image, Labels]:
        """Reads one pair.

        Args:
            index: Index into :attr:`pairs`.

        Returns:
            The RGB image and its labels, int16 of shape (H, W): classes, or :data:`IGNORE`.

        Raises:
            DatasetError: If a file is missing or unreadable, the sizes differ, or the label map
                is none or has a value that is no class.
        """
        image_path, label_path = self.pairs[index]
        image = read_image(image_path)
        values = read_label_map(label_path)
        if (image.height, image.width) != values.shape:
            raise DatasetError(
                f"{label_path} has {values.shape[0]} x {values.shape[1]} pixels, but its image "
                f"{image_path} has {image.height} x {image.width}."
            )
        known = values < len(self._table)
        labels = self._table[np.where(known, values, 0)]
        labels[~known] = _UNKNOWN
        if (labels == _UNKNOWN).any():
            bad = int(values[labels == _UNKNOWN][0])
            accepted = np.flatnonzero(self._table != _UNKNOWN)
            raise DatasetError(
                f"{label_path} has the value {bad}, which is no class of this data set: "
                f"accepted are {_ranges(accepted)}."
            )
        return image, labels


def read_image(path: Path) -> Image.Image:
    """Reads an RGB image.

    Label maps belong to the pixels as they are stored, so an EXIF orientation is not applied.

    Raises:
        DatasetError: If there is no such file or it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise DatasetError(f"cannot read the image {path}: {error}") from error


def read_label_map(path: Path) -> npt.NDArray[np.int64]:
    """Reads a label map: the numbers that are stored, whatever palette they are shown with.

    Raises:
        DatasetError: If there is no such file, it cannot be decoded, or has colours for labels.
    """
    try:
        with Image.open(path) as file:
            mode = file.mode
            values = np.array(file)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise DatasetError(f"cannot read the label map {path}: {error}") from error
    if values.ndim != 2 or mode not in ("L", "P", "I", "I;16", "1"):
        raise DatasetError(
            f"{path} is an image of mode {mode}: a label map has one number a pixel (modes L, P or "
            "I;16), not a colour."
        )
    return values.astype(np.int64)


def first_folder(root: Path, candidates: Sequence[str], what: str) -> Path:
    """The first of some folders that exists.

    Raises:
        DatasetError: If none does; it names all that were looked for.
    """
    for name in candidates:
        if (root / name).is_dir():
            return root / name
    looked = ", ".join(str(root / name) for name in candidates)
    raise DatasetError(f"no folder of {what}: looked for {looked}.")


def pair_by_name(images: Path, labels: Path, suffixes: Sequence[str]) -> list[tuple[Path, Path]]:
    """Pairs the images of a folder (and folders below) with PNG label maps of the same name.

    Args:
        images: Folder of images.
        labels: Folder of label maps with the same sub-folders.
        suffixes: File endings that count as images.

    Returns:
        Pairs sorted by path.

    Raises:
        DatasetError: If there is no image, or an image has no label map.
    """
    found = sorted(
        path for path in images.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
    )
    if not found:
        raise DatasetError(f"no image in {images}: looked for {', '.join(suffixes)}.")
    pairs = [(path, (labels / path.relative_to(images)).with_suffix(".png")) for path in found]
    missing = [label for _, label in pairs if not label.is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(pairs)} images in {images} have no label map, such as "
            f"{missing[0]}."
        )
    return pairs


def _ranges(values: npt.NDArray[np.intp]) -> str:
    """Numbers as a short text: 0-20, 255."""
    parts: list[list[int]] = []
    for value in values.tolist():
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
