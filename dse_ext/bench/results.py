"""Rows of results: medians, ratios and fits, as JSON keeps them and tables show them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dse_ext.bench.case import Case
from dse_ext.bench.operation import OURS
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.scaling import axis_value, fit_exponent
from dse_ext.bench.timing import Measurement

__all__ = ["Table", "exponents", "markdown", "row_of", "speedups", "tables", "titles"]


def row_of(measurement: Measurement) -> dict[str, Any]:
    """A measurement as plain values.

    Args:
        measurement: What was measured.

    Returns:
        The case's attributes and, by implementation: `median_ms`; `iqr_ms`, the distance between
        the quartiles; `rounds`; `ratio`, the peer's median over ours (above 1 ours is faster);
        `agreement`, what was compared and how far it is apart; `left_out`, reasons;
        `extra_peak_bytes` where it was measured. An implementation that computes something else
        has no times.
    """
    seconds = {
        key: values
        for key, values in measurement.seconds.items()
        if values and measurement.disagreement(key) is None
    }
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    ours = medians.get(OURS)
    return {
        **measurement.case.to_dict(),
        "median_ms": {key: round(1e3 * value, 4) for key, value in medians.items()},
        "iqr_ms": {key: round(1e3 * _iqr(values), 4) for key, values in seconds.items()},
        "rounds": {key: len(values) for key, values in seconds.items()},
        "ratio": {
            key: round(value / ours, 3)
            for key, value in medians.items()
            if key != OURS and ours is not None
        },
        "agreement": {
            key: [asdict(found) for found in agreements]
            for key, agreements in measurement.agreements.items()
            if agreements
        },
        "left_out": dict(measurement.left_out),
        "extra_peak_bytes": dict(measurement.extra_peak_bytes),
    }


def _iqr(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower


def titles(operation: str) -> dict[str, str]:
    """How tables name the implementations of an operation."""
    found = OPERATIONS[operation].implementations
    return {key: implementation.title for key, implementation in found.items()}


def exponents(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fits of the rows that vary one axis.

    Args:
        rows: Rows of any parts.

    Returns:
        By axis and implementation: `axis`, `operation`, `implementation`, `sizes`, `median_ms`,
        `exponent`, `error` (standard error), `lowest` and `highest` (slopes between neighbours).
        Axes of fewer than two sizes are left out.
    """
    points: dict[tuple[str, str, str, int], dict[int, float]] = {}
    for row in rows:
        if not row["part"].startswith("scaling "):
            continue
        case = _case(row)
        axis, value = axis_value(case)
        for key, median in row["median_ms"].items():
            points.setdefault((case.operation, axis, key, case.threads), {})[value] = median
    found = []
    for (operation, axis, key, threads), times in points.items():
        if len(times) < 2:
            continue
        sizes = sorted(times)
        fit = fit_exponent(sizes, [times[size] for size in sizes])
        found.append(
            {
                "operation": operation,
                "axis": axis,
                "implementation": key,
                "threads": threads,
                "sizes": sizes,
                "median_ms": [times[size] for size in sizes],
                "exponent": round(fit.value, 3),
                "error": None if fit.error is None else round(fit.error, 3),
                "lowest": round(fit.lowest, 3),
                "highest": round(fit.highest, 3),
            }
        )
    return found


