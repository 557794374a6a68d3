"""How a training step grows with B, N, d and k, and what a second thread brings."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import SCALING_CASES, THREADS_CASES
from benchmarks.turns import time_turn, turns
from dse_ext.bench.case import Case
from dse_ext.bench.operation import OURS

_SCALING_TURNS = turns(SCALING_CASES, lambda case: [OURS, "batched"])


@pytest.mark.parametrize(("turn", "case", "key"), _SCALING_TURNS)
def test_scaling(benchmark: BenchmarkFixture, turn: int, case: Case, key: str) -> None:
    """Times one turn at a point of an axis."""
    time_turn(benchmark, turn, case, key, rounds=4 if key == OURS else 2)


@pytest.mark.parametrize(("turn", "case", "key"), turns(THREADS_CASES))
def test_threads(benchmark: BenchmarkFixture, turn: int, case: Case, key: str) -> None:
    """Times one turn with some number of threads."""
    time_turn(benchmark, turn, case, key, rounds=4 if key == OURS else 2)
