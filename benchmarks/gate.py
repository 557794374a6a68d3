"""Fails where dse-ext has become slower in relation to its peers.

    python -m benchmarks.gate [--bounds benchmarks/gate.json] [--threads 2]

Every ratio is that of medians within one run, taken in turns, so the machine's own speed cancels.
The bounds are about half of what was measured: they catch a kernel that has lost its point, not a
change of some percent. A ratio below its bound is measured again, up to three times in all, because
other programs on the machine may take sides for a while.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dse_ext.bench.case import Case
from dse_ext.bench.operation import OURS
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.results import Table, markdown, row_of, titles
from dse_ext.bench.timing import measure

BOUNDS = Path(__file__).parent / "gate.json"
ATTEMPTS = 3
SECONDS = 2.0  # of timing for a case


@dataclass(frozen=True)
class Bound:
    """A ratio that must not fall.

    Attributes:
        case: What is measured.
        peer: Whom with.
        at_least: The peer's time over ours.
    """

    case: Case
    peer: str
    at_least: float


@dataclass
class Outcome:
    """What was found for a bound.

    Attributes:
        ratio: The best ratio of all attempts; None where it could not be measured.
        attempts: How many there were.
        reason: Why there is no ratio.
    """

    ratio: float | None = None
    attempts: int = 0
    reason: str = ""


def read_bounds(path: Path, threads: int) -> list[Bound]:
    """The bounds of a file.

    Args:
        path: JSON with a list `bounds` of `operation`, `shape`, `mode`, `clusters` (24 where it is
            not given), `peer` and `at_least`.
        threads: Threads of every implementation.

    Raises:
        ValueError: If there is no bound, or one names what does not exist.
    """
    bounds = []
    for entry in json.loads(path.read_text(encoding="utf-8"))["bounds"]:
        case = Case(
            entry["operation"],
            tuple(entry["shape"]),
            entry["mode"],
            clusters=entry.get("clusters", 24),
            threads=threads,
        )
        if entry["peer"] not in OPERATIONS[case.operation].implementations:
            raise ValueError(f"{path}: {case.operation} has no implementation {entry['peer']!r}.")
        bounds.append(Bound(case, entry["peer"], float(entry["at_least"])))
    if not bounds:
        raise ValueError(f"{path} has no bounds.")
    return bounds


Ratios = Callable[[Case, Sequence[str]], dict[str, float | str]]
"""Measures a case: the ratio to each peer, or why there is none."""


def ratios(case: Case, peers: Sequence[str]) -> dict[str, float | str]:
    """Measures a case.

    Args:
        case: The case.
        peers: Implementations beside ours.

    Returns:
        By peer the ratio, or the reason why there is none.
    """
    implementations = OPERATIONS[case.operation].implementations
    reasons = {peer: implementations[peer].obstacle(case) for peer in peers}
    able = [peer for peer in peers if reasons[peer] is None]
    found = measure(case, [OURS, *able], seconds=SECONDS, rounds=(3, 9))
    row = row_of(found)
    return {
        peer: row["ratio"].get(peer)
        or reasons[peer]
        or found.left_out.get(peer)
        or found.left_out.get(OURS, "it was not measured")
        for peer in peers
    }


def check(
    bounds: Sequence[Bound], attempts: int = ATTEMPTS, measure_ratios: Ratios = ratios
) -> list[Outcome]:
    """Measures what the bounds ask for, and again what falls short.

    Args:
        bounds: The bounds.
        attempts: How often a ratio is measured at most.
        measure_ratios: Measures a case.

    Returns:
        One outcome per bound.
    """
    outcomes = [Outcome() for _ in bounds]
    for _ in range(attempts):
        open_cases: dict[Case, list[int]] = {}
        for number, (bound, outcome) in enumerate(zip(bounds, outcomes, strict=True)):
            if not holds(bound, outcome):
                open_cases.setdefault(bound.case, []).append(number)
        for case, numbers in open_cases.items():
            found = measure_ratios(case, [bounds[number].peer for number in numbers])
            for number in numbers:
                outcome, ratio = outcomes[number], found[bounds[number].peer]
                outcome.attempts += 1
                if isinstance(ratio, str):
                    outcome.reason = ratio
                else:
                    outcome.ratio = max(ratio, outcome.ratio or 0.0)
    return outcomes


def holds(bound: Bound, outcome: Outcome) -> bool:
    """Whether a bound is kept."""
    return outcome.ratio is not None and outcome.ratio >= bound.at_least


def table(bounds: Sequence[Bound], outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = []
    for bound, outcome in zip(bounds, outcomes, strict=True):
        ratio = outcome.reason if outcome.ratio is None else f"{outcome.ratio:.2f}×"
        lines.append(
            [
                bound.case.operation,
                bound.case.mode,
                f"({', '.join(map(str, bound.case.shape))})",
                titles(bound.case.operation)[bound.peer],
                "ok" if holds(bound, outcome) else "TOO SLOW" if outcome.ratio else "NOT MEASURED",
                ratio,
                f"{bound.at_least:g}×",
                str(outcome.attempts),
            ]
        )
    header = ["operation", "step", "shape", "peer", "", "its time / ours", "at least", "attempts"]
    return markdown(Table("", header, lines, 5))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 where a bound is not kept, 2 where there are none to check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bounds", type=Path, default=BOUNDS, help="file with the lower bounds")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        bounds = read_bounds(options.bounds, options.threads)
    except (OSError, ValueError, KeyError) as error:
        print(f"Cannot read the bounds: {error!r}", file=sys.stderr)
        return 2
    outcomes = check(bounds)
    print(table(bounds, outcomes))
    failed = [
        bound for bound, found in zip(bounds, outcomes, strict=True) if not holds(bound, found)
    ]
    print(
        f"\n{len(bounds) - len(failed)} of {len(bounds)} ratios hold, {options.threads} threads, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
