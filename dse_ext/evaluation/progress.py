"""Progress of a sweep: two bars in a terminal, one line a checkpoint elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import Self


class SweepProgress:
    """Shows how far a sweep is, and each checkpoint's outcome."""

    def __init__(self, console: Console, checkpoints: int) -> None:
        self._console = console
        self._checkpoints = checkpoints
        self._done = 0
        self._name = ""
        self._images = 0
        self._started = self._began = time.perf_counter()
        self._unreadable: set[str] = set()
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not console.is_terminal or checkpoints == 0,
        )
        self._all = self._bars.add_task("checkpoints", total=checkpoints, text="")
        self._one = self._bars.add_task("images", total=None, text="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def start(self, name: str, images: int) -> None:
        """A checkpoint of this name begins, for which so many images are to be seen."""
        self._name = name
        self._images = 0
        self._started = time.perf_counter()
        self._bars.update(self._all, text=escape(name))
        self._bars.reset(self._one, total=images, text="")

    def advance(self, images: int, unreadable: tuple[str, ...]) -> None:
        """So many images more have been seen."""
        for message in unreadable:
            if message not in self._unreadable:
                self._unreadable.add(message)
                self._console.print(f"[yellow]skipped:[/] {escape(message)}", highlight=False)
        self._images += images
        rate = self._images / max(time.perf_counter() - self._started, 1e-9)
        self._bars.update(self._one, advance=images, text=f"{rate:.0f} images/s")

    def finish(self, figures: dict[str, float]) -> None:
        """The checkpoint has been scored."""
        relevance, dim = figures["class_relevance"], figures["m_dim"]
        text = f"class relevance {relevance:.4f}  M_dim {dim:.4f}"
        if not math.isfinite(relevance):
            text = "[yellow]features that are not finite[/]"
        self.conclude(text)

    def conclude(self, outcome: str) -> None:
        """The checkpoint is done; its outcome in rich markup."""
        rate = self._images / max(time.perf_counter() - self._started, 1e-9)
        self._line(f"{outcome}  {rate:.0f} images/s")

    def stage(self, what: str) -> None:
        """What is done with the checkpoint now."""
        self._bars.update(self._one, description=what)

    def skip(self, reason: str) -> None:
        """The checkpoint could not be scored."""
        self._line(f"[yellow]skipped:[/] {escape(reason)}")

    def _line(self, text: str) -> None:
        self._done += 1
        elapsed = time.perf_counter() - self._began
        left = elapsed / self._done * (self._checkpoints - self._done)
        self._console.print(
            f"{self._done}/{self._checkpoints}  {escape(self._name)}  {text}  {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )
        self._bars.update(self._all, completed=self._done)
