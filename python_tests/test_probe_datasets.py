"""Segmentation data sets: each published layout on a tiny copy, and any folder of label maps."""

from __future__ import annotations

import numpy as np
import pytest
import segmentation_folders as folders
from PIL import Image
from torchvision.datasets import Cityscapes

from dse_ext.data import TextureScenes
from dse_ext.probes.datasets import (
    DATASETS,
    IGNORE,
    DatasetError,
    DatasetOptions,
    open_dataset,
)
from dse_ext.probes.datasets.coco_stuff import GROUPS


def labels_of(source, index=0):
    image, labels = source.load(index)
    assert image.mode == "RGB"
    assert (image.height, image.width) == labels.shape == folders.SIZE
    assert labels.dtype == np.int16
    return labels


# ------------------------------------------------------------------ benchmarks


@pytest.mark.parametrize("level", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc(tmp_path, level):
    folders.voc(tmp_path)
    data = open_dataset("voc", tmp_path / level)
    assert (data.name, len(data.classes), len(data.train), len(data.val)) == ("voc", 21, 4, 3)
    assert data.classes[0] == "background"
    assert data.classes[20] == "tvmonitor"
    labels = labels_of(data.train, 1)
    assert (labels[:2] == IGNORE).all()
    expected = folders.blocks([0, 5, 20], 1)
    np.testing.assert_array_equal(labels[2:], expected[2:])


@pytest.mark.parametrize("name", ["trainaug.txt", "train_aug.txt"])
@pytest.mark.parametrize("line", ["{0}", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"])
def test_voc_with_the_annotations_of_sbd(tmp_path, name, line):
    folder = folders.voc(tmp_path)
    folders.save_pair(
        folder / "JPEGImages" / "2008_000099.jpg",
        folder / "SegmentationClassAug" / "2008_000099.png",
        folders.blocks([9]),
    )
    listed = ["2008_000099", "2007_train_000002"]  # the latter in SegmentationClass alone
    path = folder / "ImageSets" / "Segmentation" / name
    path.write_text("".join(line.format(entry) + "\n" for entry in listed))
    data = open_dataset("voc", tmp_path, DatasetOptions(train_split="trainaug"))
    assert len(data.train) == 2
    assert (labels_of(data.train, 0) == 9).all()
    assert set(np.unique(labels_of(data.train, 1))) <= {IGNORE, 0, 5, 20}
    mine = open_dataset("voc", tmp_path, DatasetOptions(train_split=str(path)))
    assert len(mine.train) == 2
    path.write_text("2008_000077\n")
    with pytest.raises(DatasetError, match=r"names 2008_000077, but there is neither"):
        open_dataset("voc", tmp_path, DatasetOptions(train_split="trainaug"))


def test_voc_says_what_it_looked_for(tmp_path):
    with pytest.raises(DatasetError, match=r"no PASCAL VOC 2012 in .*VOCdevkit/VOC2012"):
        open_dataset("voc", tmp_path)
    folder = folders.voc(tmp_path)
    with pytest.raises(DatasetError, match=r"no list of the split 'trainaug': .*trainaug\.txt"):
        open_dataset("voc", tmp_path, DatasetOptions(train_split="trainaug"))
    (folder / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(DatasetError, match=r"no list of the split 'val': .*val\.txt"):
        open_dataset("voc", tmp_path)


@pytest.mark.parametrize("level", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, level):
    folder = folders.ade20k(tmp_path)
    data = open_dataset("ade20k", tmp_path / level)
    assert (data.name, len(data.classes), len(data.train), len(data.val)) == ("ade20k", 150, 4, 3)
    for i in range(3):
        raw = folders.blocks([0, 1, 75, 150], i).astype(int)
        np.testing.assert_array_equal(labels_of(data.val, i), np.where(raw == 0, IGNORE, raw - 1))
    rows = [f"{i}\t0.1\t1\t2\tname {i}, other" for i in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    assert open_dataset("ade20k", tmp_path).classes[149] == "name 150"
    (folder / "objectInfo150.txt").write_text("Idx\n")
    with pytest.raises(DatasetError, match="must name 150 classes below its header, got 0"):
        open_dataset("ade20k", tmp_path)


def test_ade20k_says_what_is_missing(tmp_path):
    with pytest.raises(DatasetError, match="no folder of ADE20K: looked for"):
        open_dataset("ade20k", tmp_path)
    folder = folders.ade20k(tmp_path)
    (folder / "annotations" / "training" / "ADE_train_00000002.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 4 images .* no label map.*ADE_train_00000002\.p"):
        open_dataset("ade20k", tmp_path)


def test_cityscapes(tmp_path):
    data = open_dataset("cityscapes", folders.cityscapes(tmp_path))
    assert (data.name, len(data.train), len(data.val)) == ("cityscapes", 4, 2)
    assert data.classes[0] == "road"
    assert data.classes[18] == "bicycle"
    assert len(data.classes) == 19
    train_id = {c.id: c.train_id for c in Cityscapes.classes}
    for i in range(2):
        raw = folders.blocks([0, 7, 11, 29, 33], i)
        expected = np.vectorize(lambda v: IGNORE if train_id[v] == 255 else train_id[v])(raw)
        np.testing.assert_array_equal(labels_of(data.val, i), expected)


def test_cityscapes_says_what_is_missing(tmp_path):
    with pytest.raises(DatasetError, match=r"no folder of Cityscapes train: .*leftImg8bit/train"):
        open_dataset("cityscapes", tmp_path)
    folder = folders.cityscapes(tmp_path)
    next((folder / "gtFine" / "val").rglob("*.png")).unlink()
    with pytest.raises(DatasetError, match="1 of 2 images of Cityscapes val have no label map"):
        open_dataset("cityscapes", folder)


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "annotations"), ("", "stuffthingmaps"), ("", "stuffthingmaps_trainval2017")],
)
def test_coco_stuff(tmp_path, images, labels):
    data = open_dataset("coco-stuff", folders.coco_stuff(tmp_path, images, labels))
    assert (data.name, len(data.classes), len(data.train), len(data.val)) == (
        "coco_stuff",
        27,
        4,
        2,
    )
    names = {0: "person", 15: "animal", 123: "plant", 181: "solid"}
    for i in range(2):
        raw = folders.blocks([0, 15, 123, 181, 255], i)
        mapped = labels_of(data.val, i)
        for value, label in zip(raw.flatten(), mapped.flatten(), strict=True):
            if value == 255:
                assert label == IGNORE
            else:
                assert data.classes[label] == names[int(value)]


def test_coco_stuff_groups_every_label_once():
    values = [value for group in GROUPS.values() for value in group]
    assert sorted(values) == list(range(182))
    assert len(GROUPS) == 27
    things = [name for name, group in GROUPS.items() if max(group) <= 90]
    assert len(things) == 12
    # Spot checks against the names of COCO-Stuff's labels (value = id - 1).
    for name, value in {
        "vehicle": 2,  # car
        "kitchen": 43,  # bottle
        "furniture things": 61,  # chair
        "electronic": 71,  # tv
        "sky": 156,  # sky-other
        "water": 154,  # sea
        "building": 157,  # skyscraper
        "wall": 170,  # wall-brick
        "window": 180,  # window-other
        "ground": 153,  # sand
    }.items():
        assert value in GROUPS[name], name


def test_texture_scenes_are_those_of_training():
    options = DatasetOptions(scene_size=32, train_scenes=3, val_scenes=2, seed=4)
    data = open_dataset("texture-scenes", None, options)
    assert (data.name, data.classes) == ("texture_scenes", TextureScenes.classes)
    assert (len(data.train), len(data.val)) == (3, 2)
    image, labels = data.val.load(1)
    pixels, expected = TextureScenes(2, 32, split="heldout", seed=4)[1]
    assert np.array_equal(image, pixels)
    np.testing.assert_array_equal(labels, expected)


# ------------------------------------------------------------------ any folder


def test_folder_with_sub_folders(tmp_path):
    folders.pairs(tmp_path, 4, "training")
    folders.pairs(tmp_path, 3, "val", seed=9)
    data = open_dataset("folder", tmp_path)
    assert (data.name, len(data.train), len(data.val)) == ("folder", 4, 3)
    assert data.classes == ("class 0", "class 1", "class 2")
    np.testing.assert_array_equal(labels_of(data.val, 2), folders.blocks((0, 1, 2), 11))
    other = open_dataset("folder", tmp_path, DatasetOptions(val_split="training"))
    assert len(other.val) == 4


def test_folder_with_lists(tmp_path):
    folders.pairs(tmp_path)
    (tmp_path / "train.txt").write_text("0\n3.png\n\n1\n")
    (tmp_path / "val.txt").write_text("4\n")
    (tmp_path / "classes.txt").write_text("sea\nland\nsky\n")
    data = open_dataset("folder", tmp_path)
    assert [path.stem for path, _ in data.train.pairs] == ["0", "3", "1"]
    assert [path.stem for path, _ in data.val.pairs] == ["4"]
    assert data.classes == ("sea", "land", "sky")
    (tmp_path / "val.txt").write_text("7\n")
    with pytest.raises(DatasetError, match=r"val\.txt names '7', but there is no such image"):
        open_dataset("folder", tmp_path)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(DatasetError, match="no training and validation images as asked for"):
        open_dataset("folder", tmp_path)


def test_folder_without_a_split_is_split_by_its_seed(tmp_path):
    folders.pairs(tmp_path, 10)
    data = open_dataset("folder", tmp_path)
    again = open_dataset("folder", tmp_path)
    other = open_dataset("folder", tmp_path, DatasetOptions(seed=1, val_share=0.4))
    assert (len(data.train), len(data.val)) == (8, 2)
    assert data.val.pairs == again.val.pairs
    assert (len(other.train), len(other.val)) == (6, 4)
    assert not set(data.train.pairs) & set(data.val.pairs)
    with pytest.raises(DatasetError, match=r"val_share must lie between 0 and 1, got 1\.0"):
        open_dataset("folder", tmp_path, DatasetOptions(val_share=1.0))


def test_folder_with_zero_as_no_class(tmp_path):
    folders.pairs(tmp_path, values=(0, 1, 2, 255))
    data = open_dataset("folder", tmp_path, DatasetOptions(reduce_zero_label=True, num_classes=2))
    found = {int(v) for i in range(4) for v in np.unique(labels_of(data.train, i))}
    assert found == {IGNORE, 0, 1}


def test_labels_beyond_255(tmp_path):
    folders.pairs(tmp_path, 3)
    values = np.full(folders.SIZE, 300, dtype=np.uint16)
    for i in range(3):
        Image.fromarray(values).save(tmp_path / "annotations" / f"{i}.png")
    data = open_dataset("folder", tmp_path, DatasetOptions(ignore_index=-1))
    assert len(data.classes) == 301
    assert (labels_of(data.val) == 300).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2}, r"has the value 2, which is no class .*: accepted are 0-1, 255"),
        ({"num_classes": 1}, "must have at least 2 classes, got 1"),
        ({"ignore_index": 1, "num_classes": 3}, "ignore_index must be no class, got 1"),
    ],
)
def test_labels_that_are_no_class_are_named(tmp_path, options, message):
    folders.pairs(tmp_path, values=(2,))
    with pytest.raises(DatasetError, match=message):
        open_dataset("folder", tmp_path, DatasetOptions(**options)).train.load(0)


