"""k-means, nuclear norms and effective ranks against scikit-learn, faiss, torch and scipy."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import OPERATION_CASES
from benchmarks.turns import time_turn, turns
from dse_ext.bench.case import Case


@pytest.mark.parametrize(("turn", "case", "key"), turns(OPERATION_CASES))
def test_operation(benchmark: BenchmarkFixture, turn: int, case: Case, key: str) -> None:
    """Times one turn."""
    time_turn(benchmark, turn, case, key, rounds=4)
