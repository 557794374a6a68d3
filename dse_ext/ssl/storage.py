"""The folder of a run: what is in it, and how it is written without ever being half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dse_ext.files import replacing as replacing
from dse_ext.files import save_text as save_text


class RunFolder:
    """Paths and file formats of one run.

    Attributes:
        root: The folder.
        config: ``config.json``, the configuration.
        metrics: ``metrics.jsonl``, one line per step.
        scores: ``scores.jsonl``, one line per scored checkpoint.
        state: ``resume.pt``, everything that a resumed run starts from.
        results: ``results.json``, the outcome.
        report: ``report.html``, the same for the eye.
        checkpoints: ``checkpoints/``, the networks that were kept.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.metrics = self.root / "metrics.jsonl"
        self.scores = self.root / "scores.jsonl"
        self.state = self.root / "resume.pt"
        self.results = self.root / "results.json"
        self.report = self.root / "report.html"
        self.checkpoints = self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Path of the network after a number of steps."""
        return self.checkpoints / f"step_{step:07d}.pt"


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Writes tensors and plain values, completely or not at all."""
    with replacing(path) as temporary:
        torch.save(dict(content), temporary)


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_tensors` wrote; runs no code from the file."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a JSONL file; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a JSONL file, completely or not at all."""
    save_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one line to a JSONL file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
