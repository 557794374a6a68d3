"""The DSE regularizer against its peers: time of a step and extra peak memory."""

from __future__ import annotations

from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import REGULARIZER_CASES
from benchmarks.turns import time_turn, turns
from dse_ext.bench.case import Case
from dse_ext.bench.memory import extra_peak_bytes
from dse_ext.bench.operation import OURS

#: Memory is that of a training step, the larger of the two; once per shape is enough.
_MEMORY_CASES = [
    case for case in REGULARIZER_CASES if (case.mode, case.kind) == ("training", "mixture")
]


@cache
def _extra_peak_memory(key: str) -> dict[Case, int | None]:
    return extra_peak_bytes(key, _MEMORY_CASES)


@pytest.mark.parametrize(("turn", "case", "key"), turns(REGULARIZER_CASES))
def test_step(benchmark: BenchmarkFixture, turn: int, case: Case, key: str) -> None:
    """Times one turn, fewer rounds of the peers, which take seconds."""
    time_turn(benchmark, turn, case, key, rounds=5 if key == OURS else 3)
    if turn == 0 and case in _MEMORY_CASES:
        benchmark.extra_info["extra_peak_bytes"] = _extra_peak_memory(key)[case]
