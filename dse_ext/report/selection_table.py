"""Tables of a selection for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dse_ext.report.table import ordinal
from dse_ext.selection import METRICS, Gain, RunSelection, SelectionEvaluation

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

SIGNS = (
    "τ-b over the checkpoints of a run; positive: higher values go with a higher mIoU. "
    "No metric has its sign turned, α-ReQ included."
)
"""The convention of every τ that is shown."""

# Runs of more checkpoints are shown by their best candidates and their last checkpoint.
_ROWS = 24


def selection_table(
    selection: RunSelection, miou: Mapping[str, npt.NDArray[np.float64]] | None = None
) -> Table:
    """Lays out a run's checkpoints with DSE, its parts, the mIoU where known, and the choice.

    Args:
        selection: The run with its choice.
        miou: The mIoU in [0, 1] of its checkpoints, one vector a data set.

    Returns:
        A rich table; of a long run it has the candidates and the last checkpoint alone.
    """
    from rich.markup import escape

    run, result = selection.run, selection.result
    count = len(run.checkpoints)
    shown = list(range(count))
    title = f"[bold]{escape(run.run)}[/]"
    if count > _ROWS:
        shown = sorted({*result.candidates[: _ROWS - 1], count - 1})
        title += f", {len(shown)} of {count} checkpoints: local maxima of DSE, and the last"
    table = _table(title)
    for name in ("checkpoint", "epoch", "M_inter\n−M_intra", "M_dim", "DSE"):
        table.add_column(name, justify="left" if name == "checkpoint" else "right")
    for name in miou or {}:
        table.add_column(escape(name) + "\n%", justify="right")
    table.add_column("chosen")
    for i in shown:
        place = result.chosen.index(i) + 1 if i in result.chosen else None
        table.add_row(
            escape(run.checkpoints[i]),
            str(run.epochs[i]),
            _decimal(run.metrics["class_relevance"][i], 4),
            _decimal(run.metrics["m_dim"][i], 4),
            _decimal(result.scores[i], 4),
            *(_decimal(100 * values[i], 2) for values in (miou or {}).values()),
            ordinal(place) if place else "maximum" if i in result.candidates else "",
            style="bold green" if place else None,
        )
    return table


def kendall_table(evaluation: SelectionEvaluation) -> Table:
    """Kendall's τ with mIoU: one row a run, one column a metric, one section a data set.

    Args:
        evaluation: The comparison with the true quality.

    Returns:
        A rich table; means over runs and over data sets where there are several of them.
    """
    from rich.markup import escape

    table = _table("[bold]Kendall's τ with mIoU[/]")
    table.add_column("data set")
    table.add_column("run")
    for metric in evaluation.metrics:
        table.add_column(METRICS[metric].replace("−", "\n−"), justify="right")
    several = len(evaluation.runs) > 1
    for dataset in evaluation.datasets:
        for run in evaluation.runs:
            taus = [evaluation.tau(run, dataset, metric) for metric in evaluation.metrics]
            table.add_row(escape(dataset), escape(run), *_best_bold(taus))
        if several:
            means = [evaluation.mean_tau(m, dataset=dataset) for m in evaluation.metrics]
            table.add_row(escape(dataset), "mean", *_best_bold(means), style="italic")
        table.add_section()
    if len(evaluation.datasets) > 1:
        for run in evaluation.runs:
            means = [evaluation.mean_tau(m, run=run) for m in evaluation.metrics]
            table.add_row("mean", escape(run), *_best_bold(means), style="italic")
        if several:
            means = [evaluation.mean_tau(m) for m in evaluation.metrics]
            table.add_row("mean", "mean", *_best_bold(means), style="italic")
    return table


def gain_table(evaluation: SelectionEvaluation) -> Table:
    """MIoU of the last checkpoint, and what DSE's choice and the best checkpoint gain over it.

    Args:
        evaluation: The comparison with the true quality.

    Returns:
        A rich table, one row a data set and run, in percent and points; with means where there
        are several.
    """
    from rich.markup import escape

    table = _table("[bold]mIoU in %, and gain over the last checkpoint[/]")
    for name in ("data set", "run"):
        table.add_column(name)
    for name in ("last", "DSE's first", "best of selected", "oracle"):
        table.add_column(name, justify="right")
    for dataset in evaluation.datasets:
        gains = [gain for gain in evaluation.gains if gain.dataset == dataset]
        for gain in gains:
            table.add_row(escape(dataset), escape(gain.run), *_gain_cells([gain]))
        if len(gains) > 1:
            table.add_row(escape(dataset), "mean", *_gain_cells(gains), style="italic")
        table.add_section()
    if len({gain.dataset for gain in evaluation.gains}) > 1:
        table.add_row("mean", "mean", *_gain_cells(evaluation.gains), style="italic")
    return table


def _gain_cells(gains: Sequence[Gain]) -> list[str]:
    def mean(name: str) -> float:
        return 100 * float(np.mean([getattr(gain, name) for gain in gains]))

    cells = [f"{mean('last'):.2f}"]
    for name in ("first_choice", "selected", "oracle"):
        cells.append(f"{mean(name):.2f} ({mean(name + '_gain'):+.2f})")
    return cells


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)


def print_table(console: Console, table: Table) -> None:
    """Prints a table at its full width: a figure that is cut off is worse than a wrapped line.

    Args:
        console: Where to.
        table: The table.
    """
    console.print(_FullWidth(table), crop=False)


class _FullWidth:
    """Renders a table as wide as it needs to be, where rich would shorten its cells."""

    def __init__(self, table: Table) -> None:
        self.table = table
        for column in table.columns:
            column.no_wrap = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(width=10_000)
        width = console.measure(self.table, options=unbounded).maximum
        yield from console.render(self.table, options.update(width=width))


def _decimal(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def _best_bold(taus: Sequence[float | None]) -> list[str]:
    known = [round(tau, 2) for tau in taus if tau is not None]
    cells = []
    for tau in taus:
        if tau is None:
            cells.append("-")
        else:
            text = f"{tau:.2f}"
            cells.append(f"[bold]{text}[/]" if round(tau, 2) == max(known) else text)
    return cells
