"""The results of probing checkpoints: a CSV table for people, a JSON file with all details.

The JSON file says how each column was measured, so that a sweep is not continued with other
settings, and holds the scores of the single classes. The CSV table is what selection is compared
with; columns and rows that someone else wrote are kept.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from dse_ext.probes.score import ProbeScore

_KEYS = ("run", "checkpoint", "epoch")


class ProbeResults:
    """Scores by column (data set and probe) and checkpoint.

    Examples:
        >>> results = ProbeResults.read(csv_text, json_text)
        >>> results.begin("voc_linear", settings, classes)
        >>> results.add("voc_linear", "dino", "checkpoint0100.pth", 100, score)
        >>> results.csv(), results.json()
    """

    def __init__(self) -> None:
        self._columns: dict[str, dict[str, Any]] = {}
        self._table: dict[tuple[str, str], dict[str, str]] = {}
        self._names: list[str] = list(_KEYS)

    @classmethod
    def read(cls, table: str | None, details: str | None) -> ProbeResults:
        """Reads what :meth:`csv` and :meth:`json` gave.

        Args:
            table: The CSV text; None where there is none yet.
            details: The JSON text; None where there is none yet.

        Returns:
            The results.

        Raises:
            ValueError: If a text is not what it should be.
        """
        results = cls()
        if details is not None:
            try:
                content = json.loads(details)
            except ValueError as error:
                raise ValueError(f"probe.json is no JSON: {error}.") from error
            if not isinstance(content, dict) or content.get("format") != 1:
                raise ValueError("probe.json must be of format 1.")
            results._columns = content["columns"]
        if table is not None:
            reader = csv.DictReader(io.StringIO(table))
            names = list(reader.fieldnames or ())
            if missing := [name for name in _KEYS if name not in names]:
                raise ValueError(f"miou.csv has no column {', '.join(missing)}.")
            results._names = [*_KEYS, *(name for name in names if name not in _KEYS)]
            for row in reader:
                results._table[row["run"], row["checkpoint"]] = {
                    name: row.get(name) or "" for name in results._names
                }
        # The details are written first: the table may lack the last score, never the other way.
        for column, entry in results._columns.items():
            results._add_column(column)
            for score in entry["checkpoints"]:
                results._set(column, score)
        return results

    def begin(
        self,
        column: str,
        settings: Mapping[str, Any],
        classes: tuple[str, ...],
        networks: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Starts a column, or continues it.

        Args:
            column: Its name.
            settings: How it is measured: values that JSON can hold.
            classes: Names of the classes.
            networks: How the networks of each run are read, by name of the run: what may differ
                from one run of a column to the next, but not within a run.
            overwrite: Forget what was measured of these runs before (of all runs, where the
                settings or classes are other ones).

        Raises:
            ValueError: If the column was measured with other settings, or is in the table but not
                by a probe.
        """
        # As it will be read back.
        wanted = json.loads(
            json.dumps(
                {
                    "settings": dict(settings),
                    "classes": list(classes),
                    "networks": {run: dict(values) for run, values in (networks or {}).items()},
                }
            )
        )
        entry = self._columns.get(column)
        if entry is None:
            if column in self._names and not overwrite:
                raise ValueError(
                    f"miou.csv has a column {column} that was not measured by a probe: give the "
                    "new one another name (--name), or replace it (--overwrite)."
                )
            self._columns[column] = {**wanted, "checkpoints": []}
            self._add_column(column)
            self._clear(column, None)
            return
        other = _differences(entry["settings"], wanted["settings"])
        if entry["classes"] != wanted["classes"]:
            other.append("other classes")
        of_runs = [
            difference
            for run, values in wanted["networks"].items()
            for difference in _differences(entry["networks"].get(run, values), values)
        ]
        if overwrite:
            runs = None if other else set(wanted["networks"])
            self._clear(column, runs)
            kept = {} if runs is None else entry["networks"]
            entry.update(wanted, networks={**kept, **wanted["networks"]})
            return
        if other or of_runs:
            raise ValueError(
                f"the column {column} was measured with other settings "
                f"({'; '.join(other + of_runs)}): give the new one another name (--name), or "
                "measure everything again (--overwrite)."
            )
        entry["networks"].update(wanted["networks"])

    def _clear(self, column: str, runs: set[str] | None) -> None:
        """Forgets the values of some runs, or of all."""
        entry = self._columns[column]
        entry["checkpoints"] = [
            score for score in entry["checkpoints"] if runs is not None and score["run"] not in runs
        ]
        for row in self._table.values():
            if runs is None or row["run"] in runs:
                row[column] = ""

    def has(self, column: str, run: str, checkpoint: str) -> bool:
        """Whether a checkpoint has been measured."""
        return any(
            (entry["run"], entry["checkpoint"]) == (run, checkpoint)
            for entry in self._columns[column]["checkpoints"]
        )

    def add(
        self, column: str, run: str, checkpoint: str, epoch: int | None, score: ProbeScore
    ) -> None:
        """Adds the score of a checkpoint.

        Args:
            column: The column, which has been begun.
            run: Name of the run.
            checkpoint: Name of the checkpoint's file.
            epoch: Its epoch; None where it has none.
            score: The score.
        """
        entry = {
            "run": run,
            "checkpoint": checkpoint,
            "epoch": epoch,
            "miou": score.miou,
            "pixel_accuracy": score.pixel_accuracy,
            "class_iou": [None if math.isnan(iou) else iou for iou in score.class_iou],
        }
        self._columns[column]["checkpoints"].append(entry)
        self._columns[column]["checkpoints"].sort(key=_order)
        self._set(column, entry)

    def miou(self, column: str, run: str, checkpoint: str) -> float | None:
        """The mIoU of a checkpoint; None where it has not been measured."""
        text = self._table.get((run, checkpoint), {}).get(column, "")
        return float(text) if text else None

    def csv(self) -> str:
        """One row a checkpoint, ordered by run and epoch, with one column for each column."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self._names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(sorted(self._table.values(), key=_order))
        return text.getvalue()

    def json(self) -> str:
        """Settings, classes and all scores of every column."""
        content = {"format": 1, "columns": self._columns}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def _add_column(self, column: str) -> None:
        if column not in self._names:
            self._names.append(column)

    def _set(self, column: str, entry: Mapping[str, Any]) -> None:
        key = (entry["run"], entry["checkpoint"])
        epoch = "" if entry["epoch"] is None else str(entry["epoch"])
        start = {"run": key[0], "checkpoint": key[1], "epoch": epoch}
        self._table.setdefault(key, start)[column] = repr(float(entry["miou"]))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} {before.get(key)!r} then, {now.get(key)!r} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def _order(row: Mapping[str, Any]) -> tuple[str, float, str]:
    try:
        epoch = float(row["epoch"])
    except (TypeError, ValueError):
        epoch = math.inf
    return str(row["run"]), epoch, str(row["checkpoint"])
