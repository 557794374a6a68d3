"""Tables and figure of `benchmarks/sdd_experiment.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dse_ext.report.style import BLUE, INK, MUTED, ORANGE, RC
from dse_ext.selection import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

MEAN = "mean of methods"

QUALITIES: Mapping[str, str] = {
    "untrained": "untrained",
    "last": "last",
    "best": "best",
    "first_choice": "DSE's first",
    "selected": "best of DSE's three",
}
"""Which mIoU of a run is reported, with the name it is shown by."""

EFFECTS: Mapping[str, str] = {
    "last": "last mIoU",
    "best": "best mIoU",
    "selected": "mIoU of the best of DSE's three",
    "dse": "last DSE (λ = 1)",
}
"""What the regularizer may change."""


def plain_dse(checkpoint: Mapping[str, Any]) -> float | None:
    """DSE with λ = 1: what training raises, and the same scale for all runs."""
    parts = checkpoint["class_relevance"], checkpoint["m_dim"]
    return None if None in parts else float(sum(parts))


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation and number of the values that are defined."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds.

    The rows of :data:`MEAN` are of the seeds too: first the mean over methods for each seed, then
    mean and spread of these. A run that diverged has no figure and is counted.

    Args:
        runs: What was measured of each run.

    Returns:
        ``quality`` and ``tau`` with a row for each method and weight, ``effect`` with a row for
        each method and weight above 0 (differences within a seed), and ``diverged``.
    """
    methods = list(dict.fromkeys(run["method"] for run in runs))
    weights = list(dict.fromkeys(run["dse_weight"] for run in runs))
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    by_key = {
        (run["method"], run["dse_weight"], run["seed"]): run
        for run in runs
        if run["diverged"] is None
    }

    def rows(
        wanted: Iterable[float], names: Iterable[str], value: Callable[[tuple[Any, ...], str], Any]
    ) -> list[dict[str, Any]]:
        names = list(names)
        result = []
        for weight in wanted:
            for group, members in [*((m, [m]) for m in methods), (MEAN, methods)]:
                row: dict[str, Any] = {"method": group, "dse_weight": weight}
                for name in names:
                    per_seed = [
                        spread(value((method, weight, seed), name) for method in members)["mean"]
                        for seed in seeds
                    ]
                    row[name] = spread(per_seed)
                result.append(row)
        return result

    def of_run(part: str) -> Callable[[tuple[Any, ...], str], Any]:
        return lambda key, name: by_key[key][part][name] if key in by_key else None

    def effect(key: tuple[Any, ...], name: str) -> float | None:
        method, _, seed = key
        pair = by_key.get(key), by_key.get((method, 0.0, seed))
        if pair[0] is None or pair[1] is None:
            return None
        if name == "dse":
            after, before = (plain_dse(run["checkpoints"][-1]) for run in pair if run)
        else:
            after, before = (run["miou"][name] for run in pair if run)
        return None if after is None or before is None else float(after - before)

    return {
        "quality": rows(weights, QUALITIES, of_run("miou")),
        "tau": rows(weights, METRICS, of_run("tau")),
        "effect": rows([w for w in weights if w], EFFECTS, effect),
        "diverged": [
            {key: run[key] for key in ("method", "dse_weight", "seed", "diverged")}
            for run in runs
            if run["diverged"] is not None
        ],
    }


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: What it shows.
        header: Names of the columns; the first two are text.
        rows: The cells.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report, for a terminal and for Markdown."""
    summary = report["summary"]

    def table(
        title: str, part: str, columns: Mapping[str, str], show: Callable[[str, Any], str]
    ) -> Table:
        rows = tuple(
            (
                row["method"],
                f"{row['dse_weight']:g}",
                *(show(name, row[name]) for name in columns),
            )
            for row in summary[part]
        )
        return Table(title, ("method", "β", *columns.values()), rows)

    seeds = len(report["plan"]["seeds"])
    over = f"mean ± standard deviation over {seeds} seeds"
    return [
        table(
            f"mIoU of the linear probe in %, {over}",
            "quality",
            QUALITIES,
            lambda name, value: _cell(value, 100, ".2f"),
        ),
        table(
            f"Kendall's τ with mIoU over a run's checkpoints, {over}",
            "tau",
            METRICS,
            lambda name, value: _cell(value, 1, ".2f"),
        ),
        table(
            f"With the regularizer minus without it, same seed (mIoU in points), {over}",
            "effect",
            EFFECTS,
            lambda name, value: _cell(value, *((1, "+.4f") if name == "dse" else (100, "+.2f"))),
        ),
    ]


def _cell(value: Mapping[str, Any], factor: float, form: str) -> str:
    if value["mean"] is None:
        return "–"
    text = f"{factor * value['mean']:{form}}"
    return text if value["std"] is None else f"{text} ± {factor * value['std']:{form.strip('+')}}"


def facts(report: Mapping[str, Any]) -> str:
    """What was done, on what machine, in a few sentences."""
    plan, machine = report["plan"], report["machine"]
    training, scoring = plan["training"], plan["scoring"]
    network = ", ".join(f"{k} {v}" for k, v in training["backbone_args"].items())
    number = len(plan["methods"]) * len(plan["seeds"]) * len(plan["dse_weights"])
    return (
        f"Preset `{plan['preset']}`: {number} runs ({', '.join(plan['methods'])}; seeds "
        f"{', '.join(map(str, plan['seeds']))}; β {', '.join(map(str, plan['dse_weights']))}) of "
        f"{training['steps']} steps with {training['batch_size']} images of "
        f"{training['image_size']}² pixels out of {training['train_images']} scenes; "
        f"{training['backbone']} ({network}, patches of {training['patch_size']}); "
        f"{training['checkpoints']} checkpoints a run, besides the untrained network. The probe is "
        f"fitted to {training['probe_images']} scenes and measured on {training['heldout_images']} "
        f"others; DSE and the baselines are of {scoring['images']} scenes, LiDAR of "
        f"{scoring['lidar_images']} × {scoring['lidar_views']} views. {machine['cpu']}, "
        f"{machine['cores']} cores, threads used: {machine['threads']}, torch {machine['torch']}, "
        f"timm {machine['timm']}, lightly {machine['lightly']}, dse-ext {machine['dse_ext']}."
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = [facts(report)]
    for table in tables(report):
        rule = ["---", "---", *("---:" for _ in table.header[2:])]
        lines = [table.header, rule, *table.rows]
        parts.append(f"**{table.title}**")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts += [f"- diverged: {_diverged(run)}" for run in report["summary"]["diverged"]]
    return "\n\n".join(parts) + "\n"


def _diverged(run: Mapping[str, Any]) -> str:
    return f"{run['method']}, β {run['dse_weight']:g}, seed {run['seed']}: {run['diverged']}"


def print_tables(report: Mapping[str, Any], console: Console) -> None:
    """Prints the report."""
    from rich import box
    from rich.table import Table as RichTable

    for table in tables(report):
        shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(table.header):
            text = number < 2
            shown.add_column(name, justify="left" if text else "right", no_wrap=text)
        for row in table.rows:
            shown.add_row(*row, style="bold" if row[0] == MEAN else None)
        console.print(shown)
    for run in report["summary"]["diverged"]:
        console.print(f"[yellow]diverged:[/] {_diverged(run)}", highlight=False)


_COLOURS = (ORANGE, BLUE, INK, MUTED)
_MARKS = "osD^"


def figure(report: Mapping[str, Any]) -> Figure:
    """Curves of mIoU and DSE over training for each method, and τ of each metric.

    The curves are changes since the untrained network, because the scenes, and with them the level,
    differ from seed to seed. Lines are means over seeds, bands reach from the least to the greatest
    seed.

    Args:
        report: The report.

    Returns:
        The figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    methods = list(report["plan"]["methods"])
    weights = report["plan"]["dse_weights"]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(max(2.9 * len(methods), 8.0), 8.4), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1.15))
        axes = upper.subplots(2, len(methods), sharex=True, squeeze=False)
        for column, method in enumerate(methods):
            for number, weight in enumerate(weights):
                runs = [
                    run
                    for run in report["runs"]
                    if (run["method"], run["dse_weight"]) == (method, weight)
                    and run["diverged"] is None
                ]
                _curve(axes[0][column], runs, lambda c: 100 * c["miou"], number, weight)
                _curve(axes[1][column], runs, plain_dse, number, weight)
            axes[0][column].set_title(method)
            axes[1][column].set_xlabel("step")
        axes[0][0].set_ylabel("change of mIoU, points")
        axes[1][0].set_ylabel("change of DSE (λ = 1)")
        handles, labels = axes[0][0].get_legend_handles_labels()
        upper.legend(handles, labels, loc="outside upper right", ncols=len(weights), fontsize=9)
        _taus(lower.subplots(), report, weights)
    return figure


