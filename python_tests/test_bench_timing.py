"""Implementations, their agreement with ours, and how they take turns."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from dse_ext.bench import timing
from dse_ext.bench.case import MODES, Case
from dse_ext.bench.clustering import inertia
from dse_ext.bench.compiled import TimeLimitReached, time_limit
from dse_ext.bench.operation import OURS, Agreement, Contestant, Implementation
from dse_ext.bench.registry import OPERATIONS, contestants
from dse_ext.bench.timing import Measurement, Predictor, measure

SHAPES = {
    "dse_components": (9, 30, 16),
    "kmeans": (2, 96, 16),
    "cluster_nuclear_norms": (2, 96, 16),
    "effective_rank": (300, 16),
}
CASES = [
    Case(operation, shape, mode, clusters=24 if operation == "dse_components" else 6, dtype=dtype)
    for operation, shape in SHAPES.items()
    for mode in MODES
    for dtype in ("float32", "bfloat16")
    if mode in OPERATIONS[operation].modes
]
EAGER = [
    (case, key)
    for case in CASES
    for key, implementation in OPERATIONS[case.operation].implementations.items()
    if key != OURS and not implementation.compiled and case.mode in implementation.modes
]


@pytest.mark.parametrize(("case", "key"), EAGER, ids=lambda value: getattr(value, "name", value))
def test_a_peer_agrees_with_ours(case, key):
    implementation = OPERATIONS[case.operation].implementations[key]
    if (reason := implementation.obstacle(case)) is not None:
        pytest.skip(reason)
    x = OPERATIONS[case.operation].inputs(case)
    contestant, agreements = timing.get_ready(case, key, x)
    assert agreements
    assert [str(agreement) for agreement in agreements if not agreement.holds] == []
    if case.mode == "training" and case.operation != "kmeans":
        assert len(agreements) == 2
        contestant.reset(0)
        assert contestant.gradient() is None
        contestant.step()
        assert contestant.gradient().isfinite().all()


def test_an_agreement_that_is_not_a_number_does_not_hold():
    assert not Agreement("loss", float("nan"), 1.0).holds
    assert Agreement("loss", 0.5, 0.5).holds
    assert str(Agreement("loss", 0.5, 0.1)) == "loss differs by 5.0e-01, allowed 1e-01"


def test_inertia_is_the_sum_of_squared_distances_to_the_nearest_centroid():
    x = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [10.0, 0.0]]])
    assert inertia(x, torch.tensor([[[1.0, 0.0], [10.0, 2.0]]])).item() == 1 + 4 + 4


class Fake:
    """Implementations that note when they run."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def implementation(self, name: str, difference: float = 0.0, **options) -> Implementation:
        contestant = Contestant(lambda seed: None, lambda: self.log.append(name))
        return Implementation(
            name,
            lambda case, x: contestant,
            None if name == OURS else lambda case, x: [Agreement("value", difference, 0.1)],
            **options,
        )


@pytest.fixture
def fake(monkeypatch):
    made = Fake()
    implementations = {
        OURS: made.implementation(OURS),
        "right": made.implementation("right"),
        "wrong": made.implementation("wrong", difference=1.0),
    }
    operation = OPERATIONS["effective_rank"]
    monkeypatch.setitem(
        OPERATIONS,
        "effective_rank",
        type(operation)(**{**vars(operation), "implementations": implementations}),
    )
    return made


CASE = Case("effective_rank", (20, 4))


def test_implementations_take_turns_in_opposite_orders(fake):
    found = measure(CASE, [OURS, "right"], seconds=0.0, rounds=(3, 9))
    warm_up, rounds = fake.log[:1], fake.log[1:]
    assert warm_up == [OURS]  # the fake comparison runs nothing
    assert rounds == [OURS, "right", "right", OURS, OURS, "right"]
    assert {key: len(values) for key, values in found.seconds.items()} == {OURS: 3, "right": 3}


def test_more_rounds_where_there_is_time(fake):
    found = measure(CASE, [OURS, "right"], seconds=60.0, rounds=(2, 5))
    assert len(found.seconds[OURS]) == 5


def test_what_computes_something_else_is_not_timed(fake):
    found = measure(CASE, [OURS, "right", "wrong"], seconds=0.0)
    assert found.seconds.keys() == {OURS, "right"}
    assert found.left_out == {"wrong": "value differs by 1.0e+00, allowed 1e-01"}


