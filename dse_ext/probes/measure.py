"""Measures the dense features of a frozen network with probes on a segmentation data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dse_ext.probes.datasets import IGNORE, DatasetError, LabelledSource, SegmentationData
from dse_ext.probes.knn import KNNProbe
from dse_ext.probes.linear import LinearProbe
from dse_ext.probes.patches import Grid, PatchTargets, patch_targets, to_map
from dse_ext.probes.score import ProbeScore, ScoreAccumulator
from dse_ext.probes.store import MEMORY_LIMIT, PatchStore

PROBES = ("linear", "knn")
"""Names of the probes."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many images are done, and how many there are."""


class FeaturesNotFiniteError(ValueError):
    """A network gives features that are infinite or NaN, which no probe can be fitted to."""


class DenseNetwork(Protocol):
    """What is asked of a network, as ``dse_ext.checkpoints.DenseExtractor`` has it."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns pooled features (B, d) and dense features (B, N, d) of images (B, 3, H, W)."""
        ...

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the dense features of an image of a size in pixels."""
        ...


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are fitted and measured: everything a figure depends on besides data and network.

    Attributes:
        probes: Which of :data:`PROBES`.
        image_size: Height and width in pixels that every image is resized to as a whole.
        train_images: Largest number of training images, a random subset that is the same for every
            checkpoint; None takes all.
        val_images: The same for the images that are measured on.
        l2: Penalty of the linear probe.
        max_iter: Bound on its iterations.
        k: Neighbours of the k-NN probe.
        temperature: Its temperature.
        bank: Patches in its bank, spread evenly over the training images.
        seed: Seed of the subsets and of the bank.
    """

    probes: tuple[str, ...] = PROBES
    image_size: tuple[int, int] = (224, 224)
    train_images: int | None = None
    val_images: int | None = None
    l2: float = 1e-4
    max_iter: int = 200
    k: int = 30
    temperature: float = 0.02
    bank: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.probes if name not in PROBES]
        if unknown or not self.probes:
            raise ValueError(f"probes must be some of {', '.join(PROBES)}, got {self.probes}.")
        for name in ("train_images", "val_images", "bank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}.")
        # The probes check what is theirs: here, before hours of feature extraction.
        LinearProbe(2, l2=self.l2, max_iter=self.max_iter)
        KNNProbe(2, k=self.k, temperature=self.temperature)


