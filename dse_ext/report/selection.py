"""The figure of a run's selection: DSE, its parts and the true quality, with what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dse_ext.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RC, RED
from dse_ext.selection import KendallTau, RunSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Vector = npt.NDArray[np.float64]

_DATASET_COLOURS = (INK, BLUE, ORANGE, GREEN, PURPLE, MUTED)
_MARKS = "os^Dv*"


def selection_figure(
    selection: RunSelection,
    miou: Mapping[str, Vector] | None = None,
    taus: Mapping[str, KendallTau] | None = None,
) -> Figure:
    """DSE over the checkpoints of a run, its parts, and the mIoU where it is known.

    The chosen checkpoints are ringed in the panel of DSE and of mIoU, with their places, and a
    thin line leads the eye through all panels.

    Args:
        selection: The run with its choice.
        miou: The mIoU in [0, 1] of its checkpoints, one vector a data set.
        taus: τ of DSE with mIoU by data set, for the legend.

    Returns:
        A figure of four panels, three without mIoU.
    """
    import matplotlib
    from matplotlib.figure import Figure

    run, result = selection.run, selection.result
    with matplotlib.rc_context({**RC, "mathtext.default": "regular"}):
        if miou:
            figure = Figure(figsize=(10.4, 5.8), layout="constrained")
            axes = list(figure.subplots(2, 2, sharex=True).flat)
            axes = [axes[0], axes[2], axes[3], axes[1]]
        else:
            figure = Figure(figsize=(12.6, 3.4), layout="constrained")
            axes = list(figure.subplots(1, 3, sharex=True).flat)
        for axis in axes:
            for index in result.chosen:
                axis.axvline(run.epochs[index], color=RED, linewidth=1.0, alpha=0.35, zorder=0)
        _dse(axes[0], selection)
        _class_relevance(axes[1], selection)
        axes[2].plot(
            run.epochs, run.metrics["m_dim"], "^-", color=GREEN, markersize=_mark_size(selection)
        )
        axes[2].set_title(r"Dimensionality, $M_\mathrm{dim}$")
        if miou:
            _quality(axes[3], selection, miou, taus or {})
        for axis in axes if not miou else axes[1:3]:
            axis.set_xlabel("epoch")
        for axis in axes:
            axis.margins(x=0.03)
        _whole_epochs(axes[0], selection)
        figure.suptitle(
            f"{run.run}: {len(run.checkpoints)} checkpoints, λ = {result.dim_weight:.3g}"
            + ("" if result.dim_weight_computed else " (not computed from the run)"),
            x=0.01,
            ha="left",
            fontsize=11.5,
            fontweight="bold",
        )
    return figure


def _mark_size(selection: RunSelection) -> float:
    """Smaller marks where they would run into each other."""
    return 4.5 if len(selection.run.epochs) <= 30 else 2.5


def _dse(axis: Axes, selection: RunSelection) -> None:
    run, result = selection.run, selection.result
    axis.plot(run.epochs, result.scores, "o-", color=PURPLE, markersize=_mark_size(selection))
    _ring(axis, selection, np.array(result.scores), label=True)
    axis.set_title(r"DSE = $M_\mathrm{inter}$ − $M_\mathrm{intra}$ + λ · $M_\mathrm{dim}$")
    axis.margins(y=0.16)
    axis.legend(loc="best", fontsize=8)


def _ring(axis: Axes, selection: RunSelection, values: Vector, label: bool) -> None:
    chosen = [i for i in selection.result.chosen if np.isfinite(values[i])]
    axis.plot(
        [selection.run.epochs[i] for i in chosen],
        values[chosen],
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=RED,
        markeredgewidth=1.8,
        label="chosen, best first" if label else None,
    )
    if not label:
        return
    for place, index in enumerate(selection.result.chosen, start=1):
        axis.annotate(
            str(place),
            (selection.run.epochs[index], values[index]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            fontsize=9,
            fontweight="bold",
            color=RED,
        )


def _class_relevance(axis: Axes, selection: RunSelection) -> None:
    run = selection.run
    parts = (
        ("m_inter", r"$M_\mathrm{inter}$", BLUE, "o-"),
        ("m_intra_image", r"$M_\mathrm{intra}$, image", ORANGE, "s--"),
        ("m_intra_batch", r"$M_\mathrm{intra}$, batch", RED, "D--"),
        ("class_relevance", r"$M_\mathrm{inter}$ − $M_\mathrm{intra}$", INK, "-"),
    )
    for name, label, colour, mark in parts:
        if name in run.metrics:
            axis.plot(
                run.epochs,
                run.metrics[name],
                mark,
                color=colour,
                label=label,
                markersize=_mark_size(selection),
            )
    axis.set_title(r"Class relevance, $M_\mathrm{inter}$ − $M_\mathrm{intra}$")
    axis.margins(y=0.28)
    axis.legend(fontsize=8, ncols=2, loc="upper center")


def _quality(
    axis: Axes,
    selection: RunSelection,
    miou: Mapping[str, Vector],
    taus: Mapping[str, KendallTau],
) -> None:
    epochs = np.array(selection.run.epochs)
    for number, (name, values) in enumerate(miou.items()):
        label = name
        tau = taus[name].tau if name in taus else None
        if tau is not None:
            label += f"  (τ of DSE = {tau:.2f})"
        colour = _DATASET_COLOURS[number % len(_DATASET_COLOURS)]
        mark = _MARKS[number % len(_MARKS)]
        known = np.isfinite(values)
        axis.plot(
            epochs[known],
            100 * values[known],
            mark + "-",
            color=colour,
            label=label,
            markersize=_mark_size(selection),
        )
        _ring(axis, selection, 100 * values, label=False)
    axis.set_title("True dense quality, mIoU in %")
    axis.margins(y=0.16)
    axis.legend(fontsize=8, loc="best")


def _whole_epochs(axis: Axes, selection: RunSelection) -> None:
    from matplotlib.ticker import MaxNLocator

    if all(epoch == int(epoch) for epoch in selection.run.epochs):
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