def _label(weight: float) -> str:
    return f"with the regularizer, β = {weight:g}" if weight else "without the regularizer"


def _curve(
    axis: Axes,
    runs: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float | None],
    number: int,
    weight: float,
) -> None:
    import numpy as np

    if not runs:
        return
    steps = [checkpoint["step"] for checkpoint in runs[0]["checkpoints"]]
    values = np.array([[value(c) for c in run["checkpoints"]] for run in runs], dtype=float)
    values -= values[:, :1]
    colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
    axis.fill_between(
        steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.16, linewidth=0
    )
    axis.plot(
        steps,
        values.mean(axis=0),
        mark + "-",
        color=colour,
        label=_label(weight),
        markersize=6 - 1.5 * number,
    )


def _taus(axis: Axes, report: Mapping[str, Any], weights: Sequence[float]) -> None:
    """A point for each run, a bar for their mean."""
    width = 0.7 / len(weights)
    for number, weight in enumerate(weights):
        colour = _COLOURS[number % len(_COLOURS)]
        for place, metric in enumerate(METRICS):
            x = place + (number - (len(weights) - 1) / 2) * width
            taus = [
                run["tau"][metric]
                for run in report["runs"]
                if run["dse_weight"] == weight
                and run["diverged"] is None
                and run["tau"][metric] is not None
            ]
            if not taus:
                continue
            # Side by side, because τ of few checkpoints takes few values.
            offsets = [width * 0.7 * ((i + 0.5) / len(taus) - 0.5) for i in range(len(taus))]
            axis.plot(
                [x + offset for offset in offsets],
                taus,
                _MARKS[number % len(_MARKS)],
                color=colour,
                alpha=0.45,
                markersize=4,
            )
            axis.plot(
                [x - width * 0.42, x + width * 0.42],
                [statistics.fmean(taus)] * 2,
                color=colour,
                linewidth=3,
            )
    axis.axhline(0, color=MUTED, linewidth=1)
    axis.set_xticks(range(len(METRICS)), list(METRICS.values()), fontsize=9, color=INK)
    axis.set_ylim(-1.08, 1.08)
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("Kendall's τ with mIoU")
    axis.set_title("τ of each run (points) and its mean over methods and seeds (bars)")
