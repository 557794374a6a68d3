"""The gate of ratios: it fails where a bound is too high, passes where there is none to fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks import gate  # noqa: E402
from dse_ext.bench.case import Case  # noqa: E402
from dse_ext.bench.registry import OPERATIONS  # noqa: E402

TINY = [
    {"operation": "dse_components", "shape": [6, 16, 8], "mode": "training", "peer": "batched"},
    {"operation": "kmeans", "shape": [1, 64, 8], "mode": "forward", "clusters": 4,
     "peer": "batched"},
    {"operation": "effective_rank", "shape": [64, 8], "mode": "training", "peer": "svdvals"},
]  # fmt: skip


def write(path: Path, at_least: float) -> Path:
    path.write_text(json.dumps({"bounds": [{**entry, "at_least": at_least} for entry in TINY]}))
    return path


def test_a_bound_of_zero_passes(tmp_path, capsys):
    assert gate.main(["--bounds", str(write(tmp_path / "gate.json", 0)), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 ratios hold" in out
    assert out.count("| ok ") == 3


def test_an_impossible_bound_fails_after_three_attempts(tmp_path, capsys):
    assert gate.main(["--bounds", str(write(tmp_path / "gate.json", 1e9)), "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert "0 of 3 ratios hold" in out
    assert out.count("TOO SLOW") == 3
    lines = [line for line in out.splitlines() if "TOO SLOW" in line]
    assert all(line.rstrip(" |").endswith(" 3") for line in lines)


def test_only_what_falls_short_is_measured_again():
    case = Case("effective_rank", (64, 8))
    bounds = [gate.Bound(case, "svdvals", 2.0), gate.Bound(case, "eigvalsh", 2.0)]
    asked = []

    def measured(case, peers):
        asked.append(list(peers))
        return {peer: 3.0 if peer == "svdvals" or len(asked) == 2 else 1.0 for peer in peers}

    outcomes = gate.check(bounds, measure_ratios=measured)
    assert asked == [["svdvals", "eigvalsh"], ["eigvalsh"]]
    assert [outcome.attempts for outcome in outcomes] == [1, 2]
    assert all(gate.holds(b, outcome) for b, outcome in zip(bounds, outcomes, strict=True))


def test_a_peer_that_cannot_be_measured_is_a_failure(monkeypatch):
    bound = gate.Bound(Case("kmeans", (1, 64, 8), "forward", clusters=4), "batched", 0.0)
    implementation = OPERATIONS["kmeans"].implementations["batched"]
    monkeypatch.setattr(type(implementation), "obstacle", lambda self, case: "it is not here")
    (outcome,) = gate.check([bound])
    assert not gate.holds(bound, outcome)
    assert outcome.reason == "it is not here"
    assert "NOT MEASURED" in gate.table([bound], [outcome])


def test_the_committed_bounds_are_for_peers_that_exist_and_leave_a_margin():
    bounds = gate.read_bounds(gate.BOUNDS, threads=1)
    assert {bound.case.operation for bound in bounds} == OPERATIONS.keys()
    assert {bound.peer for bound in bounds} >= {"lightly", "batched", "sklearn", "svdvals"}
    assert all(bound.at_least > 0.5 for bound in bounds)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ('{"bounds": []}', "has no bounds"),
        (json.dumps({"bounds": [{**TINY[0], "peer": "nobody", "at_least": 1}]}), "nobody"),
        (json.dumps({"bounds": [TINY[0]]}), "at_least"),
    ],
)
def test_bounds_that_cannot_be_read_are_an_error(content, message, tmp_path, capsys):
    path = tmp_path / "gate.json"
    if content is not None:
        path.write_text(content)
    assert gate.main(["--bounds", str(path)]) == 2
    assert message in capsys.readouterr().err
