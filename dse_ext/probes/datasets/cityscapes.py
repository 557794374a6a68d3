"""Cityscapes with fine annotations, in its 19 training classes."""

from __future__ import annotations

from pathlib import Path

from dse_ext.probes.datasets.base import (
    IGNORE,
    DatasetError,
    LabelledFiles,
    SegmentationData,
    first_folder,
)


def open_cityscapes(
    root: Path, train_split: str = "train", val_split: str = "val"
) -> SegmentationData:
    """Opens Cityscapes.

    Args:
        root: The folder that holds ``leftImg8bit`` and ``gtFine``, each with a folder for every
            split and city; label maps are ``*_gtFine_labelIds.png``.
        train_split: ``train`` or ``val``.
        val_split: The same.

    Returns:
        The data set, 19 classes.

    Raises:
        DatasetError: If a folder, an image or a label map is missing.
    """
    from torchvision.datasets import Cityscapes

    classes = {c.id: c for c in Cityscapes.classes if c.id >= 0}
    values = {i: IGNORE if c.ignore_in_eval else int(c.train_id) for i, c in classes.items()}
    counted = sorted((c.train_id, c.name) for c in classes.values() if not c.ignore_in_eval)

    def split(name: str) -> LabelledFiles:
        for part in ("leftImg8bit", "gtFine"):
            # Also keeps torchvision from unpacking archives that lie there.
            first_folder(root, (f"{part}/{name}",), f"Cityscapes {name}")
        try:
            found = Cityscapes(str(root), split=name, mode="fine", target_type="semantic")
        except (ValueError, FileNotFoundError) as error:
            raise DatasetError(f"Cityscapes cannot be read in {root}: {error}") from error
        pairs = sorted(
            (Path(image), Path(labels[0]))
            for image, labels in zip(found.images, found.targets, strict=True)
        )
        if not pairs:
            raise DatasetError(f"no image in {root / 'leftImg8bit' / name}.")
        missing = [label for _, label in pairs if not label.is_file()]
        if missing:
            raise DatasetError(
                f"{len(missing)} of {len(pairs)} images of Cityscapes {name} have no label map, "
                f"such as {missing[0]}."
            )
        return LabelledFiles(pairs, values)

    return SegmentationData(
        "cityscapes", tuple(name for _, name in counted), split(train_split), split(val_split)
    )
