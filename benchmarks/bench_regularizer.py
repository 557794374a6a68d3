"""The DSE regularizer against its peers: time of a step and extra peak memory.

The implementations take turns, twice and in opposite orders, on the same inputs, so that a slow
phase of the machine meets all of them. Every round draws new k-means seeds.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import Module

from benchmarks.cases import CASES, IMPLEMENTATIONS, SHAPES, Case, make_features, run
from benchmarks.memory import measure

_TURNS = [
    pytest.param(turn, case, key, id=f"{case.name}-{key}-{turn}")
    for turn, keys in enumerate((list(IMPLEMENTATIONS), list(IMPLEMENTATIONS)[::-1]))
    for case in CASES
    for key in keys
]


@cache
def _module(key: str) -> Module:
    if key == "lightly":
        pytest.importorskip("lightly")
    return IMPLEMENTATIONS[key].build()


@cache
def _features(kind: str, shape: tuple[int, int, int]) -> Tensor:
    return make_features(kind, shape)


@cache
def _extra_peak_memory(key: str) -> dict[tuple[int, int, int], int | None]:
    return measure(key, SHAPES)


@pytest.mark.parametrize(("turn", "case", "key"), _TURNS)
def test_step(benchmark: BenchmarkFixture, turn: int, case: Case, key: str) -> None:
    """Times one step of one implementation."""
    module = _module(key)
    z = _features(case.kind, case.shape).clone().requires_grad_(case.mode == "training")
    seeds = iter(range(1000 * turn, 1000 * (turn + 1)))

    def fresh_step() -> tuple[tuple[Module, Tensor, str], dict[str, object]]:
        torch.manual_seed(next(seeds))
        z.grad = None
        return (module, z, case.mode), {}

    benchmark.group = case.name
    benchmark.extra_info.update(
        implementation=key,
        title=IMPLEMENTATIONS[key].title,
        kind=case.kind,
        shape=list(case.shape),
        mode=case.mode,
    )
    # Memory is that of a training step, the larger of the two; once per shape is enough.
    if turn == 0 and case.mode == "training" and case.kind == "mixture":
        benchmark.extra_info["extra_peak_bytes"] = _extra_peak_memory(key)[case.shape]
    loss = benchmark.pedantic(  # type: ignore[no-untyped-call]
        run,
        setup=fresh_step,
        rounds=IMPLEMENTATIONS[key].rounds,
        warmup_rounds=1 if turn == 0 else 0,
    )
    assert torch.isfinite(loss)
