"""A run within a budget of time: what does not fit is left out and named."""

from __future__ import annotations

import datetime
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dse_ext.bench import machine, share
from dse_ext.bench.case import Case
from dse_ext.bench.memory import extra_peak_bytes
from dse_ext.bench.operation import OURS
from dse_ext.bench.plan import Settings, plan
from dse_ext.bench.registry import OPERATIONS, contestants
from dse_ext.bench.results import exponents, row_of, speedups, titles
from dse_ext.bench.scaling import axis_value
from dse_ext.bench.timing import Measurement, Predictor, describe, measure

__all__ = ["Run"]

Tell = Callable[[str, float], None]
"""Told what is measured now, and the seconds since the beginning."""

_WEIGHTS = {
    "operations": 4.0,
    "scaling": 2.0,
    "shares": 2.0,
    "memory": 1.0,
    "shapes": 6.0,
    "threads": 1.0,
    "compiled": 3.0,
}
"""How the time that is left is shared among the parts that are left."""


class Run:
    """Measures what a plan has, and keeps everything that was found.

    Args:
        settings: What the user asked for.
        tell: Told of progress.
        save: Called with `results()` after each measurement.
    """

    def __init__(
        self,
        settings: Settings,
        tell: Tell = lambda what, seconds: None,
        save: Callable[[dict[str, Any]], None] = lambda results: None,
    ) -> None:
        self.settings = settings
        self.plan = plan(settings)
        self._tell = tell
        self._save = save
        self._predictor = Predictor()
        self._start = time.monotonic()
        self._date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._measurements: list[Measurement] = []
        self._shares: list[dict[str, Any]] = []
        self._share_seconds: float | None = None  # of a floating-point operation
        self._skipped: list[dict[str, str]] = []
        self._state = "running"

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.settings.seconds - self.elapsed()

    def skip(self, what: str, reason: str) -> None:
        """Notes that something is left out; once for the same."""
        entry = {"what": what, "reason": reason}
        if entry not in self._skipped:
            self._skipped.append(entry)

    def all(self) -> dict[str, Any]:
        """Everything, the most important first.

        Returns:
            `results()`.

        Raises:
            KeyboardInterrupt: If the user interrupts; what was measured is saved before.
        """
        parts: dict[str, Iterator[float]] = {
            "operations": self._cases(self.plan.operations),
            "scaling": self._cases(self.plan.scaling, rounds=(2, 5)),
            "shares": self._share_of_steps(),
            "memory": self._memory(),
            "shapes": self._cases(self.plan.shapes, rounds=(2, 5)),
            "threads": self._cases(self.plan.threads, rounds=(2, 5)),
            "compiled": self._cases(self.plan.compiled, compiled=True),
        }
        weights = dict(_WEIGHTS)
        self._part_end = 0.0
        try:
            for name, steps in parts.items():
                share_of_part = weights[name] / sum(weights.values())
                del weights[name]
                self._part_end = self.elapsed() + share_of_part * max(self.left(), 0.0)
                for _ in steps:
                    self._save(self.results())
        except KeyboardInterrupt:
            self._state = "interrupted"
            self._save(self.results())
            raise
        self._state = "complete"
        self._save(self.results())
        return self.results()

    def results(self) -> dict[str, Any]:
        """What was found so far.

        Returns:
            Plain values: `state` (running, interrupted or complete), `date`, `elapsed_seconds`,
            `settings`, `machine`, `titles` of the implementations by operation, `rows`
            (`dse_ext.bench.results.row_of`), `scaling` (`exponents`), `threads` (`speedups`),
            `shares` (`dse_ext.bench.share.measure_share`) and `skipped`, what was left out with
            the reasons.
        """
        rows = [row_of(found) for found in self._measurements if found.seconds]
        return {
            "state": self._state,
            "date": self._date,
            "elapsed_seconds": round(self.elapsed(), 1),
            "settings": {
                **asdict(self.settings),
                "shapes": [list(s) for s in self.settings.shapes],
            },
            "machine": machine.facts(self.settings.device, self.settings.threads),
            "titles": {name: titles(name) for name in OPERATIONS},
            "rows": rows,
            "scaling": exponents(rows),
            "threads": speedups(rows),
            "shares": list(self._shares),
            "skipped": list(self._skipped),
        }

    # --- parts ------------------------------------------------------------------------------------

    def _share(self, waiting: int) -> float:
        """Seconds for the next of so many measurements of this part."""
        return max(self._part_end - self.elapsed(), 0.0) / max(waiting, 1)

    def _fits(self, what: str, needed: int) -> bool:
        available = machine.available_bytes(self.settings.device)
        if available is None or needed <= available:
            return True
        self.skip(
            what,
            f"too large for this machine: about {needed / 2**20:.0f} MiB are needed, "
            f"{available / 2**20:.0f} MiB are there",
        )
        return False

    def _cases(
        self, cases: Sequence[Case], rounds: tuple[int, int] = (2, 7), compiled: bool = False
    ) -> Iterator[float]:
        for number, case in enumerate(cases):
            what = _name(case)
            if self.left() <= 0:
                self.skip(what, "time ran out")
                continue
            operation = OPERATIONS[case.operation]
            if not self._fits(what, operation.bytes_needed(case)):
                continue
            self._tell(what, self.elapsed())
            keys, unable = contestants(case, compiled=compiled)
            if case.part.startswith("scaling"):
                keys = [key for key in keys if key in (OURS, "batched")]
            if compiled:
                keys = [OURS, *(k for k in keys if operation.implementations[k].compiled)]
            names = titles(case.operation)
            for key, reason in unable.items() if not case.part.startswith("scaling") else ():
                self.skip(f"{names[key]} for {case.operation} {case.mode}", reason)
            found = Measurement(case)
            self._measurements.append(found)
            measure(
                case,
                keys,
                seconds=self._share(len(cases) - number),
                rounds=(2, 2) if self.settings.quick else rounds,
                left=self.left,
                predictor=self._predictor,
                found=found,
                compile_seconds=min(5.0 if self.settings.quick else 90.0, self.left()),
            )
            for key, reason in found.left_out.items() if not found.seconds else ():
                self.skip(f"{names[key]}: {what}", reason)  # else it is in the row
            yield self.elapsed()

    def _memory(self) -> Iterator[float]:
        """Extra peak memory of the training step that was timed: a process an implementation."""
        timed = [found for found in self._measurements if found.case in self.plan.memory]
        for key, name in titles("dse_components").items():
            found = {entry.case: entry for entry in timed if key in entry.seconds}
            if not found:
                continue
            what = f"extra peak memory of {name}"
            if self.left() <= 0:
                self.skip(what, "time ran out")
                continue
            self._tell(what, self.elapsed())
            try:
                extra = extra_peak_bytes(key, list(found), self.left())
            except subprocess.TimeoutExpired:
                self.skip(what, "time ran out")
            except (RuntimeError, OSError) as error:
                self.skip(what, str(error))
            else:
                for case, peak in extra.items():
                    if peak is None:
                        self.skip(what, "this system does not tell the peak of a process")
                    else:
                        found[case].extra_peak_bytes[key] = peak
            yield self.elapsed()

    def _share_of_steps(self) -> Iterator[float]:
        for title in self.plan.shares:
            backbone = share.BACKBONES[title]
            what = f"share of a training step: {title}"
            if machine.version("timm") is None:
                self.skip(what, "timm is not installed (pip install 'dse-ext[ssl]')")
                continue
            images = 2 if self.settings.quick else 8
            operations = backbone.operations(images)
            expected = 3 * operations * (self._share_seconds or 0.0)
            if self.left() <= expected:
                text = f": about {expected:.0f} s are needed" if expected else ""
                self.skip(what, f"time ran out{text}")
                continue
            if not self._fits(what, backbone.bytes_needed(images)):
                continue
            self._tell(what, self.elapsed())
            try:
                found = share.measure_share(
                    title,
                    self.settings.base,
                    images=images,
                    quick=self.settings.quick,
                    left=self.left,
                )
            except (ImportError, RuntimeError) as error:
                self.skip(what, describe(error))
                continue
            self._shares.append(found)
            self._share_seconds = found["backbone_ms"] / 1e3 / operations
            yield self.elapsed()


def _name(case: Case) -> str:
    """A case among what is measured now or left out."""
    if case.part.startswith("scaling"):
        axis, value = axis_value(case)
        return f"scaling, {axis} = {value}"
    if case.part == "threads":
        return f"{case.threads} threads: {case}"
    return f"compiled: {case}" if case.part == "compiled" else str(case)
