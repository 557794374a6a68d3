"""Tiny copies of the published folder layouts of segmentation data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (24, 32)
"""Height and width of every image."""


def blocks(values, seed=0):
    """A label map of 2 x 2 blocks with random ones of some values."""
    rng = np.random.default_rng(seed)
    cells = rng.choice(np.array(values), size=(2, 2))
    return np.repeat(np.repeat(cells, SIZE[0] // 2, 0), SIZE[1] // 2, 1).astype(np.uint8)


def save_pair(image: Path, label: Path, values: np.ndarray, palette: bool = False) -> None:
    """An image whose colours tell the labels, and the label map."""
    image.parent.mkdir(parents=True, exist_ok=True)
    label.parent.mkdir(parents=True, exist_ok=True)
    grey = values.astype(np.uint32)
    pixels = np.stack([grey * 37 % 256, grey * 91 % 256, grey * 151 % 256], axis=2)
    Image.fromarray(pixels.astype(np.uint8)).save(image, quality=95)
    picture = Image.fromarray(values)
    if palette:  # as the label maps of VOC are
        picture = picture.convert("P")
        picture.putpalette([i * 7 % 256 for i in range(768)])
        picture.putdata(values.flatten().tolist())
    picture.save(label)


def voc(root: Path, train: int = 4, val: int = 3) -> Path:
    folder = root / "VOCdevkit" / "VOC2012"
    for split, count in (("train", train), ("val", val)):
        names = [f"2007_{split}_{i:06d}" for i in range(count)]
        for i, name in enumerate(names):
            values = blocks([0, 5, 20], i)
            values[:2] = 255
            save_pair(
                folder / "JPEGImages" / f"{name}.jpg",
                folder / "SegmentationClass" / f"{name}.png",
                values,
                palette=True,
            )
        lists = folder / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def ade20k(root: Path, train: int = 4, val: int = 3) -> Path:
    folder = root / "ADEChallengeData2016"
    for split, short, count in (("training", "train", train), ("validation", "val", val)):
        for i in range(count):
            name = f"ADE_{short}_{i + 1:08d}"
            save_pair(
                folder / "images" / split / f"{name}.jpg",
                folder / "annotations" / split / f"{name}.png",
                blocks([0, 1, 75, 150], i),
            )
    return folder


def cityscapes(root: Path) -> Path:
    folder = root / "cityscapes"
    for split, cities in (("train", ("aachen", "bochum")), ("val", ("lindau",))):
        for city in cities:
            for i in range(2):
                stem = f"{city}_{i:06d}_000019"
                save_pair(
                    folder / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png",
                    folder / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png",
                    blocks([0, 7, 11, 29, 33], i),
                )
    return folder


def coco_stuff(root: Path, images: str = "images", labels: str = "annotations") -> Path:
    folder = root / "coco"
    for split, count in (("train2017", 4), ("val2017", 2)):
        for i in range(count):
            name = f"{i + 1:012d}"
            save_pair(
                folder / images / split / f"{name}.jpg",
                folder / labels / split / f"{name}.png",
                blocks([0, 15, 123, 181, 255], i),
            )
    return folder


def pairs(root: Path, count: int = 5, sub: str = "", values=(0, 1, 2), seed: int = 0) -> Path:
    for i in range(count):
        save_pair(
            root / "images" / sub / f"{i}.png",
            root / "annotations" / sub / f"{i}.png",
            blocks(values, seed + i),
        )
    return root