def speedups(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What more threads bring, from the rows of the part `threads`.

    Returns:
        By case and implementation: `operation`, `shape`, `mode`, `implementation`, `median_ms` by
        number of threads, and `speedup`, the time with the fewest over that with the most.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["part"] != "threads":
            continue
        for key, median in row["median_ms"].items():
            entry = found.setdefault(
                (row["operation"], *row["shape"], row["mode"], key),
                {
                    "operation": row["operation"],
                    "shape": row["shape"],
                    "mode": row["mode"],
                    "implementation": key,
                    "median_ms": {},
                },
            )
            entry["median_ms"][row["threads"]] = median
    for entry in found.values():
        times = entry["median_ms"]
        entry["speedup"] = round(times[min(times)] / times[max(times)], 2)
    return [entry for entry in found.values() if len(entry["median_ms"]) > 1]


def _case(row: dict[str, Any]) -> Case:
    return Case.from_dict({name: row[name] for name in Case.__dataclass_fields__})


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table that may be shown in a terminal or written as Markdown.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        lines: Cells.
        text_columns: So many columns on the left are text, the others numbers.
        notes: Sentences below it.
    """

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    text_columns: int
    notes: Sequence[str] = ()


def tables(
    rows: Sequence[dict[str, Any]],
    shares: Sequence[dict[str, Any]] = (),
    *,
    long: bool = False,
) -> list[Table]:
    """All tables that the results have rows for.

    Args:
        rows: What `row_of` returned.
        shares: What `dse_ext.bench.share.measure_share` returned.
        long: Whether each implementation has a line of its own, for the width of a terminal.

    Returns:
        One for each operation and part, then threads, scaling and shares.
    """
    found = []
    for part in ("operations", "compiled"):
        for operation in OPERATIONS:
            own = [row for row in rows if (row["part"], row["operation"]) == (part, operation)]
            if own:
                table = _long_table if long else _wide_table
                found.append(table(operation, own, part))
    if entries := speedups(rows):
        found.append(_speedup_table(entries))
    if fits := exponents(rows):
        found.append(_scaling_table(fits))
    if shares:
        found.append(_share_table(shares))
    return found


def _heading(operation: str, rows: Sequence[dict[str, Any]], part: str) -> str:
    facts = sorted({(row["dtype"], row["device"], row["threads"]) for row in rows})
    where = "; ".join(f"{dtype}, {device}, threads: {n}" for dtype, device, n in facts)
    return f"{operation}{', compiled' if part == 'compiled' else ''} ({where})"


def _case_columns(operation: str) -> list[str]:
    axes = OPERATIONS[operation].axes.partition(":")[0]
    return ["step", "input", axes, *([] if operation == "effective_rank" else ["k"])]


def _case_cells(row: dict[str, Any]) -> list[str]:
    cells = [row["mode"], row["kind"], _shape(row)]
    return cells if row["operation"] == "effective_rank" else [*cells, str(row["clusters"])]


def _shape(row: dict[str, Any]) -> str:
    return f"({', '.join(map(str, row['shape']))})"


def _measured(operation: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    return [key for key in titles(operation) if any(key in row["median_ms"] for row in rows)]


def _wide_table(operation: str, rows: Sequence[dict[str, Any]], part: str) -> Table:
    """A line a case: times, then ratios, then memory."""
    names, measured = titles(operation), _measured(operation, rows)
    header = _case_columns(operation)
    text_columns = len(header)
    lines = [_case_cells(row) for row in rows]

    def add(name: str, cells: Sequence[str]) -> None:
        header.append(name)
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell)

    for key in measured:
        add(f"{names[key]}, ms", [_number(row["median_ms"].get(key), ".1f") for row in rows])
    for key in measured:
        if key != OURS:
            add(f"× {names[key]}", [_number(row["ratio"].get(key), ".1f") for row in rows])
    for key in measured:
        if any(key in row["extra_peak_bytes"] for row in rows):
            add(f"memory {names[key]}, MiB", [_mebibytes(row, key) for row in rows])
    title, notes = _heading(operation, rows, part), _notes(operation, measured, rows)
    return Table(title, header, lines, text_columns, notes)


def _long_table(operation: str, rows: Sequence[dict[str, Any]], part: str) -> Table:
    """A line an implementation, which fits into a narrow terminal."""
    names, measured = titles(operation), _measured(operation, rows)
    columns = _case_columns(operation)
    with_memory = any(row["extra_peak_bytes"] for row in rows)
    lines = []
    for row in rows:
        cells = _case_cells(row)
        for key in (key for key in measured if key in row["median_ms"]):
            ratio = row["ratio"].get(key)
            lines.append(
                [
                    *cells,
                    names[key],
                    f"{row['median_ms'][key]:.1f}",
                    "" if ratio is None else f"{ratio:.1f}×",
                    *([_mebibytes(row, key)] if with_memory else []),
                ]
            )
            cells = [""] * len(columns)  # once a case
    header = [*columns, "", "ms", "ratio", *(["MiB"] if with_memory else [])]
    title, notes = _heading(operation, rows, part), _notes(operation, measured, rows)
    return Table(title, header, lines, len(columns) + 1, notes)


def _mebibytes(row: dict[str, Any], key: str) -> str:
    peak = row["extra_peak_bytes"].get(key)
    return _number(None if peak is None else peak / 2**20, ".0f")


def _notes(operation: str, measured: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far the results agree, what is not equal, and what was left out."""
    names = titles(operation)
    notes = []
    worst: dict[str, tuple[float, float]] = {}
    for row in rows:
        for key, agreements in row["agreement"].items():
            for found in agreements:
                pair = found["difference"], found["tolerance"]
                worst[key] = max(worst.get(key, (0.0, 1.0)), pair, key=lambda p: p[0] / p[1])
    if worst:
        text = ", ".join(
            f"{names[key]} {difference:.1e} of {tolerance:.0e}"
            for key, (difference, tolerance) in worst.items()
        )
        notes.append(f"largest difference from our result, and what is allowed: {text}")
    implementations = OPERATIONS[operation].implementations
    notes += [
        f"{names[key]}: {implementations[key].remark}"
        for key in measured
        if implementations[key].remark
    ]
    reasons = {
        f"{names[key]} left out at {_shape(row)} {row['mode']}: {reason}"
        for row in rows
        for key, reason in row["left_out"].items()
    }
    return notes + sorted(reasons)


def _speedup_table(entries: Sequence[dict[str, Any]]) -> Table:
    counts = sorted({count for entry in entries for count in entry["median_ms"]})
    header = ["operation", "step", "shape", ""]
    header += [f"{count} thread{'s' if count > 1 else ''}, ms" for count in counts] + ["speed-up"]
    lines = [
        [
            entry["operation"],
            entry["mode"],
            _shape(entry),
            titles(entry["operation"])[entry["implementation"]],
            *(_number(entry["median_ms"].get(count), ".1f") for count in counts),
            f"{entry['speedup']:.2f}",
        ]
        for entry in entries
    ]
    return Table("threads", header, lines, 4)


def _scaling_table(fits: Sequence[dict[str, Any]]) -> Table:
    header = ["axis", "", "sizes", "ms", "exponent", "between neighbours"]
    lines = [
        [
            fit["axis"],
            titles(fit["operation"])[fit["implementation"]],
            f"{fit['sizes'][0]} to {fit['sizes'][-1]} ({len(fit['sizes'])})",
            f"{fit['median_ms'][0]:.1f} to {fit['median_ms'][-1]:.1f}",
            f"{fit['exponent']:.2f}" + ("" if fit["error"] is None else f" ± {fit['error']:.2f}"),
            f"{fit['lowest']:.2f} to {fit['highest']:.2f}",
        ]
        for fit in fits
    ]
    note = (
        "time ∝ size^exponent: least squares through (points) in log-log, ± its standard error; "
        f"at {fits[0]['threads']} threads"
    )
    return Table("scaling of a training step of dse_components", header, lines, 4, [note])


def _share_table(shares: Sequence[dict[str, Any]]) -> Table:
    header = ["backbone", "images", "(B, N, d)", "step, ms", "dse-ext, ms", "share, %"]
    lines = [
        [
            share["model"],
            str(share["images"]),
            _shape(share),
            f"{share['backbone_ms']:.0f}",
            f"{share['dse_ms']:.1f}",
            f"{100 * share['share']:.1f}",
        ]
        for share in shares
    ]
    return Table("share of a training step", header, lines, 3, [shares[0]["step"]])


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def markdown(table: Table) -> str:
    """A table as aligned Markdown, without its title and notes."""
    columns = range(len(table.header))
    widths = [max(len(line[i]) for line in (table.header, *table.lines)) for i in columns]

    def join(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < table.text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * w if i < table.text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)
    ]
    return "\n".join([join(table.header), join(rule), *(join(line) for line in table.lines)])