def measure(
    network: DenseNetwork,
    data: SegmentationData,
    settings: ProbeSettings,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | None = None,
    batch_size: int = 32,
    workers: int = 0,
    folder: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> dict[str, ProbeScore]:
    """Fits probes to frozen dense features and measures them on other images.

    Both probes see the same features, which are computed once. Images are streamed; what is kept
    is the training features (in a file, where they are large) and a bank of patches. Logits and
    votes are upsampled bilinearly to each label map's own size, where they are compared with it.

    Args:
        network: The network, in evaluation mode, on `device`.
        data: The data set.
        settings: How probes are fitted and measured.
        mean: Mean of the colours, in [0, 1], that images are normalized with.
        std: Their standard deviation.
        device: Where network and probes compute; None is the CPU.
        batch_size: Images in a forward pass.
        workers: Processes that read images.
        folder: Where a file of features is made, where they take more than `memory_limit`.
        memory_limit: Bytes of training features that are kept in memory.
        progress: Told how far it is.

    Returns:
        The score of each probe.

    Raises:
        DatasetError: If an image or a label map cannot be used.
        FeaturesNotFiniteError: If a feature is infinite or NaN.
        ValueError: If the network does not take the image size, or no pixel is labelled.

    Examples:
        >>> from dse_ext.checkpoints import load
        >>> from dse_ext.probes import ProbeSettings, measure, open_dataset
        >>> data = open_dataset("voc", "data/VOCdevkit")
        >>> network = load("checkpoint0100.pth", "dino")
        >>> scores = measure(network, data, ProbeSettings(), mean=(0.485, 0.456, 0.406),
        ...                  std=(0.229, 0.224, 0.225))
        >>> scores["linear"].miou
        0.55
    """
    device = device or torch.device("cpu")
    report = progress or (lambda what, done, total: None)
    grid = network.grid(*settings.image_size)
    classes = len(data.classes)

    def stream(source: LabelledSource, limit: int | None, what: str) -> Iterator[_Batch]:
        images = _Prepared(source, _subset(len(source), limit, settings.seed), settings.image_size)
        normalize = _Normalize(mean, std, device)
        loader = DataLoader(
            images, batch_size, num_workers=workers, collate_fn=_collate, prefetch_factor=None
        )
        done = 0
        report(what, 0, len(images))
        for item in loader:
            if isinstance(item, DatasetError):
                raise item
            pixels, labels = item
            with torch.no_grad():
                dense = network(normalize(pixels))[1].float()
            if not bool(dense.isfinite().all()):
                raise FeaturesNotFiniteError("features that are not finite")
            yield _Batch(dense, labels)
            done += len(labels)
            report(what, done, len(images))

    train_count = min(len(data.train), settings.train_images or len(data.train))
    patches = train_count * grid[0] * grid[1]
    store: PatchStore | None = None
    bank = _Bank(settings.bank, train_count, classes, settings.seed)
    for batch in stream(data.train, settings.train_images, "training images"):
        targets = PatchTargets.cat(
            [patch_targets(map_[None], grid, classes, IGNORE) for map_ in batch.labels]
        )
        if "linear" in settings.probes:
            if store is None:
                store = PatchStore(patches, batch.dense.shape[2], folder, memory_limit=memory_limit)
            store.add(batch.dense.flatten(0, 1), targets)
        if "knn" in settings.probes:
            bank.add(batch.dense, targets)
    fitted: dict[str, Callable[[Tensor], Tensor]] = {}
    if store is not None:
        report("linear probe", 0, 1)
        linear = LinearProbe(classes, l2=settings.l2, max_iter=settings.max_iter)
        fitted["linear"] = linear.fit_batches(store, device).patch_logits
        report("linear probe", 1, 1)
    if "knn" in settings.probes:
        knn = KNNProbe(classes, k=settings.k, temperature=settings.temperature)
        fitted["knn"] = knn.fit_bank(*bank.content(device)).patch_votes
    del store, bank
    counts = {
        name: ScoreAccumulator(classes, ignore_index=IGNORE, device=device) for name in fitted
    }
    for batch in stream(data.val, settings.val_images, "validation images"):
        for name, patch_values in fitted.items():
            for values, labels in zip(patch_values(batch.dense), batch.labels, strict=True):
                size = (labels.shape[0], labels.shape[1])
                guess = to_map(values[None], grid, size).argmax(dim=1)[0]
                counts[name].update(guess, labels.to(device).long())
    return {name: counts[name].compute() for name in settings.probes}


@dataclass(frozen=True)
class _Batch:
    """Dense features (B, N, d), and the label map of each image at its own size."""

    dense: Tensor
    labels: list[Tensor]


_Item: TypeAlias = "tuple[Tensor, Tensor] | DatasetError"


class _Prepared(Dataset[_Item]):
    """Images as tensors of one size, uint8 (3, H, W), with their label maps at their own size.

    What is wrong with a file is returned, not raised: the loader would put the traceback of its
    process into the message.
    """

    def __init__(
        self, source: LabelledSource, indices: Sequence[int], size: tuple[int, int]
    ) -> None:
        self.source = source
        self.indices = indices
        self.size = size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> _Item:
        try:
            image, labels = self.source.load(self.indices[index])
        except DatasetError as error:
            return error
        height, width = self.size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels, torch.from_numpy(labels)


class _Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.mean.device) / 255 - self.mean) / self.std


class _Bank:
    """A sample of patches, the same number of each image, chosen by the image's number alone."""

    def __init__(self, size: int, images: int, classes: int, seed: int) -> None:
        self.size = size
        self.quota = math.ceil(size / images)
        self.classes = classes
        self.seed = seed
        self.images = 0
        self.features: list[Tensor] = []
        self.shares: list[Tensor] = []

    def add(self, dense: Tensor, targets: PatchTargets) -> None:
        count = dense.shape[1]
        shares = targets.dense(self.classes)
        for number, features in enumerate(dense):
            part = shares[number * count : (number + 1) * count]
            labelled = part.sum(dim=1).nonzero()[:, 0]
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.images)
            order = torch.randperm(len(labelled), generator=draw)[: self.quota]
            chosen = labelled[order].sort().values
            self.features.append(features[chosen.to(features.device)].cpu())
            self.shares.append(part[chosen])
            self.images += 1

    def content(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features and shares; of the few too many that quotas leave, some at random."""
        features, shares = torch.cat(self.features), torch.cat(self.shares)
        if len(features) > self.size:
            draw = torch.Generator().manual_seed(self.seed)
            keep = torch.randperm(len(features), generator=draw)[: self.size].sort().values
            features, shares = features[keep], shares[keep]
        return features.to(device), shares.to(device)


def _subset(count: int, limit: int | None, seed: int) -> list[int]:
    """A sorted random sample, the same for every checkpoint."""
    if limit is None or limit >= count:
        return list(range(count))
    order = np.random.default_rng(seed).permutation(count)[:limit]
    return sorted(order.tolist())


def _collate(items: list[_Item]) -> tuple[Tensor, list[Tensor]] | DatasetError:
    pairs = []
    for item in items:
        if isinstance(item, DatasetError):
            return item
        pairs.append(item)
    return torch.stack([pixels for pixels, _ in pairs]), [labels for _, labels in pairs]
