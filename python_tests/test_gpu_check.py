"""What `make gpu-check` is made of, as far as it can run without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check  # noqa: E402

from benchmarks.gpu import Bench, table  # noqa: E402


def test_benchmarks_measure_every_part(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(out), "--budget", "200"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["left_out"] == []
    assert results["ceilings"].keys() == {
        "copy_tb_s", "bfloat16_tflop_s", "float32_tflop_s", "float64_tflop_s"
    }  # fmt: skip
    for row in results["cases"]:
        assert row["dse_ext"]["training_ms"] > 0
        assert row["dse_ext"]["forward_ms"] > 0
        assert row["peers"]["lightly"]["training_ms"] > 0
        assert row["peers"]["batched"]["training_ms"] > 0
    assert {row["dtype"] for row in results["cases"]} == {"bfloat16", "float32"}
    assert len(results["shares"]) == 2
    assert results["spectra"]["effective_rank_ms"] > 0
    assert results["kmeans"]["dse_ext_ms"] > 0
    assert "x lightly" in done.stdout


def test_what_comes_too_late_is_named() -> None:
    bench = Bench(torch.device("cpu"), quick=True, budget=-1.0)
    results = bench.all()
    assert any(reason == "ceilings: no time left" for reason in results["left_out"])
    assert "left out: ceilings: no time left" in table(results)


def test_what_fails_is_named_and_the_rest_goes_on() -> None:
    bench = Bench(torch.device("cpu"), quick=True, budget=60.0)

    def fails() -> None:
        raise RuntimeError("out of everything\nmore")

    assert bench.attempt("one", fails) is None
    assert bench.attempt("two", lambda: 2) == 2
    assert bench.results["left_out"] == ["one: RuntimeError: out of everything"]


def test_steps_keep_their_output_and_outcome(tmp_path: Path) -> None:
    checks = gpu_check.Check(tmp_path)
    python = sys.executable
    assert checks.run("good one", [python, "-c", "print('3 passed in 1 s')"], 20, r"^\d passed.*$")
    assert not checks.run("bad", [python, "-c", "print('2 failed'); raise SystemExit(3)"], 20, "x^")
    assert not checks.run("late", [python, "-c", "import time; time.sleep(60)"], 0.5, "x^")
    assert not checks.run("absent", [str(tmp_path / "nothing")], 5, "x^")
    good, bad, late, absent = checks.steps
    assert (good.passed, good.summary) == (True, "3 passed in 1 s")
    assert (bad.passed, bad.summary) == (False, "exit status 3")
    assert (late.passed, late.summary) == (False, "stopped after 0 s")
    assert not absent.passed
    assert "nothing" in absent.summary
    assert (tmp_path / "good-one.log").read_text().strip() == "3 passed in 1 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr


def test_every_test_file_that_is_named_exists() -> None:
    assert all((ROOT / path).exists() for path in gpu_check.TESTS)


def test_small_calls_run_on_the_cpu() -> None:
    command = [sys.executable, "tools/gpu_small.py", "--device", "cpu", "--shapes", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "12 calls on cpu, all finite"
