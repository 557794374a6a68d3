"""`dse-ext bench`: what it writes, what it leaves out, what an interruption leaves."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from typer.testing import CliRunner

from dse_ext.bench import machine, run, timing
from dse_ext.bench.plan import SHAPES, Settings, plan
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.run import Run
from dse_ext.cli import app

runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


def bench(*arguments):
    return runner.invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def no_processes(monkeypatch):
    """The compiler and the processes that measure memory take longer than the rest together.

    They have tests of their own.
    """
    monkeypatch.setattr(
        run, "extra_peak_bytes", lambda key, cases, timeout: dict.fromkeys(cases, 5 << 20)
    )
    monkeypatch.setattr(
        timing, "compile_now", lambda *arguments: (None, [], "the compiler was stopped: by a test")
    )


def test_quick_measures_every_part(tmp_path, no_processes):
    result = bench("--quick", "--out", tmp_path, "--threads", 1, "--seconds", 600)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["state"] == "complete"
    assert found["settings"]["shapes"] == [[6, 16, 8], [4, 9, 12]]
    assert {row["operation"] for row in found["rows"]} == OPERATIONS.keys()
    for row in found["rows"]:
        assert row["median_ms"]["dse_ext"] > 0
        if row["part"] == "operations":
            assert row["ratio"]
            assert row["agreement"].keys() == row["ratio"].keys()
    memory = found["rows"][0]["extra_peak_bytes"]
    assert memory.keys() == found["rows"][0]["median_ms"].keys()
    assert set(memory.values()) == {5 << 20}
    assert {fit["axis"] for fit in found["scaling"]} == {"B", "N", "d", "k"}
    assert "kmeans (float32, cpu, threads: 1)" in result.output
    assert "the compiler was stopped: by a test" in result.output
    if importlib.util.find_spec("timm"):
        assert [share["model"] for share in found["shares"]] == ["ViT-Ti/16", "ViT-S/16"]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_missing_peers_are_named(tmp_path, monkeypatch, no_processes):
    find = importlib.util.find_spec
    absent = {"lightly", "sklearn", "faiss", "scipy", "timm", "matplotlib"}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in absent else find(name, *rest),
    )
    version = machine.version
    monkeypatch.setattr(machine, "version", lambda name: None if name in absent else version(name))
    arguments = ["--quick", "--out", tmp_path, "--threads", 1, "--shape", "6,16,8"]
    result = bench(*arguments, "--seconds", 600)
    assert result.exit_code == 0, result.output
    for distribution, what in (
        ("lightly", "lightly for dse_components training"),
        ("faiss-cpu", "faiss for kmeans forward"),
        ("timm", "share of a training step: ViT-Ti/16"),
    ):
        line = rf"skipped, {distribution} is not installed \(pip install 'dse-ext\[\w+\]'\): {what}"
        assert re.search(line, result.output)
    assert "no figure: matplotlib is not installed" in result.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {key for row in found["rows"] for key in row["ratio"]} >= {"batched", "svdvals"}
    assert found["settings"]["shapes"] == [[6, 16, 8]]


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch):
    steps = []
    one_step = timing.one_step

    def interrupted(contestant, case, seed):
        steps.append(case)
        if len(steps) > 9:
            raise KeyboardInterrupt
        return one_step(contestant, case, seed)

    monkeypatch.setattr(timing, "one_step", interrupted)
    result = bench("--quick", "--out", tmp_path, "--threads", 1)
    assert result.exit_code == 130, result.output
    assert "interrupted" in result.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["state"] == "interrupted"
    # The first case is whole, the second one has the rounds until then.
    assert [row["mode"] for row in found["rows"]] == ["training", "forward"]
    assert [row["rounds"]["dse_ext"] for row in found["rows"]] == [2, 1]


def test_what_does_not_fit_is_named_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 1 << 20)
    tried = []
    monkeypatch.setattr(run, "measure", lambda *a, **k: tried.append(a))
    monkeypatch.setattr(run.share, "measure_share", lambda *a, **k: tried.append(a))
    results = Run(Settings(quick=True, shapes=((6, 16, 8),))).all()
    assert tried == []
    assert results["rows"] == []
    reasons = {entry["reason"] for entry in results["skipped"]}
    assert all("too large for this machine: about" in r and "1 MiB are there" in r for r in reasons)
    assert any(entry["what"].startswith("share of") for entry in results["skipped"])


def test_what_time_runs_out_for_is_named(monkeypatch):
    tried = []
    monkeypatch.setattr(run, "measure", lambda *a, **k: tried.append(a))
    made = Run(Settings(quick=True, seconds=1e-9, shapes=((6, 16, 8),)))
    results = made.all()
    assert tried == []
    whats = [entry["what"] for entry in results["skipped"]]
    assert "share of a training step: ViT-S/16" in whats
    assert len(whats) > 20
    assert {entry["reason"] for entry in results["skipped"]} == {"time ran out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "64,196"), "--shape must be B,N,d"),
        (("--shape", "0,196,8"), "--shape must be B,N,d"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--device", "abacus"), "--device must be cpu, cuda or cuda:N"),
        (("--threads", "0"), "--threads must be >= 1"),
        (("--seconds", "0"), "--seconds must be > 0"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, tmp_path):
    result = bench(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_an_error(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = bench("--device", "cuda", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--device cuda cannot be used" in result.output


def test_the_default_plan_has_the_shapes_of_the_readme_first():
    made = plan(Settings(threads=2))
    assert made.operations[0].shape == SHAPES[0]
    assert [case.shape for case in made.shapes[:3]] == list(SHAPES[1:])
    assert {case.mode for case in made.shapes[:3]} == {"training"}
    assert [case.shape for case in made.memory] == [SHAPES[0]]
    assert {case.threads for case in made.threads} == {1, 2}
    assert plan(Settings(threads=1)).threads == []
    assert plan(Settings(device="cuda", threads=2)).threads == []
