"""Progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

_LINES = 10
"""Number of lines that stand for a whole bar where there is no terminal."""


class StepDisplay:
    """Shows the state of training after each step."""

    def __init__(self, console: Console, update: Callable[[int, str], None], batch: int) -> None:
        self._console = console
        self._update = update
        self._batch = batch
        self._rate = 0.0
        self._last = time.perf_counter()

    def __call__(self, row: dict[str, Any]) -> None:
        """Shows a step.

        Args:
            row: Its row of the log.
        """
        for message in row["skipped"]:
            self._console.print(f"[yellow]skipped:[/] {message}", highlight=False)
        now = time.perf_counter()
        rate = self._batch / max(now - self._last, 1e-9)
        # The first steps are slower than the rest; a moving average forgets them.
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        self._last = now
        text = f"loss {row['ssl_loss']:.3f}"
        if "dse" in row:
            share = 100 * row["dse_seconds"] / row["step_seconds"]
            text += f"  DSE {row['dse']:.3f} ({share:.0f} % of the step)"
        self._update(row["step"], f"{text}  {self._rate:.0f} images/s")


@contextmanager
def training_progress(
    console: Console, first: int, steps: int, batch_size: int
) -> Iterator[StepDisplay]:
    """Shows a training run.

    Args:
        console: Where to.
        first: Steps done before.
        steps: Steps of the whole run.
        batch_size: Images per step.

    Yields:
        What is to be called with each row of the log.
    """
    with _bar(console, "training", first, steps) as update:
        yield StepDisplay(console, update, batch_size)


def each(console: Console, items: Sequence[T], title: str) -> Iterator[T]:
    """Iterates over items and shows how far it is.

    Args:
        console: Where to.
        items: The items.
        title: What is done with them.

    Yields:
        The items.
    """
    with _bar(console, title, 0, len(items)) as update:
        for number, item in enumerate(items):
            yield item
            update(number + 1, "")


@contextmanager
def _bar(
    console: Console, title: str, first: int, total: int
) -> Iterator[Callable[[int, str], None]]:
    if not console.is_terminal:
        yield _lines(console, title, total)
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
    )
    with progress:
        task = progress.add_task(title, total=total, completed=first, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)


def _lines(console: Console, title: str, total: int) -> Callable[[int, str], None]:
    """A log that is read later gets a few lines, each with the time that is left."""
    started = time.perf_counter()
    first: list[int] = []

    def update(done: int, text: str) -> None:
        if not first:
            first.append(done - 1)
        if done == total or done * _LINES // total > (done - 1) * _LINES // total:
            seconds = time.perf_counter() - started
            left = seconds / (done - first[0]) * (total - done)
            console.print(
                f"{title} {done}/{total}  {text}  {seconds:.0f} s, {left:.0f} s left",
                highlight=False,
            )

    return update
