"""PASCAL VOC 2012 segmentation: 20 classes and background."""

from __future__ import annotations

from pathlib import Path

from dse_ext.probes.datasets.base import IGNORE, DatasetError, LabelledFiles, SegmentationData

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

# The void label of object borders and of regions nobody could name.
_VALUES = {**{i: i for i in range(len(CLASSES))}, 255: IGNORE}

# Where the additional annotations of SBD (Hariharan et al., ICCV 2011) are usually listed.
_AUGMENTED_LISTS = (
    "ImageSets/Segmentation/trainaug.txt",
    "ImageSets/Segmentation/train_aug.txt",
    "ImageSets/SegmentationAug/trainaug.txt",
    "ImageSets/SegmentationAug/train_aug.txt",
)


def open_voc(root: Path, train_split: str = "train", val_split: str = "val") -> SegmentationData:
    """Opens PASCAL VOC 2012.

    Args:
        root: The folder that holds ``VOCdevkit``, that folder, or ``VOC2012`` itself.
        train_split: ``train``, ``trainval``, ``val``; ``trainaug`` for the 10,582 images with the
            annotations of SBD (a list ``trainaug.txt`` or ``train_aug.txt``, label maps in
            ``SegmentationClassAug``); or the path of such a list.
        val_split: The same.

    Returns:
        The data set, 21 classes.

    Raises:
        DatasetError: If a folder or list is missing.
    """
    devkit = _devkit(root)
    return SegmentationData(
        "voc", CLASSES, _open_split(devkit, train_split), _open_split(devkit, val_split)
    )


def _devkit(root: Path) -> Path:
    """The folder that holds VOCdevkit/VOC2012, of whatever level of it was given."""
    for folder in (root, root.parent, root.parent.parent):
        inside = (folder / "VOCdevkit" / "VOC2012").resolve()
        if inside.is_dir() and root.resolve() in (inside, inside.parent, inside.parent.parent):
            return folder
    raise DatasetError(
        f"no PASCAL VOC 2012 in {root}: looked for {root / 'VOCdevkit' / 'VOC2012'} with "
        "JPEGImages, SegmentationClass and ImageSets/Segmentation."
    )


def _open_split(devkit: Path, split: str) -> LabelledFiles:
    folder = devkit / "VOCdevkit" / "VOC2012"
    if split in ("train", "trainval", "val"):
        from torchvision.datasets import VOCSegmentation

        try:
            listed = VOCSegmentation(str(devkit), year="2012", image_set=split)
        except FileNotFoundError as error:
            raise DatasetError(f"no list of the split {split!r}: {error.filename}.") from error
        pairs = zip(map(Path, listed.images), map(Path, listed.masks), strict=True)
        return LabelledFiles(pairs, _VALUES)
    candidates = [folder / name for name in _AUGMENTED_LISTS] if split == "trainaug" else []
    candidates += [] if candidates else [Path(split), folder / "ImageSets/Segmentation" / split]
    for path in candidates:
        if path.is_file():
            return LabelledFiles(_listed(folder, path), _VALUES)
    raise DatasetError(
        f"no list of the split {split!r}: looked for {', '.join(map(str, candidates))}."
    )


def _listed(folder: Path, path: Path) -> list[tuple[Path, Path]]:
    """Pairs of a list: a name a line, or the paths of image and label map."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words:
            continue
        name = Path(words[0]).stem
        augmented = folder / "SegmentationClassAug" / f"{name}.png"
        # Some keep the label maps of VOC itself out of the folder of the additional ones.
        plain = folder / "SegmentationClass" / f"{name}.png"
        label = augmented if augmented.is_file() else plain
        if not label.is_file():
            raise DatasetError(
                f"{path} names {name}, but there is neither {augmented} nor {plain}."
            )
        pairs.append((folder / "JPEGImages" / f"{name}.jpg", label))
    if not pairs:
        raise DatasetError(f"the list {path} is empty.")
    return pairs
