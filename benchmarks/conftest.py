"""The facts about the machine that the results of a benchmark run need."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import DEVICE, THREADS
from dse_ext.bench.machine import facts


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """Adds what decides the figures to the results of pytest-benchmark."""
    machine_info["dse"] = facts(DEVICE, THREADS)
