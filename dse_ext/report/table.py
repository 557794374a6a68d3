"""The one table that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dse_ext.ssl.scoring import CheckpointScore, Selection

if TYPE_CHECKING:
    from rich.table import Table


def checkpoint_table(
    scores: Sequence[CheckpointScore], selection: Selection, start: str = "untrained"
) -> Table:
    """Lays out checkpoints, DSE with its components, mIoU and choice.

    Args:
        scores: One score per checkpoint in the order of training.
        selection: λ and the chosen checkpoints.
        start: What the network at step 0 is.

    Returns:
        A rich table; the mIoU column is absent without labels.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    labelled = all(score.miou is not None for score in scores)
    table = Table(box=SIMPLE_HEAD, title="Checkpoints", title_justify="left")
    table.add_column("step", justify="right")
    for name in ("M inter", "M intra image", "M intra batch", "M dim", "DSE"):
        table.add_column(name, justify="right")
    if labelled:
        table.add_column("mIoU %", justify="right")
    table.add_column("chosen")
    for score in scores:
        rank = selection.chosen.index(score.step) + 1 if score.step in selection.chosen else None
        values = [
            score.m_inter,
            score.m_intra_image,
            score.m_intra_batch,
            score.m_dim,
            score.dse(selection.dim_weight),
        ]
        row = [str(score.step), *(f"{value:.4f}" for value in values)]
        if score.miou is not None and labelled:
            row.append(f"{100 * score.miou:.1f}")
        row.append(start if score.step == 0 else f"yes, {ordinal(rank)}" if rank else "no")
        table.add_row(*row, style="bold green" if rank else "dim" if score.step == 0 else None)
    return table


def summary_lines(
    scores: Sequence[CheckpointScore], selection: Selection, start: str = "untrained"
) -> list[str]:
    """The sentences below the table.

    Args:
        scores: One score per checkpoint in the order of training.
        selection: λ, the chosen checkpoints and Kendall's τ.
        start: What the network at step 0 is.

    Returns:
        Lines of plain text.
    """
    trained = [score for score in scores if score.step > 0]
    how = (
        "Std(M inter - M intra) / Std(M dim) over the trained checkpoints"
        if selection.dim_weight_computed
        else "too few checkpoints to compute it"
    )
    lines = [f"DSE = M inter - M intra + λ · M dim, λ = {selection.dim_weight:.3f} ({how})"]
    if any(score.miou is None for score in scores):
        lines.append("mIoU and Kendall's τ: none, because the images have no labels")
        return lines
    if selection.kendall_tau is None:
        lines.append("Kendall's τ of DSE with mIoU: undefined for these checkpoints")
    else:
        lines.append(
            f"Kendall's τ of DSE with mIoU = {selection.kendall_tau:.2f} "
            f"(p = {selection.p_value:.2g}, {len(trained)} trained checkpoints)"
        )
    by_step = {score.step: score for score in scores}
    best = max(trained, key=lambda score: score.miou or 0.0)
    first = by_step[selection.chosen[0]]
    lines.append(
        f"mIoU: {start} {_percent(scores[0])}, DSE's first choice {_percent(first)} "
        f"(step {first.step}), last {_percent(trained[-1])}, "
        f"best {_percent(best)} (step {best.step})"
    )
    return lines


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ...

    Args:
        number: A positive number.
    """
    suffix = (
        "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{suffix}"


def _percent(score: CheckpointScore) -> str:
    return "-" if score.miou is None else f"{100 * score.miou:.1f} %"
