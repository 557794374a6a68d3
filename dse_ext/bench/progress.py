"""Progress of a run: a bar over the budget in a terminal, one line a measurement elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["bench_progress"]


@contextmanager
def bench_progress(console: Console, seconds: float) -> Iterator[Callable[[str, float], None]]:
    """Shows what is measured.

    Nothing runs beside the measurements: the bar is drawn when the next one begins, not by a
    thread of its own.

    Args:
        console: Where to.
        seconds: The budget.

    Yields:
        What is to be called with the next measurement and the seconds since the beginning.
    """
    if not console.is_terminal:

        def line(what: str, elapsed: float) -> None:
            console.print(
                f"{elapsed:5.0f} s of {seconds:.0f}  {escape(what)}",
                highlight=False,
                soft_wrap=True,
            )

        yield line
        return
    bar = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=28),
        TimeElapsedColumn(),
        TextColumn(f"of {seconds:.0f} s  {{task.description}}"),
        console=console,
        transient=True,
        auto_refresh=False,
    )
    task = bar.add_task("", total=seconds)

    def draw(what: str, elapsed: float) -> None:
        bar.update(task, completed=min(elapsed, seconds), description=escape(what))
        bar.refresh()

    with bar:
        yield draw
