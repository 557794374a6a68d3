"""Reads a table of true quality: the mIoU of each checkpoint on one or more data sets."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dse_ext.selection.results import RunResults
from dse_ext.selection.tables import ResultsError, Row, read_csv, require, some

_KEYS = ("run", "checkpoint", "epoch")


@dataclass(frozen=True)
class MiouTable:
    """The mIoU of checkpoints on data sets.

    Attributes:
        datasets: Names of the data sets (columns), in order.
        rows: mIoU in [0, 1] by run, checkpoint and data set; NaN where it is missing. The run is
            None in a table without that column.
        epochs: The epoch by run and checkpoint, where the table has that column.
        ignored: Columns that hold no numbers.
        source: Where the table was read from, for messages.
    """

    datasets: tuple[str, ...]
    rows: Mapping[tuple[str | None, str], Mapping[str, float]]
    epochs: Mapping[tuple[str | None, str], float]
    ignored: tuple[str, ...] = ()
    source: str = ""

    def of(self, run: RunResults) -> dict[str, npt.NDArray[np.float64]]:
        """The mIoU of a run's checkpoints in their order, one vector a data set.

        Args:
            run: The run.

        Returns:
            One float64 vector a data set, NaN for a checkpoint without a value.

        Raises:
            ResultsError: If the table has no row of the run, none of its checkpoints, or another
                epoch for one of them.
        """
        key = None if (None, next(iter(self.rows))[1]) in self.rows else run.run
        known = [name for of_run, name in self.rows if of_run == key]
        if not known:
            runs = list(dict.fromkeys(str(of_run) for of_run, _ in self.rows))
            raise ResultsError(
                f"{self.source} has no row of run {run.run!r}; it has the runs {some(runs)}."
            )
        if not set(known) & set(run.checkpoints):
            raise ResultsError(
                f"no checkpoint of run {run.run!r} is in {self.source}: the results have "
                f"{some(run.checkpoints)}, the table has {some(known)}."
            )
        for name, epoch in zip(run.checkpoints, run.epochs, strict=True):
            other = self.epochs.get((key, name), epoch)
            if other != epoch:
                raise ResultsError(
                    f"checkpoint {name} of run {run.run!r} has epoch {epoch} in the results and "
                    f"epoch {other} in {self.source}: the tables are not of the same checkpoints."
                )
        nothing: dict[str, float] = {}
        return {
            dataset: np.array(
                [
                    self.rows.get((key, name), nothing).get(dataset, math.nan)
                    for name in run.checkpoints
                ]
            )
            for dataset in self.datasets
        }


def read_miou(path: str | os.PathLike[str]) -> MiouTable:
    """Reads a table such as ``miou.csv`` of ``dse-ext probe``.

    Args:
        path: A CSV file with the column `checkpoint` and one column of mIoU in [0, 1] for each
            data set. A column `run` is needed where there are several runs; a column `epoch` is
            compared with that of the results. Columns without any number are ignored.

    Returns:
        The table.

    Raises:
        ResultsError: If a column is missing, a checkpoint is there twice, a value lies outside
            [0, 1], or there is no data set.

    Examples:
        >>> from dse_ext.selection import read_miou
        >>> read_miou("miou.csv").datasets
        ('voc_linear', 'ade20k_linear')
    """
    path = Path(path)
    columns, rows = read_csv(path)
    require(path, columns, ("checkpoint",))
    others = [name for name in columns if name and name not in _KEYS]
    datasets = tuple(name for name in others if any(_is_number(row.text(name)) for row in rows))
    if not datasets:
        raise ResultsError(
            f"{path} has no column of numbers besides {', '.join(_KEYS)}: one column of mIoU "
            "for each data set is needed."
        )
    table: dict[tuple[str | None, str], dict[str, float]] = {}
    epochs: dict[tuple[str | None, str], float] = {}
    for row in rows:
        key = (row.text("run") if "run" in columns else None, row.text("checkpoint"))
        if key in table:
            raise ResultsError(
                f"{row.where}: checkpoint {key[1]}"
                + (f" of run {key[0]!r}" if key[0] is not None else "")
                + " is there twice."
            )
        table[key] = {name: _miou(row, name) for name in datasets}
        if row.text("epoch"):
            epochs[key] = row.epoch()
    return MiouTable(
        datasets, table, epochs, tuple(name for name in others if name not in datasets), str(path)
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _miou(row: Row, column: str) -> float:
    value = row.number(column)
    if not (math.isnan(value) or 0 <= value <= 1):
        hint = " (divide percentages by 100)" if 1 < value <= 100 else ""
        raise ResultsError(
            f"{row.where}: column {column} must hold mIoU in [0, 1], got {value:g}{hint}."
        )
    return value
