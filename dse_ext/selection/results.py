"""Reads what ``dse-ext evaluate`` writes: one row a checkpoint, several runs in a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dse_ext.selection.tables import ResultsError, Row, read_csv, require, some

Vector = npt.NDArray[np.float64]

#: Columns with a number each; those that a table lacks are left out of `RunResults.metrics`.
NUMBERS = (
    "m_inter",
    "m_intra_image",
    "m_intra_batch",
    "m_intra",
    "class_relevance",
    "m_dim",
    "avg_norm",
    "rankme",
    "rankme_dense",
    "alpha_req",
    "lidar",
)
# Values that have to be the same for the checkpoints of a run to be comparable.
_SETTINGS = ("method", "variant", "images")


@dataclass(frozen=True)
class RunResults:
    """The measured checkpoints of one run, in the order of training.

    Attributes:
        run: Name of the run.
        checkpoints: File names.
        epochs: Their epochs, ascending.
        metrics: One float64 vector a metric, NaN where a value is missing. `class_relevance` and
            `m_dim` are always there.
        settings: `method`, `variant` and `images` where the table has them, as text.
        source: Where the run was read from, for messages.
    """

    run: str
    checkpoints: tuple[str, ...]
    epochs: tuple[float, ...]
    metrics: Mapping[str, Vector]
    settings: Mapping[str, str] = field(default_factory=dict)
    source: str = ""


def read_results(*paths: str | os.PathLike[str]) -> list[RunResults]:
    """Reads results of one or more runs.

    A table needs the columns `checkpoint`, `epoch`, `m_dim`, and either `class_relevance` or what
    it is made of: `m_inter` with `m_intra`, or with `m_intra_image` and `m_intra_batch`. A column
    `run` names the run of each row; without it the table is one run with the name of its folder.

    Args:
        *paths: Folders that `dse-ext evaluate` wrote (their `results.csv` is read, or
            `results.json` where there is no other), or such files.

    Returns:
        The runs in the order in which they are first named, each sorted by epoch.

    Raises:
        ResultsError: If a file or column is missing, a cell is no number, an epoch comes twice in
            a run, or the rows of a run were measured with different settings.

    Examples:
        >>> from dse_ext.selection import read_results
        >>> [(run.run, len(run.epochs)) for run in read_results("results")]
        [('dino', 40), ('ibot', 32)]
    """
    if not paths:
        raise ResultsError("no results were given: name a folder that dse-ext evaluate wrote.")
    rows: dict[str, list[Row]] = {}
    origin: dict[str, Path] = {}
    for given in paths:
        path = _table(Path(given))
        for row in _rows(path):
            run = row.text("run") or _folder_name(path)
            if origin.setdefault(run, path) != path:
                raise ResultsError(
                    f"run {run!r} is in both {origin[run]} and {path}: give the runs different "
                    "names (column run; dse-ext evaluate --run NAME)."
                )
            rows.setdefault(run, []).append(row)
    return [_run(run, rows[run], origin[run]) for run in rows]


def _folder_name(path: Path) -> str:
    return path.resolve().parent.name


def _table(path: Path) -> Path:
    """The file to read for a path that a user gave."""
    if path.is_dir():
        for name in ("results.csv", "results.json"):
            if (path / name).is_file():
                return path / name
        raise ResultsError(
            f"{path} has neither results.csv nor results.json: it is no folder that "
            "dse-ext evaluate wrote."
        )
    if not path.is_file():
        raise ResultsError(f"{path} does not exist: a results folder or file was expected.")
    return path


def _rows(path: Path) -> list[Row]:
    if path.suffix.lower() == ".json":
        columns, rows = _read_json(path)
    else:
        columns, rows = read_csv(path)
    require(path, columns, ("checkpoint", "epoch", "m_dim"))
    if "class_relevance" not in columns:
        parts = ("m_intra",) if "m_intra" in columns else ("m_intra_image", "m_intra_batch")
        missing = [name for name in ("m_inter", *parts) if name not in columns]
        if missing:
            raise ResultsError(
                f"{path} has no column class_relevance, nor {', '.join(missing)} to compute it "
                f"from; it has {', '.join(columns)}."
            )
    return rows


def _read_json(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"cannot read {path} as JSON: {error}.") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != 1:
        raise ResultsError(f"{path} must be results of format 1, got format {version!r}.")
    checkpoints = content.get("checkpoints")
    if not isinstance(checkpoints, list) or not checkpoints:
        raise ResultsError(f"{path} has no row: one for each checkpoint is needed.")
    if not all(isinstance(values, dict) for values in checkpoints):
        raise ResultsError(f"{path}: checkpoints must be a list of objects.")
    columns = tuple(dict.fromkeys(name for values in checkpoints for name in values))
    rows = [Row(f"{path}, checkpoint {i}", values) for i, values in enumerate(checkpoints)]
    return columns, rows


def _run(run: str, rows: Sequence[Row], path: Path) -> RunResults:
    settings: dict[str, str] = {}
    for name in _SETTINGS:
        found = list(dict.fromkeys(row.text(name) for row in rows if row.text(name)))
        if len(found) > 1:
            raise ResultsError(
                f"{path}: the checkpoints of run {run!r} were measured with different {name} "
                f"({some(found)}), so their DSE cannot be compared: keep one of them, or give the "
                "others another run name."
            )
        if found:
            settings[name] = found[0]
    rows = sorted(rows, key=Row.epoch)
    for before, row in pairwise(rows):
        if before.epoch() == row.epoch():
            raise ResultsError(
                f"{row.where}: epoch {row.epoch()} of run {run!r} is there twice, as "
                f"{before.text('checkpoint')} and {row.text('checkpoint')}: a run has one "
                "checkpoint an epoch (name different runs apart in the column run)."
            )
    names = [row.text("checkpoint") for row in rows]
    for name, row in zip(names, rows, strict=True):
        if not name:
            raise ResultsError(f"{row.where}: column checkpoint is empty.")
        if names.count(name) > 1:
            raise ResultsError(f"{row.where}: checkpoint {name} of run {run!r} is there twice.")
    metrics = {
        name: np.array([row.number(name) for row in rows])
        for name in NUMBERS
        if any(name in row.values for row in rows)
    }
    if "class_relevance" not in metrics:
        m_intra = metrics.get("m_intra")
        if m_intra is None:
            m_intra = (metrics["m_intra_image"] + metrics["m_intra_batch"]) / 2
        metrics["class_relevance"] = metrics["m_inter"] - m_intra
    return RunResults(
        run, tuple(names), tuple(row.epoch() for row in rows), metrics, settings, str(path)
    )
