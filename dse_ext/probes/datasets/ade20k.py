"""ADE20K in the 150 classes of the MIT Scene Parsing Benchmark."""

from __future__ import annotations

from pathlib import Path

from dse_ext.probes.datasets.base import (
    IGNORE,
    DatasetError,
    LabelledFiles,
    SegmentationData,
    first_folder,
    pair_by_name,
)

_COUNT = 150
# 0 is "other": everything but the 150 classes. The classes 1 to 150 become 0 to 149.
_VALUES = {0: IGNORE, **{i: i - 1 for i in range(1, _COUNT + 1)}}


def open_ade20k(
    root: Path, train_split: str = "training", val_split: str = "validation"
) -> SegmentationData:
    """Opens ADE20K (``ADEChallengeData2016``).

    Args:
        root: ``ADEChallengeData2016`` with ``images/`` and ``annotations/``, or the folder that
            holds it.
        train_split: Name of the sub-folder of both to fit probes to.
        val_split: That to measure them on.

    Returns:
        The data set, 150 classes; their names are those of ``objectInfo150.txt``, where it is
        there.

    Raises:
        DatasetError: If a folder, an image or a label map is missing.
    """
    if not (root / "images").is_dir():
        root = first_folder(root, ("ADEChallengeData2016",), "ADE20K")

    def split(name: str) -> LabelledFiles:
        images = first_folder(root, (f"images/{name}",), "images")
        labels = first_folder(root, (f"annotations/{name}",), "label maps")
        return LabelledFiles(pair_by_name(images, labels, (".jpg",)), _VALUES)

    return SegmentationData("ade20k", _class_names(root), split(train_split), split(val_split))


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return tuple(f"class {i}" for i in range(1, _COUNT + 1))
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())
    if len(names) != _COUNT:
        raise DatasetError(f"{path} must name {_COUNT} classes below its header, got {len(names)}.")
    return names
