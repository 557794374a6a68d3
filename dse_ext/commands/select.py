"""``dse-ext select``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dse_ext.commands.common import fail

if TYPE_CHECKING:
    from rich.console import Console

    from dse_ext.selection import MiouTable, RunSelection, SelectionEvaluation


def select(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="Folders that [bold]dse-ext evaluate[/] wrote, or their results.csv or "
            "results.json; each may hold several runs.",
            show_default=False,
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="True quality, such as miou.csv of [bold]dse-ext probe[/]: columns run, "
            "checkpoint, epoch and one column of mIoU in \\[0, 1] for each data set. Adds "
            "Kendall's τ of DSE and of every baseline, and the mIoU gained over the last "
            "checkpoint.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="K", help="Largest number of checkpoints to choose in a run.")
    ] = 3,
    window: Annotated[
        int,
        typer.Option(
            metavar="W",
            help="A candidate's DSE is the maximum over this many checkpoints before and after it.",
        ),
    ] = 2,
    dim_weight: Annotated[
        str,
        typer.Option(
            metavar="auto|FLOAT",
            help="λ, the weight of M_dim. [bold]auto[/]: Std(M_inter − M_intra) / Std(M_dim) over "
            "the checkpoints of each run.",
        ),
    ] = "auto",
    first_epoch: Annotated[
        float | None,
        typer.Option(
            metavar="EPOCH",
            help="Leave out checkpoints before this epoch, in λ too: an untrained network (epoch "
            "0 of [bold]dse-ext train[/]) would dominate it.  [dim]\\[default: all take part][/]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for selection.csv, selection.json, a figure of each run and, with "
            "--against, kendall.csv and gain.csv.  [dim]\\[default: the folder of RESULTS][/]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Choose the best checkpoints of runs by DSE, without labels.

    Computes λ over the checkpoints of each run, DSE = M_inter − M_intra + λ · M_dim, and chooses
    the best of its local maxima. With --against it says how well DSE and the label-free baselines
    rank the checkpoints, and what the choice gains.
    """
    from rich.console import Console
    from rich.markup import escape

    errors = Console(stderr=True)
    try:
        _run(Console(), results, against, top, window, dim_weight, first_epoch, out)
    except ModuleNotFoundError as error:
        fail(
            errors,
            f"select needs the package {error.name}, which is not installed: "
            "pip install 'dse-ext\\[ssl]'",
        )
    except (ValueError, OSError) as error:
        fail(errors, escape(str(error)))


def _run(
    console: Console,
    results: list[Path],
    against: Path | None,
    top: int,
    window: int,
    dim_weight: str,
    first_epoch: float | None,
    out: Path | None,
) -> None:
    from dse_ext import selection

    weight = _dim_weight(dim_weight)
    folder = _folder(results, out)
    runs = [
        selection.select_run(
            run, top=top, window=window, dim_weight=weight, first_epoch=first_epoch
        )
        for run in selection.read_results(*results)
    ]
    miou = None if against is None else selection.read_miou(against)
    evaluation = None if miou is None else selection.evaluate_selection(runs, miou)
    _print(console, runs, miou, evaluation)
    settings: dict[str, Any] = {
        "top": top,
        "window": window,
        "dim_weight": "auto" if weight is None else weight,
        "first_epoch": first_epoch,
    }
    _write(console, folder, runs, settings, miou, evaluation)


def _dim_weight(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--dim-weight must be auto or a number, got {text!r}.") from None


def _folder(results: list[Path], out: Path | None) -> Path:
    if out is not None:
        return out
    if len(results) > 1:
        raise ValueError(
            f"--out is needed where there are several RESULTS, got {len(results)}: it says where "
            "the selection is written."
        )
    return results[0] if results[0].is_dir() else results[0].parent


def _print(
    console: Console,
    runs: list[RunSelection],
    miou: MiouTable | None,
    evaluation: SelectionEvaluation | None,
) -> None:
    from dse_ext.report.selection_table import (
        SIGNS,
        gain_table,
        kendall_table,
        print_table,
        selection_table,
    )

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    for choice in runs:
        print_table(console, selection_table(choice, None if miou is None else miou.of(choice.run)))
        result = choice.result
        how = (
            "Std(M_inter − M_intra) / Std(M_dim) over the run"
            if result.dim_weight_computed
            else "see below"
            if result.note
            else "as given"
        )
        say(f"λ = {result.dim_weight:.4g} ({how}); chosen: {', '.join(choice.chosen_checkpoints)}")
        for note in choice.notes:
            say(f"note: {note}.", style="yellow")
        console.print()
    if evaluation is None:
        return
    print_table(console, kendall_table(evaluation))
    say(SIGNS)
    console.print()
    if evaluation.gains:
        print_table(console, gain_table(evaluation))
    for note in evaluation.notes:
        say(f"note: {note}.", style="yellow")
    console.print()


def _write(
    console: Console,
    folder: Path,
    runs: list[RunSelection],
    settings: dict[str, Any],
    miou: MiouTable | None,
    evaluation: SelectionEvaluation | None,
) -> None:
    from dse_ext.report.selection import selection_figure
    from dse_ext.selection import write
    from dse_ext.ssl.storage import replacing, save_text

    save_text(folder / "selection.csv", write.selection_csv(runs))
    save_text(folder / "selection.json", write.selection_json(runs, settings, evaluation))
    written = ["selection.csv", "selection.json"]
    if evaluation is not None:
        save_text(folder / "kendall.csv", write.kendall_csv(evaluation))
        save_text(folder / "gain.csv", write.gain_csv(evaluation))
        written += ["kendall.csv", "gain.csv"]
    for choice, name in zip(runs, figure_names([c.run.run for c in runs]), strict=True):
        taus = {
            entry.dataset: entry
            for entry in (evaluation.taus if evaluation else ())
            if (entry.run, entry.metric) == (choice.run.run, "dse")
        }
        figure = selection_figure(choice, None if miou is None else miou.of(choice.run), taus)
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        written.append(name)
    console.print(
        f"written to {folder}: {', '.join(written)}", highlight=False, markup=False, soft_wrap=True
    )


def figure_names(runs: list[str]) -> list[str]:
    """A file name for the figure of each run: safe on every file system, and all different.

    Args:
        runs: Names of the runs.

    Returns:
        Names that end in ``.png``, in the same order.
    """
    names: list[str] = []
    for run in runs:
        stem = "selection-" + (re.sub(r"[^\w.+-]+", "_", run).strip("._") or "run")
        name, number = f"{stem}.png", 2
        # Some file systems do not tell upper from lower case.
        while name.lower() in (other.lower() for other in names):
            name, number = f"{stem}-{number}.png", number + 1
        names.append(name)
    return names
