"""The images that every checkpoint is scored on: a fixed choice, read in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dse_ext.data import ImageFolder, ImageSource, TextureScenes
from dse_ext.evaluation.settings import TEXTURE_SCENES, EvaluateConfig
from dse_ext.ssl.config import available_cores
from dse_ext.ssl.randomness import seeded


class ImageSet:
    """The images of a sweep.

    The images of a folder are drawn without replacement, and stay in the order in which they were
    drawn: DSE clusters groups of consecutive images, and files that follow each other by name
    often show the same class.

    Attributes:
        source: Where images come from.
        indices: Their numbers, in order.
    """

    def __init__(self, config: EvaluateConfig, image_size: int) -> None:
        """Chooses the images; none is opened yet.

        Raises:
            NotADirectoryError: If there is no such folder.
            NoImagesError: If it has no image.
        """
        self.source: ImageSource
        if config.data == TEXTURE_SCENES:
            self.source = TextureScenes(config.images, image_size, seed=config.seed, cache=True)
            self.indices = list(range(config.images))
            names = [f"{image_size} {config.seed} {index}" for index in self.indices]
            self.name = TEXTURE_SCENES
        else:
            if not Path(config.data).is_dir():
                raise NotADirectoryError(
                    f"data must be {TEXTURE_SCENES!r} or a folder of images; {config.data!r} is "
                    "neither."
                )
            folder = ImageFolder(config.data)
            self.source = folder
            order = np.random.default_rng(config.seed).permutation(len(folder))
            self.indices = order[: config.images].tolist()
            names = [folder.paths[i].relative_to(folder.root).as_posix() for i in self.indices]
            self.name = folder.root.resolve().name
        self.names = names

    def __len__(self) -> int:
        return len(self.indices)

    def settings(self) -> dict[str, Any]:
        """What identifies the choice, as JSON can hold it."""
        digest = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        return {"data": self.name, "images": len(self), "images_sha256": digest}


class Item(NamedTuple):
    """One image, or its views, ready for a network.

    Attributes:
        pixels: ``(3, H, W)``, or ``(q, 3, H, W)``.
        skipped: Messages that name images which could not be read.
    """

    pixels: Tensor
    skipped: tuple[str, ...]


class Prepared(Dataset[Item]):
    """The chosen images under a transform, or several random views of each."""

    def __init__(
        self,
        images: ImageSet,
        transform: Callable[[Image.Image], Tensor],
        *,
        count: int | None = None,
        views: int | None = None,
        seed: int = 0,
    ) -> None:
        """Describes the items.

        Args:
            images: The images.
            transform: Makes a tensor of an image.
            count: Number of images, the first ones; None for all.
            views: Number of views of each image; None for the image itself.
            seed: Seed of random transforms: a view depends on it, the image and its own number.
        """
        self.images = images
        self.transform = transform
        self.count = len(images) if count is None else min(count, len(images))
        self.views = views
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Item:
        """Prepares one image.

        Args:
            position: Its place in the order of the images.
        """
        image, skipped = self.images.source.load(self.images.indices[position])
        if self.views is None:
            return Item(self.transform(image), skipped)
        views = []
        for view in range(self.views):
            with seeded(self.seed, position, view):
                views.append(self.transform(image))
        return Item(torch.stack(views), skipped)


def batches(dataset: Prepared, batch_size: int, workers: int, pin: bool) -> DataLoader[Item]:
    """Returns a loader in order; its processes live on from one pass to the next."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin,
        # Without one of its own, the loader would draw from the global generator.
        generator=torch.Generator().manual_seed(0),
    )


def batch_sizes(images: int, largest: int) -> Iterator[int]:
    """Cuts a number of images into the fewest batches, as equal as possible."""
    parts = -(-images // largest)
    for part in range(parts):
        yield images // parts + (part < images % parts)


def worker_count(workers: int, processes: int) -> int:
    """Number of processes that prepare images: as given, or by the cores of this process."""
    if workers >= 0:
        return workers
    cores = available_cores() // processes
    return min(cores // 2, 8) if cores > 1 else 0


def augmentation(
    image_size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Callable[[Image.Image], Tensor]:
    """The random views that LiDAR's classes are made of: those of joint-embedding methods.

    A crop of 8 to 100 % of the area, mirrored or not, with changes of colour, now and then grey or
    blurred: what the methods of the paper have in common.

    Args:
        image_size: Width and height of a view in pixels.
        mean: Mean that colours are normalized with.
        std: Standard deviation.
    """
    from torchvision import transforms as t

    kernel = max(image_size // 20 * 2 + 1, 3)
    transform: Callable[[Image.Image], Tensor] = t.Compose(
        [
            t.RandomResizedCrop(
                image_size, scale=(0.08, 1.0), interpolation=t.InterpolationMode.BICUBIC
            ),
            t.RandomHorizontalFlip(),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([t.GaussianBlur(kernel, sigma=(0.1, 2.0))], p=0.5),
            t.ToTensor(),
            t.Normalize(mean, std),
        ]
    )
    return transform


def _collate(items: list[Item]) -> Item:
    return Item(
        torch.stack([item.pixels for item in items]),
        tuple(message for item in items for message in item.skipped),
    )


def _start_worker(_: int) -> None:
    import signal

    # Ctrl-C reaches the whole process group; the main process alone decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
