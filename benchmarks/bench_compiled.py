"""What torch.compile makes of the batched PyTorch peers; skipped, with the reason, where it fails.

The compiler's own time is not part of the figures.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import COMPILED_CASES
from benchmarks.turns import time_turn, turns
from dse_ext.bench.case import Case
from dse_ext.bench.operation import OURS

_TURNS = turns(COMPILED_CASES, lambda case: [OURS, "compiled"], case_by_case=True)


@pytest.mark.parametrize(("turn", "case", "key"), _TURNS)
def test_compiled(benchmark: BenchmarkFixture, turn: int, case: Case, key: str) -> None:
    """Times one turn."""
    time_turn(benchmark, turn, case, key, rounds=4)
