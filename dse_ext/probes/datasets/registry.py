"""Data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dse_ext.probes.datasets.ade20k import open_ade20k
from dse_ext.probes.datasets.base import DatasetError, SegmentationData
from dse_ext.probes.datasets.cityscapes import open_cityscapes
from dse_ext.probes.datasets.coco_stuff import open_coco_stuff
from dse_ext.probes.datasets.folder import open_folder
from dse_ext.probes.datasets.scenes import open_texture_scenes
from dse_ext.probes.datasets.voc import open_voc

TEXTURE_SCENES = "texture-scenes"

_BENCHMARKS: dict[str, Callable[..., SegmentationData]] = {
    "voc": open_voc,
    "ade20k": open_ade20k,
    "cityscapes": open_cityscapes,
    "coco-stuff": open_coco_stuff,
}

DATASETS: tuple[str, ...] = (*_BENCHMARKS, "folder", TEXTURE_SCENES)
"""Names that :func:`open_dataset` knows."""


@dataclass(frozen=True)
class DatasetOptions:
    """What can be said about a data set besides its folder.

    Attributes:
        train_split: Split that probes are fitted to; None takes the data set's usual one.
        val_split: Split that they are measured on; None takes the usual one.
        num_classes: Number of classes (``folder`` only); None finds it out.
        ignore_index: Value of pixels that count nowhere (``folder`` only).
        reduce_zero_label: Whether 0 counts nowhere and classes start at 1 (``folder`` only).
        val_share: Share of images to measure on in a random split (``folder`` only).
        seed: Seed of that split, and of ``texture-scenes``.
        scene_size: Width and height of a scene in pixels (``texture-scenes`` only).
        train_scenes: Number of scenes to fit to (``texture-scenes`` only).
        val_scenes: Number of scenes to measure on (``texture-scenes`` only).
    """

    train_split: str | None = None
    val_split: str | None = None
    num_classes: int | None = None
    ignore_index: int = 255
    reduce_zero_label: bool = False
    val_share: float = 0.2
    seed: int = 0
    scene_size: int = 96
    train_scenes: int = 512
    val_scenes: int = 256


def open_dataset(
    name: str, root: str | os.PathLike[str] | None, options: DatasetOptions | None = None
) -> SegmentationData:
    """Opens a segmentation data set.

    Args:
        name: One of :data:`DATASETS`.
        root: Its folder; None for ``texture-scenes``, which needs none.
        options: What else is to be said about it.

    Returns:
        The data set.

    Raises:
        DatasetError: If there is no such data set, or it is not laid out as it should be.

    Examples:
        >>> from dse_ext.probes.datasets import open_dataset
        >>> data = open_dataset("ade20k", "data/ADEChallengeData2016")
        >>> len(data.classes), len(data.train), len(data.val)
        (150, 20210, 2000)
    """
    options = options or DatasetOptions()
    if name == TEXTURE_SCENES:
        return open_texture_scenes(
            options.scene_size, options.train_scenes, options.val_scenes, options.seed
        )
    if name not in DATASETS:
        raise DatasetError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}.")
    if root is None:
        raise DatasetError(f"dataset {name} needs the folder that it lies in (data).")
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DatasetError(f"data must be the folder of {name}, but {root} {what}.")
    splits = {
        key: value
        for key, value in (("train_split", options.train_split), ("val_split", options.val_split))
        if value is not None
    }
    if name in _BENCHMARKS:
        return _BENCHMARKS[name](root, **splits)
    return open_folder(
        root,
        **splits,
        num_classes=options.num_classes,
        ignore_index=options.ignore_index,
        reduce_zero_label=options.reduce_zero_label,
        val_share=options.val_share,
        seed=options.seed,
    )
