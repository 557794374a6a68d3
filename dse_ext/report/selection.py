"""The figure of a run's selection: DSE, its parts and the true quality, with what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

    The chosen checkpoints are ringed in the panels of DSE and of mIoU, with their places, and a
    thin line leads the eye through all panels.

    Args:
        selection: The run with its choice.
        miou: The mIoU in [0, 1] of its checkpoints, one vector a data set.
        taus: τ of DSE with mIoU by data set, for the legend.

    Returns:
        A figure of six panels, five without mIoU. Each has a scale of its own, because the parts
        of DSE differ more from each other than they change over a run.
    """
    import matplotlib
    from matplotlib.figure import Figure

    run, result = selection.run, selection.result
    with matplotlib.rc_context({**RC, "mathtext.default": "regular"}):
        figure = Figure(figsize=(13.2, 5.6), layout="constrained")
        panels: list[Any] = [["dse", "class_relevance", "miou"], ["m_inter", "m_intra", "m_dim"]]
        if not miou:
            panels[0] = ["dse", "dse", "class_relevance"]
        axes = figure.subplot_mosaic(panels)
        for axis in axes.values():
            for index in result.chosen:
                axis.axvline(run.epochs[index], color=RED, linewidth=1.0, alpha=0.4, zorder=1.6)
            axis.margins(x=0.03)
            _whole_epochs(axis, selection)
        _dse(axes["dse"], selection)
        _parts(axes, selection)
        if miou:
            _quality(axes["miou"], selection, miou, taus or {})
        for name in panels[1]:
            axes[name].set_xlabel("epoch")
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


def _parts(axes: Mapping[str, Axes], selection: RunSelection) -> None:
    panels = {
        "class_relevance": (
            r"Class relevance, $M_\mathrm{inter}$ − $M_\mathrm{intra}$",
            (("class_relevance", "", INK, "o-"),),
        ),
        "m_inter": (
            r"Separation of clusters, $M_\mathrm{inter}$",
            (("m_inter", "", BLUE, "o-"),),
        ),
        "m_intra": (
            r"Spread within clusters, $M_\mathrm{intra}$",
            (
                ("m_intra_image", "of an image", ORANGE, "s-"),
                ("m_intra_batch", "of a group of images", RED, "D-"),
                ("m_intra", "mean of both", INK, "--"),
            ),
        ),
        "m_dim": (
            r"Effective dimensionality, $M_\mathrm{dim}$",
            (("m_dim", "", GREEN, "^-"),),
        ),
    }
    run = selection.run
    for panel, (title, lines) in panels.items():
        axis = axes[panel]
        axis.set_title(title)
        for name, label, colour, mark in lines:
            if name in run.metrics:
                axis.plot(
                    run.epochs,
                    run.metrics[name],
                    mark,
                    color=colour,
                    label=label,
                    markersize=_mark_size(selection),
                )
        if len(axis.lines) > len(selection.result.chosen) + 1:
            axis.legend(fontsize=8, loc="best")
        elif len(axis.lines) == len(selection.result.chosen):
            axis.text(0.5, 0.5, "not in the results", ha="center", transform=axis.transAxes)


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
