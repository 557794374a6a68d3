"""The figure of a run: ratios to the peers, growth with each axis, shares of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dse_ext.bench.operation import OURS
from dse_ext.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RC, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bench_figure"]

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, MUTED)
_MARKS = "os^DvPX"


def bench_figure(results: dict[str, Any]) -> Figure:
    """Draws the results of a run.

    Args:
        results: What `dse_ext.bench.run.Run.results` returned, with one ratio at least.

    Returns:
        A figure of up to three panels.

    Raises:
        ValueError: If there is no ratio to show.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["part"] == "operations" and row["ratio"]]
    if not rows:
        raise ValueError("there is no ratio to a peer to show.")
    panels: list[Any] = ["ratios"]
    panels += ["scaling"] if results["scaling"] else []
    panels += ["shares"] if results["shares"] else []
    widths = {"ratios": 2.2, "scaling": 1.5, "shares": 0.8}
    with matplotlib.rc_context({**RC, "mathtext.default": "regular"}):
        figure = Figure(
            figsize=(1.2 + 3.6 * sum(widths[name] for name in panels), 1.4 + 0.34 * len(rows)),
            layout="constrained",
        )
        axes = figure.subplot_mosaic([panels], width_ratios=[widths[name] for name in panels])
        _ratios(axes["ratios"], rows, results["titles"])
        if "scaling" in axes:
            _scaling(axes["scaling"], results["scaling"], results["titles"])
        if "shares" in axes:
            _shares(axes["shares"], results["shares"])
        facts = results["machine"]
        figure.suptitle(
            f"{facts.get('gpu') or facts['cpu']}, {facts['threads']} threads, "
            f"torch {facts['torch']}, dse-ext {facts['dse_ext']}",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
    return figure


def _ratios(axis: Axes, rows: Sequence[dict[str, Any]], titles: dict[str, dict[str, str]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    names = {key: titles[row["operation"]][key] for row in rows for key in row["ratio"]}
    for number, (key, name) in enumerate(names.items()):
        points = [(row["ratio"][key], y) for y, row in enumerate(rows) if key in row["ratio"]]
        mark, colour = _MARKS[number % len(_MARKS)], _COLOURS[number % len(_COLOURS)]
        axis.plot(*zip(*points, strict=True), mark, color=colour, label=name, alpha=0.9)
    axis.set_yticks(
        range(len(rows)),
        [f"{r['operation']} {r['mode']} ({', '.join(map(str, r['shape']))})" for r in rows],
        fontsize=7.5,
    )
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.axvline(1, color=INK, linewidth=1)
    axis.set(title="Time of a peer over that of dse-ext", xlabel="right of 1×: dse-ext is faster")
    axis.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)


def _scaling(axis: Axes, fits: Sequence[dict[str, Any]], titles: dict[str, dict[str, str]]) -> None:
    own = [fit for fit in fits if fit["implementation"] == OURS]
    for fit, colour, mark in zip(own, _COLOURS, _MARKS, strict=False):
        sizes, times = fit["sizes"], fit["median_ms"]
        error = "" if fit["error"] is None else f" ± {fit['error']:.2f}"
        axis.plot(
            [size / sizes[0] for size in sizes],
            [time / times[0] for time in times],
            f"{mark}-",
            color=colour,
            label=f"{fit['axis']} from {sizes[0]}: {fit['exponent']:.2f}{error}",
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set(
        title="Growth of a training step, with exponents",
        xlabel="size over the smallest",
        ylabel="time over the smallest's",
    )
    axis.legend(fontsize=7.5)


def _shares(axis: Axes, shares: Sequence[dict[str, Any]]) -> None:
    names = [f"{share['model']}\n{share['images']} images" for share in shares]
    values = [100 * share["share"] for share in shares]
    axis.set_axisbelow(True)
    bars = axis.bar(names, values, color=BLUE, width=0.6)
    axis.bar_label(bars, fmt="%.1f %%", fontsize=8)
    axis.set(title="Share of a step", ylabel="dse-ext, %")
    axis.tick_params(axis="x", labelsize=7.5)
