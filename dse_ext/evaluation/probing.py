"""A sweep of probes over checkpoints: the true quality that selection is compared with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dse_ext.checkpoints import (
    CheckpointError,
    CheckpointFile,
    CheckpointReader,
    DenseExtractor,
    find_checkpoints,
    find_reader,
    load,
)
from dse_ext.checkpoints.extractor import FINAL
from dse_ext.checkpoints.load import DEFAULT_IMAGE_SIZE
from dse_ext.evaluation.images import worker_count
from dse_ext.evaluation.progress import SweepProgress
from dse_ext.evaluation.settings import PRECISIONS
from dse_ext.probes.datasets import DatasetOptions, SegmentationData, open_dataset
from dse_ext.probes.measure import FeaturesNotFiniteError, ProbeSettings, measure
from dse_ext.probes.results import ProbeResults
from dse_ext.ssl.device import choose_device
from dse_ext.ssl.storage import save_text

TABLE = "miou.csv"
DETAILS = "probe.json"


@dataclass(frozen=True)
class ProbeConfig:
    """Everything that defines a sweep of probes.

    Attributes:
        method: Name of the method, ``"module:attribute"`` or a reader.
        checkpoints: Pattern of the checkpoint files, or their folder.
        dataset: One of ``dse_ext.probes.DATASETS``.
        data: Its folder; None for ``"texture-scenes"``.
        options: What else is to be said about the data set; a scene has the size of the images.
        probe: How probes are fitted and measured; its image size is replaced by `image_size`.
        image_size: Height and width that images are resized to; None takes the checkpoint's.
        name: What columns begin with; None for the data set's name.
        run: Name of the run; None for the name of the checkpoints' folder.
        layer: Layer whose features are probed, as :func:`dse_ext.checkpoints.load` takes it.
        model: Name of a timm model; None for the method's.
        model_args: Keyword arguments for ``timm.create_model``.
        precision: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` (autocast of the network).
        batch_size: Images per forward pass.
        device: ``"auto"``, or a torch device.
        workers: Processes that read images; -1 chooses.
        allow_pickle: Whether code that a checkpoint contains may run.
    """

    method: str | CheckpointReader
    checkpoints: str
    dataset: str
    data: str | None = None
    options: DatasetOptions = field(default_factory=DatasetOptions)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    image_size: tuple[int, int] | None = None
    name: str | None = None
    run: str | None = None
    layer: int | str = FINAL
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    batch_size: int = 32
    device: str = "auto"
    workers: int = -1
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        """Checks what the parts do not check by themselves.

        Raises:
            ValueError: With the option, what was given and what is accepted.
        """
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}."
            )
        for name, least in (("batch_size", 1), ("workers", -1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}.")

    def settings(self, probe: str, data: SegmentationData) -> dict[str, Any]:
        """What a column depends on, as JSON can hold it: no paths, nothing of the machine."""
        import dse_ext

        own = {
            "linear": ("l2", "max_iter"),
            "knn": ("k", "temperature", "bank"),
        }[probe]
        options = {
            "train_split": self.options.train_split,
            "val_split": self.options.val_split,
        }
        if self.dataset == "folder":
            options |= {
                name: getattr(self.options, name)
                for name in ("ignore_index", "reduce_zero_label", "val_share")
            }
        return {
            "dse_ext": dse_ext.__version__,
            "dataset": self.dataset,
            **options,
            "train_images": min(len(data.train), self.probe.train_images or len(data.train)),
            "val_images": min(len(data.val), self.probe.val_images or len(data.val)),
            "image_size": list(self.probe.image_size),
            "probe": probe,
            **{name: getattr(self.probe, name) for name in own},
            "seed": self.probe.seed,
        }

    def network_settings(self) -> dict[str, Any]:
        """How the networks of a run are read: runs of several methods share a column."""
        return {
            "method": find_reader(self.method).name,
            "model": self.model,
            "model_args": dict(self.model_args),
            "layer": self.layer,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class ProbeSweepResult:
    """The outcome of a sweep of probes.

    Attributes:
        table: Path of ``miou.csv``.
        details: Path of ``probe.json``.
        results: What they hold.
        columns: The columns of this sweep.
        files: The checkpoints of this sweep.
        skipped: Checkpoints that could not be measured, with the reasons.
    """

    table: Path
    details: Path
    results: ProbeResults
    columns: tuple[str, ...]
    files: tuple[CheckpointFile, ...]
    skipped: tuple[tuple[CheckpointFile, str], ...]


def probe_checkpoints(
    config: ProbeConfig,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> ProbeSweepResult:
    """Measures every checkpoint that has no mIoU yet, and writes ``miou.csv`` and ``probe.json``.

    Both files are written anew after each checkpoint, completely or not at all. A sweep that was
    interrupted goes on where it was; one over another data set adds columns and keeps the others.

    Args:
        config: What to do.
        out: Folder of the two files.
        overwrite: Measure the columns of this sweep again.
        console: Where progress is shown; None shows nothing.

    Returns:
        The results, and what was skipped.

    Raises:
        ValueError: If an option cannot be used, the data set is not laid out as it should be, or
            ``out`` holds results of the same name with other settings.
        FileNotFoundError: If no checkpoint is found.

    Examples:
        >>> from dse_ext.evaluation.probing import ProbeConfig, probe_checkpoints
        >>> config = ProbeConfig("dino", "runs/dino/*.pth", "ade20k", "data/ADEChallengeData2016")
        >>> probe_checkpoints(config, "results").columns
        ('ade20k_linear', 'ade20k_knn')
    """
    console = console or Console(quiet=True)
    device = choose_device(config.device, needs_dse=False)
    files = _files(config)
    size = _image_size(config, files)
    config = replace(
        config,
        probe=replace(config.probe, image_size=size),
        options=replace(config.options, scene_size=max(size)),
    )
    data = open_dataset(config.dataset, config.data, config.options)
    out = Path(out)
    results = ProbeResults.read(_text(out / TABLE), _text(out / DETAILS))
    name = config.name or data.name
    columns = {f"{name}_{probe}": probe for probe in config.probe.probes}
    for column, probe in columns.items():
        results.begin(
            column,
            config.settings(probe, data),
            data.classes,
            {file.run: config.network_settings() for file in files},
            overwrite=overwrite,
        )
    pending = {
        file: {
            column: probe
            for column, probe in columns.items()
            if not results.has(column, file.run, file.path.name)
        }
        for file in files
    }
    todo = [file for file in files if pending[file]]
    if len(todo) < len(files):
        console.print(f"{len(files) - len(todo)} of {len(files)} are done already", highlight=False)
    skipped: list[tuple[CheckpointFile, str]] = []
    out.mkdir(parents=True, exist_ok=True)
    with SweepProgress(console, len(todo)) as progress:
        for file in todo:
            progress.start(f"{file.run}/{file.path.name}", _image_count(config, data))
            try:
                scores = _measure(
                    file, tuple(pending[file].values()), config, data, device, out, progress
                )
            except (CheckpointError, FeaturesNotFiniteError) as error:
                reason = error.reason if isinstance(error, CheckpointError) else str(error)
                skipped.append((file, reason))
                progress.skip(reason)
                continue
            for column, probe in pending[file].items():
                results.add(column, file.run, file.path.name, file.epoch, scores[probe])
            # In this order: ProbeResults.read mends a table that lacks a score.
            save_text(out / DETAILS, results.json())
            save_text(out / TABLE, results.csv())
            progress.conclude(
                "  ".join(f"{probe} {100 * score.miou:.2f} %" for probe, score in scores.items())
            )
    return ProbeSweepResult(
        out / TABLE, out / DETAILS, results, tuple(columns), tuple(files), tuple(skipped)
    )


def _files(config: ProbeConfig) -> list[CheckpointFile]:
    files = find_checkpoints(config.checkpoints, config.method)
    if config.run is None:
        return files
    if len({file.run for file in files}) > 1:
        raise ValueError(
            f"run names one run, but {config.checkpoints!r} has checkpoints of several: "
            f"{', '.join(sorted({file.run for file in files}))}."
        )
    return [replace(file, run=config.run) for file in files]


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _image_count(config: ProbeConfig, data: SegmentationData) -> int:
    settings = config.settings(config.probe.probes[0], data)
    return int(settings["train_images"] + settings["val_images"])


def _load(config: ProbeConfig, file: CheckpointFile, image_size: int | None) -> DenseExtractor:
    return load(
        file.path,
        config.method,
        model=config.model,
        model_args=config.model_args,
        image_size=image_size,
        layer=config.layer,
        allow_pickle=config.allow_pickle,
    )


def _image_size(config: ProbeConfig, files: list[CheckpointFile]) -> tuple[int, int]:
    """As asked for; as the first checkpoint that can be read tells; or the usual one."""
    if config.image_size is not None:
        return config.image_size
    if find_reader(config.method).describe is not None:
        for file in files:
            try:
                side = _load(config, file, None).image_size
            except CheckpointError:
                continue
            return side, side
    return DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE


def _measure(
    file: CheckpointFile,
    probes: tuple[str, ...],
    config: ProbeConfig,
    data: SegmentationData,
    device: torch.device,
    folder: Path,
    progress: SweepProgress,
) -> dict[str, Any]:
    height, width = config.probe.image_size
    reader = find_reader(config.method)
    # timm resamples the position embeddings to a square when it loads them, and to any other
    # shape in the forward pass: once is enough.
    network = _load(config, file, height if height == width else None).to(device)
    network.grid(height, width)
    seen = 0

    def report(what: str, done: int, total: int) -> None:
        nonlocal seen
        progress.stage(what)
        if not what.endswith("images"):
            return
        # The pass over the validation images begins at 0 again.
        seen = 0 if done == 0 else seen
        progress.advance(done - seen, ())
        seen = done

    return dict(
        measure(
            _Autocast(network, device, config.precision),
            data,
            replace(config.probe, probes=probes),
            mean=reader.mean,
            std=reader.std,
            device=device,
            batch_size=config.batch_size,
            workers=worker_count(config.workers, 1),
            folder=folder,
            progress=report,
        )
    )


class _Autocast:
    """A network in the precision that was asked for."""

    def __init__(self, network: DenseExtractor, device: torch.device, precision: str) -> None:
        self._network = network
        self._context = (
            nullcontext()
            if precision == "float32"
            else torch.autocast(device.type, dtype=getattr(torch, precision))
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with self._context:
            pooled, dense = self._network(images)
        return pooled, dense

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self._network.grid(height, width)
