"""Writes ``report.html`` for a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dse_ext.report.curves import components_figure, training_figure
from dse_ext.report.html import (
    figure_section,
    json_section,
    page,
    table_section,
    text_section,
)
from dse_ext.report.maps import MapColumn, cluster_map_figure
from dse_ext.report.style import png_uri, svg_uri
from dse_ext.report.table import ordinal, summary_lines
from dse_ext.ssl.config import AUTO, TrainConfig
from dse_ext.ssl.scoring import (
    CheckpointScore,
    ScoringData,
    Selection,
    dense_features,
    fit_probe,
)
from dse_ext.ssl.storage import RunFolder, read_lines, save_text

_SHOWN = 6


def write_report(
    folder: RunFolder,
    config: TrainConfig,
    scores: Sequence[CheckpointScore],
    selection: Selection,
    data: ScoringData,
    summary: dict[str, Any],
) -> None:
    """Writes the report of a finished run.

    Args:
        folder: The run's folder; its log and checkpoints are read.
        config: Its configuration.
        scores: One score per checkpoint in the order of training.
        selection: λ, the chosen checkpoints and Kendall's τ.
        data: The images that scores were computed on.
        summary: The content of ``results.json``.
    """
    from dse_ext.ssl.methods import find_method

    rows = read_lines(folder.metrics)
    labelled = data.heldout is not None
    sections = [
        table_section(
            scores, selection, summary_lines(scores, selection, config.start), config.start
        ),
        figure_section(
            "DSE over training",
            "Scores on a fixed set of images that are not augmented. "
            + (
                "mIoU is that of a linear probe on frozen patch features, on held-out scenes. "
                if labelled
                else "There is no mIoU, because the images have no labels. "
            )
            + "Circles mark the checkpoints that DSE chooses.",
            svg_uri(components_figure(scores, selection)),
        ),
        figure_section(
            "Training",
            "Every step faintly, a running median on top. The regularizer's share is the wall "
            "time of its forward and backward pass divided by that of the whole step without "
            "waiting for data.",
            svg_uri(training_figure(rows)),
        ),
        _maps_section(folder, config, selection, data),
        text_section("How this was measured", _method(config, data, summary)),
        json_section("Configuration", config.to_dict()),
    ]
    text = page(
        f"{find_method(config.method).title} with the DSE regularizer",
        f"{config.backbone} on {config.data}, {config.steps} steps of {config.batch_size} images, "
        f"β = {config.dse_weight:g}",
        _tiles(scores, selection, summary, config.start),
        sections,
    )
    save_text(folder.report, text)


def _tiles(
    scores: Sequence[CheckpointScore], selection: Selection, summary: dict[str, Any], start: str
) -> list[tuple[str, str]]:
    by_step = {score.step: score for score in scores}
    first = by_step[selection.chosen[0]]
    tiles = [(f"step {first.step}", "first choice of DSE")]
    if first.miou is not None and scores[0].miou is not None:
        tiles.append((f"{100 * first.miou:.1f} %", "its mIoU on held-out scenes"))
        tiles.append((f"{100 * scores[0].miou:.1f} %", f"mIoU of the {start} network"))
        tau = "-" if selection.kendall_tau is None else f"{selection.kendall_tau:.2f}"
        tiles.append((tau, "Kendall's τ of DSE with mIoU"))
    tiles.append((f"{selection.dim_weight:.2f}", "λ over the checkpoints"))
    tiles.append(
        (f"{100 * summary['training']['dse_share']:.1f} %", "of the step time for the regularizer")
    )
    return tiles


def _method(config: TrainConfig, data: ScoringData, summary: dict[str, Any]) -> list[str]:
    training = summary["training"]
    paragraphs = [
        f"DSE: variant “evaluation”, on the patch features of {len(data.images)} training images "
        f"without augmentation, {config.local_clusters} clusters per image and "
        f"{config.global_clusters} per group, the same random draw for every checkpoint. A "
        "checkpoint is a candidate where its DSE is the maximum among two neighbours on each "
        f"side; the three best candidates are chosen. The {config.start} network takes no part in "
        "λ, the choice and τ.",
        _regularization(config) + f" It took {training['dse_seconds']:.1f} s of "
        f"{training['step_seconds']:.1f} s.",
    ]
    if data.probe is not None and data.heldout is not None:
        paragraphs.append(
            "mIoU: multinomial logistic regression from frozen patch features to the classes, "
            f"fitted on {len(data.probe.images)} labelled training scenes, logits upsampled "
            f"bilinearly, measured on {len(data.heldout.images)} held-out scenes that share no "
            "pixel of a photograph with the training scenes."
        )
    else:
        paragraphs.append("mIoU: none, because the images have no labels.")
    skipped = summary["images"]["skipped"]
    if skipped:
        paragraphs.append("Images that could not be read: " + "; ".join(skipped) + ".")
    return paragraphs


def _regularization(config: TrainConfig) -> str:
    """What was regularized, when and how strongly."""
    from dse_ext.ssl.methods import find_method

    if config.dse_weight == 0:
        return "Regularizer: none."
    what = find_method(config.method).regularizes
    if config.dse_views:
        what += f" ({config.dse_views} of them at most)"
    if config.dse_layer != "last":
        what += f", of layer {config.dse_layer}"
    every = "every step" if config.dse_every == 1 else f"every {ordinal(config.dse_every)} step"
    dim = "λ from the run" if config.dim_weight == AUTO else f"λ = {config.dim_weight:g}"
    warmup = f", β rising over the first {config.dse_warmup:.0%}" if config.dse_warmup else ""
    return (
        f"Regularizer: variant “regularizer” on {what}, at {every}, "
        f"L = L_ssl − {config.dse_weight:g} · DSE, {dim}{warmup}."
    )


@torch.no_grad()
def _maps_section(
    folder: RunFolder, config: TrainConfig, selection: Selection, data: ScoringData
) -> str:
    import dse_ext
    from dse_ext.ssl.run import load_checkpoint

    step = selection.chosen[0]
    backbone = load_checkpoint(config, folder, step)
    # Held-out scenes where there are labels; a whole group, because global clusters are shared.
    images = data.images if data.heldout is None else data.heldout.images
    group = max(config.global_clusters // config.local_clusters, 1)
    images = images[: max(group, _SHOWN)]
    features = dense_features(backbone, images)
    components = dse_ext.dse_components(
        features,
        variant="evaluation",
        local_clusters=config.local_clusters,
        global_clusters=config.global_clusters,
        generator=torch.Generator().manual_seed(config.seed),
    )
    shown = min(_SHOWN, len(images), group)
    columns = [MapColumn("image", [_to_rgb(image) for image in images[:shown]], "image")]
    if data.heldout is not None:
        probe = fit_probe(backbone, data)
        size = (config.image_size, config.image_size)
        truth = data.heldout.labels[:shown].numpy()
        guess = probe.predict(features[:shown], size).numpy()
        columns.append(MapColumn("true labels", list(truth), "classes"))
        columns.append(MapColumn("linear probe", list(guess), "classes"))
    columns.append(MapColumn("local clusters", _grids(components.local_labels[:shown]), "clusters"))
    columns.append(
        MapColumn("global clusters", _grids(components.global_labels[:shown]), "clusters")
    )
    return figure_section(
        "Cluster maps",
        f"The clusters that DSE is made of, at step {step}. Local clusters are found in each "
        "image by itself, so their colours mean nothing from one image to the next; global "
        f"clusters are shared by the {min(group, len(images))} images of a group, and a colour "
        "means the same cluster in all of them.",
        png_uri(cluster_map_figure(columns, data.classes)),
    )


def _to_rgb(image: Tensor) -> npt.NDArray[np.uint8]:
    from lightly.transforms.utils import IMAGENET_NORMALIZE

    pixels = image.permute(1, 2, 0).numpy()
    pixels = pixels * np.array(IMAGENET_NORMALIZE["std"]) + np.array(IMAGENET_NORMALIZE["mean"])
    return np.asarray(np.rint(pixels.clip(0, 1) * 255), dtype=np.uint8)


def _grids(labels: Tensor) -> list[npt.NDArray[np.int64]]:
    side = round(labels.shape[1] ** 0.5)
    return list(labels.cpu().reshape(-1, side, side).numpy())
