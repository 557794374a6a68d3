"""Any folder of images with PNG label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dse_ext.data.folder import EXTENSIONS
from dse_ext.probes.datasets.base import (
    IGNORE,
    DatasetError,
    LabelledFiles,
    SegmentationData,
    first_folder,
    pair_by_name,
    read_label_map,
)

_TRAIN = ("train", "training")
_VAL = ("val", "validation", "valid", "test")

Pairs = list[tuple[Path, Path]]


def open_folder(
    root: Path,
    train_split: str | None = None,
    val_split: str | None = None,
    *,
    num_classes: int | None = None,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    val_share: float = 0.2,
    seed: int = 0,
) -> SegmentationData:
    """Opens a folder with ``images/`` and ``annotations/``.

    A label map has the name of its image and the ending ``.png``. Which images are for training
    is told by, in this order: sub-folders of ``images/`` (``train`` or ``training``; ``val``,
    ``validation``, ``valid`` or ``test``) with the same ones in ``annotations/``; lists
    ``train.txt`` and ``val.txt`` beside ``images/``, with a name a line; or else a random split of
    all of them. Names of classes are the lines of ``classes.txt``, where it is there.

    Args:
        root: The folder.
        train_split: Name of the sub-folder or list to fit probes to; None finds it.
        val_split: That to measure them on; None finds it.
        num_classes: Number of classes; None takes that of ``classes.txt``, or else the greatest
            label plus 1, for which all label maps are read.
        ignore_index: Value of pixels that count nowhere.
        reduce_zero_label: Whether 0 counts nowhere too, and the classes start at 1.
        val_share: Share of the images that are measured on in a random split.
        seed: Seed of the random split.

    Returns:
        The data set.

    Raises:
        DatasetError: If a folder, a list or a label map is missing, or there are fewer than two
            classes or images.
    """
    images = first_folder(root, ("images",), "images")
    labels = first_folder(root, ("annotations", "labels"), "label maps")
    train, val = _split(root, images, labels, train_split, val_split, val_share, seed)
    names = _class_names(root)
    if names and num_classes is not None and len(names) != num_classes:
        raise DatasetError(
            f"{root / 'classes.txt'} names {len(names)} classes, but num_classes is {num_classes}."
        )
    if not names:
        count = num_classes or _count_classes(train + val, ignore_index, reduce_zero_label)
        names = tuple(f"class {i}" for i in range(count))
    if len(names) < 2:
        raise DatasetError(f"{root} must have at least 2 classes, got {len(names)}.")
    first = int(reduce_zero_label)
    values = {first + i: i for i in range(len(names))}
    if reduce_zero_label:
        values[0] = IGNORE
    if ignore_index in values and values[ignore_index] != IGNORE:
        raise DatasetError(
            f"ignore_index must be no class, got {ignore_index} with classes from {first} to "
            f"{first + len(names) - 1}."
        )
    if ignore_index >= 0:
        values[ignore_index] = IGNORE
    return SegmentationData(
        "folder", names, LabelledFiles(train, values), LabelledFiles(val, values)
    )


def _split(
    root: Path,
    images: Path,
    labels: Path,
    train_split: str | None,
    val_split: str | None,
    val_share: float,
    seed: int,
) -> tuple[Pairs, Pairs]:
    wanted = [
        [name] if name is not None else list(usual)
        for name, usual in ((train_split, _TRAIN), (val_split, _VAL))
    ]
    folders = [next((n for n in names if (images / n).is_dir()), None) for names in wanted]
    if all(folders):
        train, val = (
            pair_by_name(images / str(name), labels / str(name), EXTENSIONS) for name in folders
        )
        return train, val
    lists = [next((n for n in names if (root / f"{n}.txt").is_file()), None) for names in wanted]
    if all(lists):
        every = {
            path.relative_to(images).with_suffix("").as_posix(): (path, label)
            for path, label in pair_by_name(images, labels, EXTENSIONS)
        }
        train, val = (_listed(root / f"{name}.txt", every) for name in lists)
        return train, val
    if train_split is not None or val_split is not None or any(folders) or any(lists):
        raise DatasetError(
            f"{root} has no training and validation images as asked for: looked for folders "
            f"{' or '.join(wanted[0])} and {' or '.join(wanted[1])} in {images}, and for lists of "
            "these names (.txt) beside it."
        )
    return _random_split(pair_by_name(images, labels, EXTENSIONS), val_share, seed)


def _listed(path: Path, every: dict[str, tuple[Path, Path]]) -> Pairs:
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name = line.strip()
        if not name:
            continue
        key = name if name in every else Path(name).with_suffix("").as_posix()
        if key not in every:
            raise DatasetError(f"{path} names {name!r}, but there is no such image.")
        pairs.append(every[key])
    if not pairs:
        raise DatasetError(f"the list {path} is empty.")
    return pairs


def _random_split(pairs: Pairs, val_share: float, seed: int) -> tuple[Pairs, Pairs]:
    if not 0 < val_share < 1:
        raise DatasetError(f"val_share must lie between 0 and 1, got {val_share}.")
    if len(pairs) < 2:
        raise DatasetError("there must be at least 2 images to split them, got 1.")
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    count = min(max(round(val_share * len(pairs)), 1), len(pairs) - 1)
    held = set(order[:count])
    return (
        [pair for i, pair in enumerate(pairs) if i not in held],
        [pair for i, pair in enumerate(pairs) if i in held],
    )


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _count_classes(pairs: Sequence[tuple[Path, Path]], ignore_index: int, reduced: bool) -> int:
    greatest = -1
    for _, path in pairs:
        values = read_label_map(path)
        counted = values[values != ignore_index]
        if counted.size:
            greatest = max(greatest, int(counted.max()))
    return greatest + 1 - int(reduced)
