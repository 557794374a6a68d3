"""CSV tables with one row a checkpoint: read strictly, with errors that name file, line and column.

Only the standard library: the tables are small and their errors are what users see.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ResultsError(ValueError):
    """A table of checkpoints cannot be used as it is; the message says what to change."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        where: File and line, for messages.
        values: The cells by column, as they were written.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The cell as text without surrounding white space; empty where there is none."""
        value = self.values.get(column)
        return "" if value is None else str(value).strip()

    def number(self, column: str) -> float:
        """The cell as a number; NaN where it is empty.

        Raises:
            ResultsError: If it is something else.
        """
        text = self.text(column)
        if not text:
            return math.nan
        try:
            return float(text)
        except ValueError:
            raise ResultsError(
                f"{self.where}: column {column} must hold numbers, got {text!r}."
            ) from None

    def epoch(self) -> float:
        """The cell of the column ``epoch``: an int where it is a whole number.

        Raises:
            ResultsError: If it is empty or no finite number.
        """
        value = self.number("epoch")
        if not math.isfinite(value):
            raise ResultsError(
                f"{self.where}: column epoch must hold a number, got {self.text('epoch')!r}."
            )
        return int(value) if value == int(value) else value


def read_csv(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    """Reads a CSV file with a header.

    Args:
        path: The file.

    Returns:
        The columns in order, and the rows.

    Raises:
        ResultsError: If there is no such file, it is no CSV, it has no row, or a row has more
            cells than the header.
    """
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which would be part of the first name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="")
            columns = tuple(name.strip() for name in reader.fieldnames or ())
            reader.fieldnames = list(columns)
            rows = [Row(f"{path}, line {reader.line_num}", values) for values in reader]
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ResultsError(f"{path} is not a CSV table in UTF-8: {error}.") from error
    if len(set(columns)) < len(columns):
        twice = sorted({name for name in columns if columns.count(name) > 1})
        raise ResultsError(f"{path} has a column twice: {', '.join(map(repr, twice))}.")
    for row in rows:
        if row.values.get("") is not None:
            raise ResultsError(f"{row.where}: more cells than the {len(columns)} columns.")
    if not rows:
        raise ResultsError(f"{path} has no row: one for each checkpoint is needed.")
    return columns, rows


def require(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises an error that names all missing columns of a table at once."""
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ResultsError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}."
        )


def some(names: Sequence[str], limit: int = 3) -> str:
    """A few names for a message, and how many there are besides."""
    shown = ", ".join(map(str, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
