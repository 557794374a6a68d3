"""One benchmark of pytest-benchmark is one turn of one implementation at one case.

The implementations take turns, twice and in opposite orders, on the same inputs, so that a slow
phase of the machine meets all of them. Before its first turn a peer's result is compared with ours:
where it is not the same quantity, the benchmark fails and there is no time to count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import count
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dse_ext.bench.case import Case
from dse_ext.bench.machine import set_threads
from dse_ext.bench.operation import OURS, Agreement, Contestant
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.timing import compile_now, get_ready, one_step, synchronize

#: Seconds that a compiler gets for one case.
COMPILER_SECONDS = 90.0

Keys = Callable[[Case], Sequence[str]]


def eager(case: Case) -> list[str]:
    """All implementations of a case that do not compile."""
    found = OPERATIONS[case.operation].implementations
    return [key for key, implementation in found.items() if not implementation.compiled]


def turns(cases: Iterable[Case], keys: Keys = eager, *, case_by_case: bool = False) -> list[Any]:
    """The parameters `turn`, `case` and `key` of a benchmark.

    Args:
        cases: What is measured.
        keys: Who takes part.
        case_by_case: Whether the second turn of a case follows its first one. Compiling for
            another case in between would drop what was compiled for this one.

    Returns:
        The first turn of all cases, then the second one, with the implementations in the
        opposite order.
    """
    own = list(cases)
    order = [(turn, case) for turn in range(2) for case in own]
    if case_by_case:
        order.sort(key=lambda entry: own.index(entry[1]))
    return [
        pytest.param(turn, case, key, id=f"{case.part.replace(' ', '-')}-{case.name}-{key}-{turn}")
        for turn, case in order
        for key in list(keys(case))[:: 1 - 2 * turn]
    ]


@lru_cache(maxsize=2)
def _input(case: Case) -> Tensor:
    return OPERATIONS[case.operation].inputs(case)


_AGREEMENTS: dict[tuple[Case, str], list[Agreement]] = {}


@lru_cache(maxsize=8)
def _contestant(case: Case, key: str) -> Contestant:
    """Ready to be timed; skips what cannot run, fails where the result is another."""
    implementation = OPERATIONS[case.operation].implementations[key]
    if (reason := implementation.obstacle(case)) is not None:
        pytest.skip(f"{implementation.title}: {reason}")
    x = _input(case)
    if (case, key) in _AGREEMENTS and not implementation.compiled:
        contestant = implementation.prepare(case, x)
        set_threads(case.threads)
    elif implementation.compiled:
        made, _AGREEMENTS[case, key], reason = compile_now(case, key, x, COMPILER_SECONDS)
        if made is None:
            pytest.skip(f"{implementation.title}: {reason}")
        contestant = made
    else:
        contestant, _AGREEMENTS[case, key] = get_ready(case, key, x)
    one_step(contestant, case, seed=0)
    return contestant


def time_turn(benchmark: BenchmarkFixture, turn: int, case: Case, key: str, rounds: int) -> None:
    """Times the turn of an implementation.

    Args:
        benchmark: The fixture.
        turn: 0 or 1.
        case: The case.
        key: The implementation.
        rounds: Steps that are timed.
    """
    contestant = _contestant(case, key)
    agreements = _AGREEMENTS.get((case, key), [])
    wrong = [str(agreement) for agreement in agreements if not agreement.holds]
    assert not wrong, f"{key} computes something else than {OURS}: {'; '.join(wrong)}"
    set_threads(case.threads)
    seeds = count(1000 * (1 + turn))

    def fresh_round() -> tuple[tuple[()], dict[str, object]]:
        contestant.reset(next(seeds))
        return (), {}

    def step() -> Any:
        result = contestant.step()
        synchronize(case)
        return result

    benchmark.group = f"{case.part}-{case.name}"
    benchmark.extra_info.update(
        case=case.to_dict(),
        implementation=key,
        agreements=[asdict(agreement) for agreement in agreements],
    )
    benchmark.pedantic(step, setup=fresh_round, rounds=rounds)  # type: ignore[no-untyped-call]
