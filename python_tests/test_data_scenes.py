"""TextureScenes: the same scenes everywhere, true labels, and classes that colour does not tell."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dse_ext.data import TEXTURES, TextureScenes
from dse_ext.data.layouts import LAYOUTS
from dse_ext.data.photographs import photograph_path, texture_levels


def test_scene_is_image_with_pixel_labels():
    scenes = TextureScenes(length=3, size=48)
    image, labels = scenes[0]
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert image.size == (48, 48)
    assert labels.dtype == torch.int64
    assert labels.shape == (48, 48)
    assert 0 <= int(labels.min()) <= int(labels.max()) < scenes.num_classes
    assert len(scenes) == 3


def test_scenes_have_several_regions_and_all_classes_occur():
    scenes = TextureScenes(length=80, size=32)
    counts = [torch.unique(scenes[i][1]).numel() for i in range(80)]
    assert max(counts) <= 4
    assert np.mean(np.array(counts) >= 2) > 0.9
    seen = torch.unique(torch.stack([scenes[i][1] for i in range(80)]))
    assert seen.tolist() == list(range(scenes.num_classes))


def test_scene_depends_on_seed_split_and_index_alone():
    first, again = TextureScenes(10, 32, seed=5), TextureScenes(20, 32, seed=5)
    again[3]  # what was asked for before must not matter
    for index in (0, 7):
        assert np.array_equal(first[index][0], again[index][0])
        assert torch.equal(first[index][1], again[index][1])
    others = (
        TextureScenes(10, 32, seed=6)[0],
        TextureScenes(10, 32, seed=5, split="heldout")[0],
        first[1],
    )
    assert all(not np.array_equal(first[0][0], other[0]) for other in others)


def test_scene_is_not_changed_by_global_random_state():
    scenes = TextureScenes(10, 32)
    before = np.asarray(scenes[2][0])
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert np.array_equal(before, scenes[2][0])
    assert torch.equal(state, torch.get_rng_state())


def test_scene_keeps_its_layout_at_another_resolution():
    small, large = TextureScenes(8, 32), TextureScenes(8, 128)
    for index in range(8):
        coarse = small[index][1]
        fine = large[index][1][2::4, 2::4]
        assert (coarse == fine).float().mean() > 0.95


def test_cached_and_pickled_scenes_are_the_same():
    plain = TextureScenes(4, 32)
    cached = TextureScenes(4, 32, cache=True)
    for scenes in (cached, cached, pickle.loads(pickle.dumps(plain))):
        assert np.array_equal(plain[1][0], scenes[1][0])
        assert torch.equal(plain[1][1], scenes[1][1])


def test_cached_scene_cannot_be_changed_from_outside():
    scenes = TextureScenes(4, 32, cache=True)
    expected = scenes[0][1].clone()
    scenes[0][1].fill_(0)
    assert torch.equal(scenes[0][1], expected)


def test_load_gives_the_image_alone():
    scenes = TextureScenes(4, 32)
    image, skipped = scenes.load(2)
    assert np.array_equal(image, scenes[2][0])
    assert skipped == ()


def test_transform_is_applied_to_the_image():
    scenes = TextureScenes(4, 32, transform=lambda image: np.asarray(image).shape)
    assert scenes[0][0] == (32, 32, 3)


def test_negative_index_counts_from_the_end_and_range_is_checked():
    scenes = TextureScenes(4, 32)
    assert torch.equal(scenes[-1][1], scenes[3][1])
    for index in (4, -5):
        with pytest.raises(IndexError, match="out of range for 4 scenes"):
            scenes[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be >= 1, got 0"),
        ({"size": 8}, "size must be >= 16 pixels, got 8"),
        ({"split": "test"}, r"split must be one of \['heldout', 'train'\], got 'test'"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextureScenes(**{"length": 2, **arguments})


def test_every_photograph_is_installed_and_its_boxes_share_no_pixel():
    for index, texture in enumerate(TEXTURES):
        with Image.open(photograph_path(texture.package, texture.file)) as photograph:
            width, height = photograph.size
        for left, top, right, bottom in (texture.train, texture.heldout):
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
        a, b = texture.train, texture.heldout
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, texture.name
        for split in ("train", "heldout"):
            levels = texture_levels(index, split)
            assert all(np.asarray(level.image).std() > 5 for level in levels)


def test_missing_photograph_is_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"'no\.png', which the installed scikit-image"):
        photograph_path("skimage", "no.png")
    monkeypatch.setattr("dse_ext.data.photographs.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="not installed: pip install scikit-learn"):
        photograph_path("sklearn", "china.jpg")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("regions", [2, 3, 4])
def test_layout_has_the_regions_that_were_asked_for(layout, regions):
    maps = [layout(np.random.default_rng(seed), 40, regions) for seed in range(20)]
    assert all(m.shape == (40, 40) and m.min() >= 0 and m.max() < regions for m in maps)
    sizes = np.array([np.bincount(m.ravel(), minlength=regions) for m in maps])
    assert (sizes > 0).mean() > 0.85
    # No region number is favoured so much that it fills the image.
    assert np.median(sizes.max(axis=1)) < 0.85 * 1600
