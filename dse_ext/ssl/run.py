"""A whole run: train, score the checkpoints, select, report."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dse_ext.data import ImageFolder, ImageSource, TextureScenes
from dse_ext.ssl.backbone import DenseBackbone, create_backbone
from dse_ext.ssl.config import MACHINE_OPTIONS, TEXTURE_SCENES, ConfigError, TrainConfig
from dse_ext.ssl.device import choose_device
from dse_ext.ssl.progress import each, training_progress
from dse_ext.ssl.scoring import (
    CheckpointScore,
    ScoringData,
    Selection,
    score_checkpoint,
    select,
)
from dse_ext.ssl.storage import (
    RunFolder,
    append_line,
    load_tensors,
    read_lines,
    save_text,
    write_lines,
)
from dse_ext.ssl.trainer import Trainer, use_threads

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run.

    Attributes:
        config: Its configuration.
        scores: One score per checkpoint, the untrained network first.
        selection: λ, the chosen checkpoints and Kendall's τ.
        results: Path of ``results.json``.
        report: Path of ``report.html``; None where none was asked for.
        summary: The content of ``results.json``.
    """

    config: TrainConfig
    scores: tuple[CheckpointScore, ...]
    selection: Selection
    results: Path
    report: Path | None
    summary: dict[str, Any]


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Trains a network with the DSE regularizer, scores its checkpoints and writes a report.

    A run that is interrupted at any moment, or killed, is continued with ``resume=True`` and
    ends in the same networks and scores: on the CPU with the same number of threads bitwise.

    Args:
        config: What to do.
        out: Folder for everything that is written.
        resume: Continue the run in ``out``; if there is none, start it.
        overwrite: Delete a run that is in ``out`` and start again.
        report: Write ``report.html``, which takes a few seconds.
        console: Where progress and the table are printed; None prints nothing.

    Returns:
        Scores, selection and where the report is.

    Raises:
        ConfigError: If the configuration cannot be run, or ``out`` holds another run.
        NoImagesError: If the folder of images has none, or none that can be read.
        NotADirectoryError: If it does not exist.
        Interrupted: If SIGINT or SIGTERM arrived; the state has been saved.
        TrainingDiverged: If the loss became infinite or NaN.

    Examples:
        >>> from dse_ext.ssl import PRESETS, TrainConfig, train
        >>> result = train(TrainConfig(**PRESETS["demo"]), "runs/demo")
        >>> result.selection.chosen
        (270, 210)
    """
    from rich.console import Console

    from dse_ext.report import checkpoint_table, summary_lines, write_report

    console = console or Console(quiet=True)
    folder = RunFolder(out)
    device = choose_device(config.device)
    source = open_source(config)
    config = _prepare_folder(folder, config.for_images(len(source)), resume, overwrite)
    started = time.perf_counter()
    with use_threads(config):
        _train(config, folder, source, device, console)
        data = ScoringData(config, source)
        for message in data.skipped:
            console.print(f"[yellow]skipped:[/] {message}", highlight=False)
        scores = _score(config, folder, device, data, console)
        selection = select(scores)
        summary = _summary(config, folder, scores, selection, data, device)
        summary["seconds"] = time.perf_counter() - started
        save_text(folder.results, json.dumps(summary, indent=2) + "\n")
        if report:
            write_report(folder, config, scores, selection, data, summary)
    console.print(checkpoint_table(scores, selection, config.start))
    for line in summary_lines(scores, selection, config.start):
        console.print(line, highlight=False)
    share = 100 * summary["training"]["dse_share"]
    console.print(f"regularizer: {share:.1f} % of the training step time", highlight=False)
    if skipped := summary["training"]["skipped_steps"]:
        console.print(f"skipped: {skipped} steps whose gradient was not finite", highlight=False)
    if report:
        console.print(f"report:  {folder.report}", highlight=False, soft_wrap=True)
    console.print(f"results: {folder.results}", highlight=False, soft_wrap=True)
    written = folder.report if report else None
    return RunResult(config, tuple(scores), selection, folder.results, written, summary)


def open_source(config: TrainConfig) -> ImageSource:
    """Opens the images that a configuration names.

    Raises:
        NoImagesError: If a folder holds no image.
        NotADirectoryError: If there is no such folder.
    """
    if config.data == TEXTURE_SCENES:
        return TextureScenes(config.train_images, config.image_size, seed=config.seed, cache=True)
    if not Path(config.data).is_dir():
        raise NotADirectoryError(
            f"data must be {TEXTURE_SCENES!r} or a folder of images; {config.data!r} is neither."
        )
    return ImageFolder(config.data)


def load_checkpoint(config: TrainConfig, folder: RunFolder, step: int) -> DenseBackbone:
    """Loads the network that a run kept after a number of steps.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        step: One of ``config.checkpoint_steps()``.

    Returns:
        The network in evaluation mode, on the CPU.
    """
    backbone = create_backbone(
        config.backbone, config.image_size, config.patch_size, config.backbone_args
    )
    backbone.model.load_state_dict(load_tensors(folder.checkpoint(step))["state_dict"])
    return backbone.eval()


def _prepare_folder(
    folder: RunFolder, config: TrainConfig, resume: bool, overwrite: bool
) -> TrainConfig:
    """Makes the folder ready; a run that is in it is continued only if it is the same one."""
    if overwrite and folder.config.is_file():
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        for path in (
            folder.config,
            folder.metrics,
            folder.scores,
            folder.state,
            folder.results,
            folder.report,
        ):
            path.unlink(missing_ok=True)
    if folder.config.is_file():
        kept = TrainConfig.load(folder.config)
        if not resume:
            raise ConfigError(
                f"{folder.root} already holds a run: continue it with --resume, start again with "
                "--overwrite, or choose another --out."
            )
        for name, value in config.to_dict().items():
            if name not in MACHINE_OPTIONS and value != kept.to_dict()[name]:
                raise ConfigError(
                    f"the run in {folder.root} has {name} = {kept.to_dict()[name]!r}, which "
                    f"cannot be changed to {value!r} half-way; choose another --out."
                )
        return config
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    config.save(folder.config)
    return config


def _train(
    config: TrainConfig,
    folder: RunFolder,
    source: ImageSource,
    device: torch.device,
    console: Console,
) -> None:
    trainer = Trainer(config, folder, source, device)
    if trainer.resume():
        console.print(f"continuing after step {trainer.step} of {config.steps}", highlight=False)
    else:
        write_lines(folder.metrics, [])
    if trainer.step == config.steps:
        return
    with training_progress(console, trainer.step, config.steps, config.batch_size) as display:
        trainer.run(display)


def _score(
    config: TrainConfig,
    folder: RunFolder,
    device: torch.device,
    data: ScoringData,
    console: Console,
) -> list[CheckpointScore]:
    """Scores every checkpoint that has no score yet."""
    rows = read_lines(folder.scores)
    write_lines(folder.scores, rows)  # without a line that a crash cut off
    scores = {row["step"]: CheckpointScore.from_dict(row) for row in rows}
    missing = [step for step in config.checkpoint_steps() if step not in scores]
    for step in each(console, missing, "scoring checkpoints") if missing else ():
        backbone = load_checkpoint(config, folder, step).to(device)
        scores[step] = score_checkpoint(backbone, step, data, config)
        append_line(folder.scores, scores[step].to_dict())
    return [scores[step] for step in config.checkpoint_steps()]


def _summary(
    config: TrainConfig,
    folder: RunFolder,
    scores: list[CheckpointScore],
    selection: Selection,
    data: ScoringData,
    device: torch.device,
) -> dict[str, Any]:
    """The content of ``results.json``."""
    import dse_ext

    rows = read_lines(folder.metrics)
    step_seconds = sum(row["step_seconds"] for row in rows)
    dse_seconds = sum(row["dse_seconds"] for row in rows)
    data_seconds = sum(row["data_seconds"] for row in rows)
    skipped = dict.fromkeys(data.skipped)
    for row in rows:
        skipped.update(dict.fromkeys(row["skipped"]))
    return {
        "dse_ext": dse_ext.__version__,
        "torch": str(torch.__version__),
        "device": str(device),
        "config": config.to_dict(),
        "classes": list(data.classes),
        "images": {
            "dse": len(data.images),
            "probe": 0 if data.probe is None else len(data.probe.images),
            "heldout": 0 if data.heldout is None else len(data.heldout.images),
            "skipped": list(skipped),
        },
        "lambda": selection.dim_weight,
        "lambda_computed": selection.dim_weight_computed,
        "kendall_tau": selection.kendall_tau,
        "kendall_p_value": selection.p_value,
        "chosen": list(selection.chosen),
        "checkpoints": [
            {
                "step": score.step,
                "path": folder.checkpoint(score.step).relative_to(folder.root).as_posix(),
                "m_inter": score.m_inter,
                "m_intra_image": score.m_intra_image,
                "m_intra_batch": score.m_intra_batch,
                "m_intra": score.m_intra,
                "m_dim": score.m_dim,
                "dse": score.dse(selection.dim_weight),
                "miou": score.miou,
                "pixel_accuracy": score.pixel_accuracy,
                "class_iou": None
                if score.class_iou is None
                else [None if math.isnan(iou) else iou for iou in score.class_iou],
                "chosen": score.step in selection.chosen,
            }
            for score in scores
        ],
        "training": {
            "steps": len(rows),
            "skipped_steps": sum(row.get("step_skipped", False) for row in rows),
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "dse_seconds": dse_seconds,
            "dse_share": dse_seconds / step_seconds if step_seconds else 0.0,
            "images_per_second": len(rows) * config.batch_size / (step_seconds + data_seconds)
            if rows
            else 0.0,
            "final_loss": rows[-1]["ssl_loss"] if rows else None,
        },
    }
