"""Figures over the course of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dse_ext.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RC, RED
from dse_ext.ssl.scoring import CheckpointScore, Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def components_figure(scores: Sequence[CheckpointScore], selection: Selection) -> Figure:
    """DSE's components, DSE and mIoU over training, and DSE against mIoU.

    Args:
        scores: One score per checkpoint in the order of training.
        selection: λ and the chosen checkpoints.

    Returns:
        A figure with three panels, two without labels.
    """
    import matplotlib
    from matplotlib.figure import Figure

    labelled = all(score.miou is not None for score in scores)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(12.6 if labelled else 8.6, 3.6), layout="constrained")
        axes = figure.subplots(1, 3 if labelled else 2)
        _components(axes[0], scores)
        _dse_and_quality(axes[1], scores, selection, labelled)
        if labelled:
            _scatter(axes[2], scores, selection)
    return figure


def _components(axis: Axes, scores: Sequence[CheckpointScore]) -> None:
    steps = [score.step for score in scores]
    series = {
        "M inter": ([score.m_inter for score in scores], BLUE, "o-"),
        "M intra, image": ([score.m_intra_image for score in scores], ORANGE, "s-"),
        "M intra, batch": ([score.m_intra_batch for score in scores], RED, "D-"),
        "M dim": ([score.m_dim for score in scores], GREEN, "^-"),
    }
    for name, (values, colour, mark) in series.items():
        axis.plot(steps, values, mark, color=colour, label=name)
    axis.set(title="Components of DSE", xlabel="step")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, ncols=2)


def _dse_and_quality(
    axis: Axes, scores: Sequence[CheckpointScore], selection: Selection, labelled: bool
) -> None:
    steps = [score.step for score in scores]
    dse = [score.dse(selection.dim_weight) for score in scores]
    lines = axis.plot(steps, dse, "o-", color=PURPLE, label="DSE")
    chosen = [index for index, step in enumerate(steps) if step in selection.chosen]
    lines += axis.plot(
        [steps[i] for i in chosen],
        [dse[i] for i in chosen],
        "o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor=RED,
        markeredgewidth=2,
        label="chosen",
    )
    axis.set_xlabel("step")
    axis.set_ylabel("DSE", color=PURPLE)
    axis.set_title("DSE of each checkpoint")
    if labelled:
        right = axis.twinx()
        right.grid(False)
        right.spines["right"].set_visible(True)
        lines += right.plot(
            steps, _percent(scores), "s--", color=INK, markersize=4, label="mIoU (true quality)"
        )
        right.set_ylabel("mIoU, %")
        axis.set_title("DSE and true dense quality")
    axis.legend(handles=lines, fontsize=8, loc="lower right")


def _scatter(axis: Axes, scores: Sequence[CheckpointScore], selection: Selection) -> None:
    trained = [score for score in scores if score.step > 0]
    for score, miou in zip(trained, _percent(trained), strict=True):
        dse = score.dse(selection.dim_weight)
        chosen = score.step in selection.chosen
        axis.plot(dse, miou, "o", color=RED if chosen else BLUE)
        axis.annotate(
            str(score.step),
            (dse, miou),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=7,
            color=MUTED,
        )
    title = "DSE against mIoU"
    if selection.kendall_tau is not None:
        title += f"   (Kendall τ = {selection.kendall_tau:.2f})"
    axis.set(title=title, xlabel="DSE", ylabel="mIoU, %")
    axis.margins(0.12)


def _percent(scores: Sequence[CheckpointScore]) -> list[float]:
    return [100 * score.miou for score in scores if score.miou is not None]


def training_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Loss, the regularizer's components and its share of the step time over training.

    Args:
        rows: The log, one row per step.

    Returns:
        A figure with three panels, one if the run had no regularizer.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Rows of the steps that DSE took part in.
    with_dse = [row for row in rows if "dse" in row]
    regularized = bool(with_dse)
    steps = [row["step"] for row in rows]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(12.6 if regularized else 4.4, 3.2), layout="constrained")
        axes = figure.subplots(1, 3 if regularized else 1, squeeze=False)[0]
        _smoothed(axes[0], steps, [row["ssl_loss"] for row in rows], BLUE, "loss")
        axes[0].set(title="Self-supervised loss", xlabel="step")
        if regularized:
            for key, name, colour in (
                ("m_inter", "M inter", BLUE),
                ("m_intra_image", "M intra, image", ORANGE),
                ("m_intra_batch", "M intra, batch", RED),
                ("m_dim", "M dim", GREEN),
            ):
                _smoothed(
                    axes[1],
                    [row["step"] for row in with_dse],
                    [row[key] for row in with_dse],
                    colour,
                    name,
                )
            axes[1].set(title="Regularizer's components (student)", xlabel="step")
            axes[1].set_ylim(bottom=0)
            axes[1].legend(fontsize=8, ncols=2)
            share = [100 * row["dse_seconds"] / row["step_seconds"] for row in rows]
            _smoothed(axes[2], steps, share, PURPLE, "share")
            axes[2].set(title="Regularizer's share of the step time, %", xlabel="step")
            axes[2].set_ylim(bottom=0)
    return figure


def _smoothed(
    axis: Axes, steps: Sequence[int], values: Sequence[float], colour: str, name: str
) -> None:
    """Single values faintly, a running median over about a thirtieth of the run on top."""
    import numpy as np

    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    half = max(len(values) // 60, 1)
    median = [float(np.median(values[max(i - half, 0) : i + half + 1])) for i in range(len(values))]
    axis.plot(steps, median, color=colour, label=name)
