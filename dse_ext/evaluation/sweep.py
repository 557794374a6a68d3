"""A sweep over the checkpoints of a run, or of several: resumable, shared among processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from dse_ext.checkpoints import CheckpointError, CheckpointFile, find_checkpoints, load
from dse_ext.checkpoints.extractor import evaluation_transform
from dse_ext.checkpoints.load import DEFAULT_IMAGE_SIZE
from dse_ext.evaluation.images import (
    ImageSet,
    Item,
    Prepared,
    augmentation,
    batches,
    worker_count,
)
from dse_ext.evaluation.progress import SweepProgress
from dse_ext.evaluation.results import ResultsFolder
from dse_ext.evaluation.scores import Scorer, Seconds
from dse_ext.evaluation.settings import EvaluateConfig
from dse_ext.ssl.device import choose_device


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep.

    Attributes:
        folder: Where the results are.
        rows: One row a checkpoint of the folder, as in results.csv.
        skipped: Checkpoints that could not be scored, with the reasons.
        seconds: Where the time of this process went.
        settings: What the results depend on.
    """

    folder: ResultsFolder
    rows: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    seconds: Seconds
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Ranks:
    """The place of this process among those that ``torchrun`` started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> _Ranks:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = [os.environ.get(name, "") for name in names]
        return cls(*map(int, values)) if all(values) else cls()

    def wait(self) -> None:
        """Waits for the other processes."""
        if self.size > 1:
            torch.distributed.barrier()


def evaluate(
    config: EvaluateConfig,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> SweepResult:
    """Scores every checkpoint that has no score yet, and writes the results folder.

    Each checkpoint's result is written as soon as it is there. A sweep that was interrupted, or
    killed, goes on where it was when it is called again, and ends in the same bytes. Under
    ``torchrun`` the checkpoints are shared among the processes, which must see one ``out``.

    Args:
        config: What to do.
        out: The results folder.
        overwrite: Delete the results in ``out`` and start again.
        console: Where progress is shown; None shows nothing.

    Returns:
        The results; those of the whole folder in the process of rank 0.

    Raises:
        ValueError: If an option cannot be used, or ``out`` holds results with other settings.
        FileNotFoundError: If no checkpoint is found.
        NotADirectoryError: If there is no such folder of images.

    Examples:
        >>> from dse_ext.evaluation import EvaluateConfig, evaluate
        >>> config = EvaluateConfig("dino", "runs/dino/*.pth", "images/")
        >>> evaluate(config, "results").rows[0]["m_dim"]
        0.43
    """
    ranks = _Ranks.from_environment()
    console = console if console is not None and ranks.rank == 0 else Console(quiet=True)
    with _process_group(ranks):
        return _evaluate(config, ResultsFolder(Path(out)), overwrite, console, ranks)


def _evaluate(
    config: EvaluateConfig,
    folder: ResultsFolder,
    overwrite: bool,
    console: Console,
    ranks: _Ranks,
) -> SweepResult:
    device = choose_device(config.device)
    if config.device == "auto" and device.type == "cuda":
        device = torch.device("cuda", ranks.local_rank)
    files = find_checkpoints(config.checkpoints, config.reader)
    if config.run is not None:
        if len({file.run for file in files}) > 1:
            raise ValueError(
                f"run names one run, but {config.checkpoints!r} has checkpoints of several: "
                f"{', '.join(sorted({file.run for file in files}))}."
            )
        files = [replace(file, run=config.run) for file in files]
    config = replace(config, image_size=_image_size(config, files))
    images = ImageSet(config, config.image_size or DEFAULT_IMAGE_SIZE)
    if len(images) < config.images:
        console.print(
            f"[yellow]note:[/] {config.data} has {len(images)} images, fewer than the "
            f"{config.images} that were asked for; all are used.",
            highlight=False,
        )
    settings = {**config.settings(), **images.settings()}
    if ranks.rank == 0:
        folder.prepare(settings, images.names, overwrite)
    ranks.wait()

    pending = [file for file in files if not folder.is_done(file)]
    # Decided by all processes before any of them goes on to add to what is done.
    ranks.wait()
    if len(pending) < len(files):
        console.print(
            f"{len(files) - len(pending)} of {len(files)} are done already", highlight=False
        )
    scorer = Scorer(config, device)
    own = pending[ranks.rank :: ranks.size]
    with SweepProgress(console, len(own)) as progress:
        _score_all(own, config, scorer, images, folder, progress, ranks)
    ranks.wait()
    rows, skipped = folder.merge() if ranks.rank == 0 else ([], [])
    return SweepResult(folder, rows, skipped, scorer.seconds, settings)


def _score_all(
    files: list[CheckpointFile],
    config: EvaluateConfig,
    scorer: Scorer,
    images: ImageSet,
    folder: ResultsFolder,
    progress: SweepProgress,
    ranks: _Ranks,
) -> None:
    if not files:
        return
    loader, views, total = _loaders(config, images, scorer.device, ranks)
    for file in files:
        progress.start(f"{file.run}/{file.path.name}", total)
        try:
            network = load(
                file.path,
                config.reader,
                model=config.model,
                model_args=config.model_args,
                image_size=config.image_size,
                layer=config.layer,
                allow_pickle=config.allow_pickle,
            )
        except CheckpointError as error:
            folder.add_skipped(file, error)
            progress.skip(error.reason)
        else:
            figures = scorer.score(
                network.to(scorer.device), loader, len(images), views, progress.advance
            )
            folder.add(
                file,
                {
                    "run": file.run,
                    "checkpoint": file.path.name,
                    "epoch": file.epoch,
                    "method": config.reader.name,
                    "variant": config.variant,
                    "images": len(images),
                    **figures,
                },
            )
            progress.finish(figures)
        if ranks.rank == 0:
            folder.merge()


def _loaders(
    config: EvaluateConfig, images: ImageSet, device: torch.device, ranks: _Ranks
) -> tuple[DataLoader[Item], DataLoader[Item] | None, int]:
    """The images, LiDAR's views, and the number of both together."""
    reader = config.reader
    size = config.image_size or DEFAULT_IMAGE_SIZE
    workers = worker_count(config.workers, ranks.local_size)
    pin = device.type == "cuda"
    prepared = Prepared(images, evaluation_transform(size, reader.mean, reader.std))
    loader = batches(prepared, config.batch_size, workers, pin)
    if not config.has_lidar:
        return loader, None, len(prepared)
    several = Prepared(
        images,
        augmentation(size, reader.mean, reader.std),
        count=config.lidar_images,
        views=config.lidar_views,
        seed=config.seed,
    )
    # So that a batch of views has about as many images as the others.
    per_batch = max(config.batch_size // config.lidar_views, 1)
    views = batches(several, per_batch, workers, pin)
    return loader, views, len(prepared) + len(several) * config.lidar_views


def _image_size(config: EvaluateConfig, files: list[CheckpointFile]) -> int:
    """As asked for; as the first checkpoint that can be read tells; or the usual one."""
    if config.image_size is not None or config.reader.describe is None:
        return config.image_size or DEFAULT_IMAGE_SIZE
    for file in files:
        try:
            return load(
                file.path,
                config.reader,
                model=config.model,
                model_args=config.model_args,
                allow_pickle=config.allow_pickle,
            ).image_size
        except CheckpointError:
            continue
    return DEFAULT_IMAGE_SIZE


@contextmanager
def _process_group(ranks: _Ranks) -> Iterator[None]:
    """A process group to wait for each other in, whatever the device."""
    if ranks.size == 1 or torch.distributed.is_initialized():
        yield
        return
    # A checkpoint may take long; torchrun itself ends the others when one process fails.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