def test_bad_files_are_named(tmp_path):
    folders.pairs(tmp_path, 4)
    data = open_dataset("folder", tmp_path, DatasetOptions(num_classes=3))
    image, label = data.train.pairs[0]
    Image.new("RGB", folders.SIZE[::-1]).save(label)
    with pytest.raises(DatasetError, match="image of mode RGB: a label map has one number a pixel"):
        data.train.load(0)
    Image.new("L", (5, 5)).save(label)
    with pytest.raises(DatasetError, match=r"has 5 x 5 pixels, but its image .* has 24 x 32"):
        data.train.load(0)
    label.write_bytes(b"")
    with pytest.raises(DatasetError, match="cannot read the label map"):
        data.train.load(0)
    image.write_bytes(b"")
    with pytest.raises(DatasetError, match="cannot read the image"):
        data.train.load(0)


def test_folders_that_are_no_data_set_are_named(tmp_path):
    with pytest.raises(DatasetError, match=f"dataset must be one of {', '.join(DATASETS)}, got"):
        open_dataset("vok", tmp_path)
    with pytest.raises(DatasetError, match="dataset voc needs the folder"):
        open_dataset("voc", None)
    with pytest.raises(DatasetError, match=r"must be the folder of voc, but .* does not exist"):
        open_dataset("voc", tmp_path / "no")
    with pytest.raises(DatasetError, match="no folder of images: looked for"):
        open_dataset("folder", tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    with pytest.raises(DatasetError, match="no image in"):
        open_dataset("folder", tmp_path)
