"""Settings of a benchmark run, and the facts about the machine that its results need."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import pytest
import torch

import dse_ext
from benchmarks.cases import THREADS
from benchmarks.machine import cpu_name


def _lightly_version() -> str | None:
    try:
        return importlib.metadata.version("lightly")
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """Adds what decides the figures to the results of pytest-benchmark."""
    machine_info["dse"] = {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": THREADS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightly": _lightly_version(),
        "dse_ext": dse_ext.__version__,
    }


@pytest.fixture(autouse=True)
def threads() -> None:
    """All implementations get the same number of threads."""
    torch.set_num_threads(THREADS)
