"""Lets these tests run alone, with torch, NumPy and pytest installed and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # oracle.py, parity.py


def pytest_report_header() -> list[str]:
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
