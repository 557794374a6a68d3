"""Batches of augmented views that depend on the seed and the step alone.

Neither the number of worker processes nor an interruption changes what a step sees: the order is
a function of (seed, epoch), and each image's augmentation of (seed, epoch, index).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dse_ext.data import ImageSource
from dse_ext.ssl.randomness import seeded

Key = tuple[int, int]
"""Epoch and index of an image."""


class Batch(NamedTuple):
    """What one step works on.

    Attributes:
        views: One tensor ``(B, 3, h, w)`` per view.
        skipped: Messages that name images which could not be read.
    """

    views: list[Tensor]
    skipped: tuple[str, ...]


class AugmentedViews(Dataset[Batch]):
    """The views of one image under the augmentation of one epoch."""

    def __init__(
        self, source: ImageSource, transform: Callable[[Image.Image], list[Tensor]], seed: int
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: Key) -> Batch:
        """Returns the views of an image, each of shape ``(3, h, w)``.

        Args:
            key: Epoch and index.
        """
        epoch, index = key
        image, skipped = self.source.load(index)
        with seeded(self.seed, epoch, index):
            return Batch(self.transform(image), skipped)


class StepSampler(Sampler[list[Key]]):
    """The images of every step: one permutation per epoch, cut into batches.

    A batch may reach over the end of an epoch, so every step has a full batch even if the data
    set is smaller than one.
    """

    def __init__(self, length: int, batch_size: int, first: int, last: int, seed: int) -> None:
        """Describes the steps.

        Args:
            length: Number of images.
            batch_size: Images per step.
            first: First step.
            last: Step after the last one.
            seed: Seed of the permutations.
        """
        self.length = length
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.seed = seed

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        """Yields one list of keys per step."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            keys: list[Key] = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                keys.append((epoch, int(order[position % self.length])))
            yield keys


def _collate(items: list[Batch]) -> Batch:
    views = [torch.stack(view) for view in zip(*(item.views for item in items), strict=True)]
    return Batch(views, tuple(message for item in items for message in item.skipped))


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the training process alone decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def batches(
    dataset: AugmentedViews,
    sampler: StepSampler,
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Returns a loader of the sampler's steps.

    Args:
        dataset: Where views come from.
        sampler: Which images make up each step.
        workers: Number of processes that prepare images; 0 prepares them in this one.
        pin_memory: Whether batches are put in page-locked memory.

    Returns:
        The loader; iterating over it gives one :class:`Batch` per step and does not touch the
        global random generators.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=2 if workers else None,
        pin_memory=pin_memory,
        # Without a generator of its own the loader draws a seed from the global one, and a resumed
        # run would be shifted by that draw.
        generator=torch.Generator().manual_seed(sampler.seed),
    )