def test_what_would_take_too_long_is_left_out(fake):
    predictor = Predictor()
    predictor.learn(Case("effective_rank", (10, 4)), "right", 5.0)
    assert predictor.seconds(CASE, "right") == 10.0
    forward = Case("effective_rank", (20, 4), "forward")
    assert predictor.seconds(forward, "right") == 10.0
    assert predictor.seconds(forward, OURS) is None
    found = measure(CASE, [OURS, "right"], seconds=0.0, left=lambda: 20.0, predictor=predictor)
    assert found.seconds.keys() == {OURS}
    assert found.left_out == {"right": "no time left: a step takes about 10.0 s"}
    found = measure(CASE, [OURS, "right"], seconds=0.0, left=lambda: 0.0)
    assert found.seconds == {}
    assert found.left_out[OURS] == "no time left"


def test_what_fails_is_named_and_the_rest_goes_on(fake, monkeypatch):
    def fails(case, x):
        raise RuntimeError("out of everything\nmore")

    broken = Implementation("broken", fails)
    monkeypatch.setitem(OPERATIONS["effective_rank"].implementations, "broken", broken)
    found = measure(CASE, [OURS, "broken"], seconds=0.0)
    assert found.left_out == {"broken": "RuntimeError: out of everything"}
    assert found.seconds.keys() == {OURS}


def test_an_interrupted_measurement_keeps_its_rounds(fake, monkeypatch):
    def interrupts(case, x):
        def step():
            if len(fake.log) >= 2:
                raise KeyboardInterrupt
            fake.log.append("peer")

        return Contestant(lambda seed: None, step)

    peer = Implementation("peer", interrupts)
    monkeypatch.setitem(OPERATIONS["effective_rank"].implementations, "peer", peer)
    found = Measurement(CASE)
    with pytest.raises(KeyboardInterrupt):
        measure(CASE, [OURS, "peer"], seconds=0.0, found=found)
    assert len(found.seconds[OURS]) == 1


def test_contestants_names_what_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("faiss", "sklearn") else find(name, *rest),
    )
    able, unable = contestants(Case("kmeans", (2, 50, 8), "forward"))
    assert able == [OURS, "batched"]
    assert unable == {
        "sklearn": "scikit-learn is not installed (pip install 'dse-ext[ssl]')",
        "faiss": "faiss-cpu is not installed (pip install 'dse-ext[bench]')",
    }
    on_gpu = Case("effective_rank", (50, 8), "forward", device="cuda")
    assert contestants(on_gpu)[1]["scipy"] == "it runs on CPUs only"
    other = Case("dse_components", (8, 50, 8), clusters=12)
    assert "lightly" not in contestants(other)[0]
    assert contestants(other, compiled=True)[0][-1] == "compiled"


def test_a_time_limit_interrupts_and_leaves_no_alarm_behind():
    start = time.perf_counter()
    with pytest.raises(TimeLimitReached, match=r"longer than 0 s"), time_limit(0.05):
        time.sleep(30)
    assert time.perf_counter() - start < 10
    with time_limit(0.02):
        pass
    time.sleep(0.05)


def test_a_compiler_that_fails_or_takes_too_long_is_a_reason(fake, monkeypatch):
    def fails(case, x):
        raise ValueError("no compiler\nmore")

    def hangs(case, x):
        return Contestant(lambda seed: None, lambda: time.sleep(30))

    own = OPERATIONS["effective_rank"].implementations
    monkeypatch.setitem(own, "fails", Implementation("fails", fails, compiled=True))
    monkeypatch.setitem(own, "hangs", Implementation("hangs", hangs, compiled=True))
    found = measure(CASE, [OURS, "fails", "hangs"], seconds=0.0, compile_seconds=0.1)
    assert found.left_out["fails"] == "the compiler failed: ValueError: no compiler"
    assert found.left_out["hangs"] == "the compiler was stopped: it took longer than 0 s"


@pytest.mark.slow
def test_a_compiled_peer_agrees_with_ours():
    case = Case("effective_rank", (300, 64), "training")
    x = OPERATIONS[case.operation].inputs(case)
    contestant, agreements, reason = timing.compile_now(case, "compiled", x, 300)
    if reason is not None and "Compiler" in reason:
        pytest.skip(reason)
    assert reason is None
    assert contestant is not None
    assert agreements
    assert all(agreement.holds for agreement in agreements)
