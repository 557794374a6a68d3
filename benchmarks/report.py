"""Turns the JSON of a benchmark run into tables of medians and ratios, and a compact summary.

    python -m benchmarks.report benchmarks/results/latest.json [--save NAME] [--require RATIO]

Exits with 1 where a measurement is missing or a requirement is not met, with 2 where the file
cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dse_ext.bench.case import Case
from dse_ext.bench.operation import OURS, Agreement
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.results import exponents, markdown, row_of, speedups, tables, titles
from dse_ext.bench.timing import Measurement

RESULTS = Path(__file__).parent / "results"


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """The compact summary of a pytest-benchmark report.

    Args:
        report: What `--benchmark-json` wrote. A benchmark carries `case`, `implementation` and
            `agreements` in its `extra_info`, once also `extra_peak_bytes`; or `share`.

    Returns:
        `machine`, `date`, `titles`, and what `dse_ext.bench.run.Run.results` has under the same
        names: `rows`, `scaling`, `threads` and `shares`.

    Raises:
        ValueError: If the report has no benchmark of this suite, or a case lacks ours.
    """
    found: dict[Case, Measurement] = {}
    shares = []
    for benchmark in report.get("benchmarks", []):
        info = benchmark["extra_info"]
        if "share" in info:
            shares.append(info["share"])
        if "case" not in info:
            continue
        case, key = Case.from_dict(info["case"]), info["implementation"]
        measurement = found.setdefault(case, Measurement(case))
        measurement.seconds.setdefault(key, []).extend(benchmark["stats"]["data"])
        measurement.agreements[key] = [Agreement(**values) for values in info["agreements"]]
        if info.get("extra_peak_bytes") is not None:
            measurement.extra_peak_bytes[key] = info["extra_peak_bytes"]
    if not found and not shares:
        raise ValueError("the report has no benchmark of this suite.")
    for measurement in found.values():
        if OURS not in measurement.seconds:
            raise ValueError(f"{measurement.case} was not measured for {OURS}.")
    rows = [row_of(measurement) for measurement in found.values()]
    return {
        "machine": report.get("machine_info", {}).get("dse", {}),
        "date": report.get("datetime"),
        "titles": {name: titles(name) for name in OPERATIONS},
        "rows": rows,
        "scaling": exponents(rows),
        "threads": speedups(rows),
        "shares": shares,
    }


def render(summary: dict[str, Any]) -> str:
    """The summary as aligned Markdown tables, under a line that names the machine."""
    machine = summary["machine"]
    blocks = [
        f"{machine.get('gpu') or machine.get('cpu', 'unknown CPU')}, "
        f"{machine.get('threads', '?')} threads, torch {machine.get('torch', '?')}, "
        f"lightly {machine.get('lightly', '?')}, dse-ext {machine.get('dse_ext', '?')}"
    ]
    for table in tables(summary["rows"], summary["shares"]):
        blocks += [f"### {table.title}", markdown(table)]
        blocks += ["\n".join(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n\n".join(blocks)


def unmet(
    summary: dict[str, Any], peer: str, ratio: float | None, memory: float | None
) -> list[str]:
    """What does not hold of the requirements on the regularizer's training steps.

    Args:
        summary: What `summarize` returns.
        peer: The implementation to compare with.
        ratio: Every training step must be at least this much faster than the peer's.
        memory: The extra peak memory must be at most this much times the peer's.

    Returns:
        One line per failure, also where a figure is missing.
    """
    failures = []
    compared = {"ratio": 0, "memory": 0}
    for row in summary["rows"]:
        if (row["part"], row["operation"], row["mode"]) != (
            "operations",
            "dse_components",
            "training",
        ):
            continue
        name = f"training {row['kind']} {tuple(row['shape'])}"
        if ratio is not None and peer in row["ratio"]:
            compared["ratio"] += 1
            if row["ratio"][peer] < ratio:
                failures.append(
                    f"{name}: {row['ratio'][peer]:.2f}× faster than {peer}, required {ratio:g}×"
                )
        peaks = row["extra_peak_bytes"]
        if memory is not None and peer in peaks and OURS in peaks:
            compared["memory"] += 1
            if peaks[OURS] > memory * peaks[peer]:
                failures.append(
                    f"{name}: {peaks[OURS] / peaks[peer]:.2f}× the extra peak memory "
                    f"of {peer}, allowed {memory:g}×"
                )
    for name, wanted in (("ratio", ratio), ("memory", memory)):
        if wanted is not None and not compared[name]:
            failures.append(f"no {name} against {peer} was measured")
    return failures


def _write(summary: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nSummary written to {path}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables, writes the summary and checks the requirements."""
    parser = argparse.ArgumentParser(description="Tables and summary of a benchmark run.")
    parser.add_argument("report", type=Path, help="what --benchmark-json wrote")
    parser.add_argument(
        "--save", metavar="NAME", help="keep the summary as benchmarks/results/NAME.json"
    )
    parser.add_argument(
        "--require",
        type=float,
        metavar="RATIO",
        help="fail unless every training step is at least this much faster than lightly's",
    )
    parser.add_argument(
        "--require-memory",
        type=float,
        metavar="RATIO",
        help="fail unless extra peak memory is at most this much times lightly's",
    )
    options = parser.parse_args(arguments)
    try:
        summary = summarize(json.loads(options.report.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        print(f"Cannot read the benchmark report {options.report}: {error}", file=sys.stderr)
        return 2

    print(render(summary))
    if options.save is not None:
        _write(summary, RESULTS / f"{options.save}.json")
    else:
        _write(summary, options.report.with_name(f"{options.report.stem}-summary.json"))

    measured = {key for row in summary["rows"] for key in row["median_ms"]}
    for key in ("lightly", "batched"):
        if summary["rows"] and key not in measured:
            print(f"Not measured: {key}.", file=sys.stderr)
    failures = unmet(summary, "lightly", options.require, options.require_memory)
    for failure in failures:
        print(f"Requirement not met: {failure}.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
