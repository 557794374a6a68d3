"""Batches depend on the seed and the step alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from dse_ext.data import ImageFolder, TextureScenes
from dse_ext.ssl.loader import AugmentedViews, StepSampler, batches
from dse_ext.ssl.randomness import random_state, seeded, set_random_state


def noisy_views(image):
    """An augmentation that draws from all three generators."""
    pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)
    return [
        pixels + torch.randn(()) + np.random.random_sample() + random.random(),  # noqa: NPY002
        pixels[:, ::2, ::2] * torch.rand(()),
    ]


def collect(source, first=0, last=6, workers=0, seed=3, batch_size=4):
    dataset = AugmentedViews(source, noisy_views, seed)
    sampler = StepSampler(len(source), batch_size, first, last, seed)
    return list(batches(dataset, sampler, workers=workers))


def test_every_epoch_sees_every_image_once():
    keys = [key for step in StepSampler(10, 4, 0, 5, seed=1) for key in step]
    assert len(keys) == 20
    for epoch in (0, 1):
        assert sorted(index for e, index in keys if e == epoch) == list(range(10))
    orders = [[index for e, index in keys if e == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(10))


def test_order_depends_on_seed_and_not_on_where_it_starts():
    whole = list(StepSampler(10, 4, 0, 8, seed=1))
    assert list(StepSampler(10, 4, 5, 8, seed=1)) == whole[5:]
    assert list(StepSampler(10, 4, 0, 8, seed=2)) != whole
    assert len(StepSampler(10, 4, 5, 8, seed=1)) == 3


def test_batch_larger_than_the_data_set_is_full():
    (keys,) = StepSampler(3, 8, 0, 1, seed=0)
    assert len(keys) == 8
    assert {index for _, index in keys} == {0, 1, 2}
    assert [epoch for epoch, _ in keys] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers):
    scenes = TextureScenes(10, 16)
    for here, there in zip(collect(scenes), collect(scenes, workers=workers), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here.views, there.views, strict=True))


def test_views_of_one_image_differ_between_epochs_and_seeds():
    scenes = TextureScenes(2, 16)
    views = AugmentedViews(scenes, noisy_views, 0)
    first = views[0, 1].views[0]
    assert torch.equal(first, views[0, 1].views[0])
    assert not torch.equal(first, views[1, 1].views[0])
    assert not torch.equal(first, AugmentedViews(scenes, noisy_views, 1)[0, 1].views[0])


def test_shapes():
    batch = collect(TextureScenes(10, 16))[0]
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 16, 16), (4, 3, 8, 8)]
    assert batch.skipped == ()


def test_global_generators_are_left_alone():
    before = random_state(torch.device("cpu"))
    collect(TextureScenes(10, 16))
    after = random_state(torch.device("cpu"))
    assert before["python"] == after["python"]
    assert before["numpy"] == after["numpy"]
    assert torch.equal(before["torch"], after["torch"])


def test_random_state_round_trip():
    def draw():
        return random.random(), np.random.random_sample(), float(torch.rand(()))  # noqa: NPY002

    cpu = torch.device("cpu")
    state = random_state(cpu)
    expected = draw()
    assert draw() != expected
    set_random_state(state, cpu)
    assert draw() == expected
    with seeded(1, 2):
        inside = draw()
    with seeded(1, 2):
        assert draw() == inside
    with seeded(1, 3):
        assert draw() != inside


def test_unreadable_image_is_reported_with_its_batch(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")
    batch = collect(ImageFolder(tmp_path), last=1, batch_size=2)[0]
    assert len(batch.views[0]) == 2
    assert len(batch.skipped) == 1
    assert "a.png" in batch.skipped[0]
