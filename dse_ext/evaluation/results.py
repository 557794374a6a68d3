"""The results folder: one file a finished checkpoint, and the tables made of them.

Nothing in the tables depends on when, where or in how many pieces they were computed: a sweep that
was interrupted ends in the same bytes as one that was not.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse_ext.checkpoints import CheckpointError, CheckpointFile
from dse_ext.evaluation.scores import FIGURES
from dse_ext.ssl.storage import save_text

FORMAT = 1
COLUMNS = ("run", "checkpoint", "epoch", "method", "variant", "images", *FIGURES)


class SettingsDifferError(ValueError):
    """A results folder holds results that were computed with other settings."""


class ResultsFolder:
    """Paths and formats of a results folder.

    Attributes:
        root: The folder.
        csv: ``results.csv``, one row a checkpoint.
        json: ``results.json``, the same with the settings and the skipped checkpoints.
        settings: ``settings.json``, what all results of the folder have in common.
        images: ``images.txt``, the images they were computed on.
        parts: ``parts/``, one file a checkpoint that is done.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.csv = root / "results.csv"
        self.json = root / "results.json"
        self.settings = root / "settings.json"
        self.images = root / "images.txt"
        self.parts = root / "parts"

    def prepare(self, settings: Mapping[str, Any], names: list[str], overwrite: bool) -> None:
        """Makes the folder ready for results with these settings.

        Raises:
            SettingsDifferError: If it holds results with other settings.
        """
        if overwrite:
            shutil.rmtree(self.parts, ignore_errors=True)
            for path in (self.settings, self.images, self.csv, self.json):
                path.unlink(missing_ok=True)
        if self.settings.is_file():
            self._check(settings, json.loads(self.settings.read_text(encoding="utf-8")))
        for stale in [*self.root.glob(".*.tmp"), *self.parts.glob(".*.tmp")]:
            stale.unlink(missing_ok=True)  # left by a process that was killed
        self.parts.mkdir(parents=True, exist_ok=True)
        save_text(self.images, "".join(f"{name}\n" for name in names))
        save_text(self.settings, _json(settings))

    def _check(self, given: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
        differing = [
            f"{key} = {kept.get(key)!r} there and {given.get(key)!r} here"
            for key in {**kept, **given}
            if kept.get(key) != given.get(key)
        ]
        if differing:
            raise SettingsDifferError(
                f"{self.root} holds results with other settings ({'; '.join(differing)}), which "
                "cannot be compared: choose another --out, or start again with --overwrite."
            )

    def is_done(self, file: CheckpointFile) -> bool:
        """Whether a checkpoint has been scored, and its file is still the same one."""
        part = self._read(self._part(file))
        return part is not None and "row" in part and part["file"] == _stamp(file)

    def add(self, file: CheckpointFile, row: Mapping[str, Any]) -> None:
        """Keeps the row of a checkpoint."""
        self._write(file, {"row": {key: _finite(value) for key, value in row.items()}})

    def add_skipped(self, file: CheckpointFile, error: CheckpointError) -> None:
        """Keeps the reason why a checkpoint could not be scored."""
        skipped = {
            "run": file.run,
            "checkpoint": file.path.name,
            "epoch": file.epoch,
            "reason": error.reason,
            "missing": list(error.missing),
            "unexpected": list(error.unexpected),
        }
        self._write(file, {"skipped": skipped})

    def merge(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Writes the tables of all checkpoints that are done.

        Returns:
            Their rows, and what was skipped.
        """
        parts = [part for path in self.parts.glob("*.json") if (part := self._read(path))]
        rows = sorted((part["row"] for part in parts if "row" in part), key=_order)
        skipped = sorted((part["skipped"] for part in parts if "skipped" in part), key=_order)
        settings = json.loads(self.settings.read_text(encoding="utf-8"))
        content = {
            "format": FORMAT,
            "settings": settings,
            "checkpoints": rows,
            "skipped": skipped,
        }
        save_text(self.json, _json(content))
        save_text(self.csv, _csv(rows))
        return rows, skipped

    def _part(self, file: CheckpointFile) -> Path:
        return self.parts / f"{file.run}--{file.path.name}.json".replace("/", "__")

    def _write(self, file: CheckpointFile, content: Mapping[str, Any]) -> None:
        save_text(self._part(file), _json({"file": _stamp(file), **content}))

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content


def _stamp(file: CheckpointFile) -> dict[str, int]:
    """What tells a file from one that took its place. It stays in the part files."""
    status = file.path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["run"], row["epoch"] is None, row["epoch"] or 0, row["checkpoint"])


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(["" if row[name] is None else _cell(row[name]) for name in COLUMNS])
    return text.getvalue()


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
