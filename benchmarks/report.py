"""Turns the JSON of a benchmark run into a table of medians and ratios, and a compact summary.

    python benchmarks/report.py benchmarks/results/latest.json [--save NAME] [--require RATIO]

Needs the standard library alone. Exits with 1 where a measurement is missing or a requirement is
not met, with 2 where the file cannot be read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "dse_ext"
RESULTS = Path(__file__).parent / "results"


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """The compact summary of a pytest-benchmark report.

    Args:
        report: What `--benchmark-json` wrote. Every benchmark carries `implementation`, `title`,
            `kind`, `shape` and `mode` in its `extra_info`, once also `extra_peak_bytes`.

    Returns:
        `{"machine", "date", "titles", "rows"}`. A row is one case: its kind, shape and mode, and
        per implementation the median over all rounds in milliseconds, the number of rounds, the
        time in relation to ours, and the extra peak memory in bytes where it was measured.

    Raises:
        ValueError: If the report has no benchmark of this suite, or a case lacks ours.
    """
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    titles: dict[str, str] = {}
    for benchmark in report.get("benchmarks", []):
        info = benchmark["extra_info"]
        if "implementation" not in info:
            continue
        key = info["implementation"]
        titles.setdefault(key, info["title"])
        row = cases.setdefault(
            (info["mode"], info["kind"], *info["shape"]),
            {
                "mode": info["mode"],
                "kind": info["kind"],
                "shape": info["shape"],
                "seconds": {},
                "extra_peak_bytes": {},
            },
        )
        row["seconds"].setdefault(key, []).extend(benchmark["stats"]["data"])
        if info.get("extra_peak_bytes") is not None:
            row["extra_peak_bytes"][key] = info["extra_peak_bytes"]
    if not cases:
        raise ValueError("the report has no benchmark of this suite.")

    for row in cases.values():
        seconds = row.pop("seconds")
        if OURS not in seconds:
            raise ValueError(f"{_case_name(row)} was not measured for {OURS}.")
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        row["median_ms"] = {key: round(1e3 * value, 3) for key, value in medians.items()}
        row["rounds"] = {key: len(values) for key, values in seconds.items()}
        row["ratio"] = {
            key: round(value / medians[OURS], 2) for key, value in medians.items() if key != OURS
        }
    machine = report.get("machine_info", {}).get("dse", {})
    return {
        "machine": machine,
        "date": report.get("datetime"),
        "titles": titles,
        "rows": list(cases.values()),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as an aligned Markdown table, under a line that names the machine."""
    titles = summary["titles"]
    peers = [key for key in titles if key != OURS]
    header = ["step", "input", "(B, N, d)", f"{titles[OURS]}, ms"]
    header += [f"{titles[key]}, ms" for key in peers]
    header += [f"× {titles[key]}" for key in peers]
    header += [f"memory {titles[key]}, MiB" for key in (OURS, *peers)]
    lines = []
    for row in summary["rows"]:
        shape = ", ".join(map(str, row["shape"]))
        line = [row["mode"], row["kind"], f"({shape})"]
        line += [_number(row["median_ms"].get(key), ".1f") for key in (OURS, *peers)]
        line += [_number(row["ratio"].get(key), ".1f") for key in peers]
        peaks = row["extra_peak_bytes"]
        line += [
            _number(peaks[key] / 2**20 if key in peaks else None, ".0f") for key in (OURS, *peers)
        ]
        lines.append(line)
    machine = summary["machine"]
    facts = (
        f"{machine.get('cpu', 'unknown CPU')}, {machine.get('threads', '?')} threads, "
        f"torch {machine.get('torch', '?')}, lightly {machine.get('lightly', '?')}, "
        f"dse-ext {machine.get('dse_ext', '?')}"
    )
    return f"{facts}\n\n{_markdown(header, lines)}"


def unmet(
    summary: dict[str, Any], peer: str, ratio: float | None, memory: float | None
) -> list[str]:
    """What does not hold of the requirements on the training steps.

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
        if row["mode"] != "training":
            continue
        if ratio is not None and peer in row["ratio"]:
            compared["ratio"] += 1
            if row["ratio"][peer] < ratio:
                failures.append(
                    f"{_case_name(row)}: {row['ratio'][peer]:.2f}× faster than {peer}, "
                    f"required {ratio:g}×"
                )
        peaks = row["extra_peak_bytes"]
        if memory is not None and peer in peaks and OURS in peaks:
            compared["memory"] += 1
            if peaks[OURS] > memory * peaks[peer]:
                failures.append(
                    f"{_case_name(row)}: {peaks[OURS] / peaks[peer]:.2f}× the extra peak memory "
                    f"of {peer}, allowed {memory:g}×"
                )
    for name, wanted in (("ratio", ratio), ("memory", memory)):
        if wanted is not None and not compared[name]:
            failures.append(f"no {name} against {peer} was measured")
    return failures


def _case_name(row: dict[str, Any]) -> str:
    return f"{row['mode']} {row['kind']} {tuple(row['shape'])}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    text_columns = 3

    def join(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([join(header), join(rule), *(join(line) for line in lines)])


def _write(summary: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nSummary written to {path}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, writes the summary and checks the requirements."""
    parser = argparse.ArgumentParser(description="Table and summary of a benchmark run.")
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

    print(table(summary))
    if options.save is not None:
        _write(summary, RESULTS / f"{options.save}.json")
    else:
        _write(summary, options.report.with_name(f"{options.report.stem}-summary.json"))

    missing = [key for key in ("lightly", "batched") if key not in summary["titles"]]
    for key in missing:
        print(f"Not measured: {key}.", file=sys.stderr)
    failures = unmet(summary, "lightly", options.require, options.require_memory)
    for failure in failures:
        print(f"Requirement not met: {failure}.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
