"""COCO-Stuff in 27 classes: the supercategories of its 171 kinds of things and stuff.

The labels of COCO-Stuff (Caesar et al., CVPR 2018) are a hierarchy. Its middle level has 12 groups
of things and 15 of stuff; unsupervised segmentation is measured on these 27 since IIC and PiCIE
(Cho et al., CVPR 2021, https://arxiv.org/abs/2103.17070).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dse_ext.probes.datasets.base import (
    IGNORE,
    LabelledFiles,
    SegmentationData,
    first_folder,
    pair_by_name,
)

# The values in the label maps, which are the ids of the categories minus 1: 0-90 are things (80
# that are annotated), 91-181 are stuff, in alphabetical order, which scatters the groups.
_THINGS: dict[str, Iterable[int]] = {
    "electronic": range(71, 77),  # tv, laptop, mouse, remote, keyboard, cell phone
    "appliance": range(77, 83),  # microwave, oven, toaster, sink, refrigerator, blender
    "food things": range(51, 61),  # banana, ..., cake
    "furniture things": range(61, 71),  # chair, ..., toilet, door
    "indoor": range(83, 91),  # book, clock, ..., hair brush
    "kitchen": range(43, 51),  # bottle, ..., bowl
    "accessory": range(25, 33),  # hat, backpack, ..., suitcase
    "animal": range(15, 25),  # bird, ..., giraffe
    "outdoor": range(9, 15),  # traffic light, ..., bench
    "person": range(1),
    "sports": range(33, 43),  # frisbee, ..., tennis racket
    "vehicle": range(1, 9),  # bicycle, ..., boat
}
_STUFF: dict[str, Iterable[int]] = {
    "ceiling": (101, 102),
    "floor": (100, *range(113, 118)),
    "food stuff": (120, 121, 152, 169),
    "furniture stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": range(170, 177),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}
GROUPS = {**_THINGS, **_STUFF}
"""Values of the label maps by supercategory, in the order of the 27 classes."""

_VALUES = {
    **{value: label for label, group in enumerate(GROUPS.values()) for value in group},
    255: IGNORE,
}


def open_coco_stuff(
    root: Path, train_split: str = "train2017", val_split: str = "val2017"
) -> SegmentationData:
    """Opens COCO-Stuff 164k.

    Args:
        root: The folder that holds the images (``images/train2017`` or ``train2017``) and the label
            maps of ``stuffthingmaps_trainval2017.zip`` (``annotations/train2017``,
            ``stuffthingmaps/train2017`` or ``stuffthingmaps_trainval2017/train2017``).
        train_split: Name of the sub-folder of both to fit probes to.
        val_split: That to measure them on.

    Returns:
        The data set, 27 classes.

    Raises:
        DatasetError: If a folder, an image or a label map is missing.
    """

    def split(name: str) -> LabelledFiles:
        images = first_folder(root, (f"images/{name}", name), "COCO images")
        labels = first_folder(
            root,
            (
                f"annotations/{name}",
                f"stuffthingmaps/{name}",
                f"stuffthingmaps_trainval2017/{name}",
            ),
            "COCO-Stuff label maps",
        )
        return LabelledFiles(pair_by_name(images, labels, (".jpg",)), _VALUES)

    return SegmentationData("coco_stuff", tuple(GROUPS), split(train_split), split(val_split))
