"""The experiment on the embedded scenes: what it reports is what its runs were measured at."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

pytest.importorskip("lightly")

from benchmarks import sdd_experiment, sdd_report  # noqa: E402
from dse_ext.selection import METRICS, kendall_tau, select_by_dse  # noqa: E402
from dse_ext.ssl.trainer import Trainer  # noqa: E402

PLAN = sdd_experiment.PRESETS["smoke"]
FILES = [f"{sdd_experiment.NAME}.{end}" for end in ("json", "md", "png")]


def experiment(folder: Path) -> int:
    return sdd_experiment.main(
        ["--preset", "smoke", "--work", str(folder / "work"), "--out", str(folder / "out"),
         "--threads", "1", "--workers", "0"]
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment without an interruption."""
    folder = tmp_path_factory.mktemp("experiment")
    assert experiment(folder) == 0
    return folder


@pytest.fixture
def report(finished: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((finished / "out" / FILES[0]).read_text())
    return content


def test_every_run_of_the_plan_is_in_the_report(report):
    assert report["plan"] == PLAN.to_dict()
    assert [(r["method"], r["seed"], r["dse_weight"]) for r in report["runs"]] == [
        dataclasses.astuple(run) for run in PLAN.runs()
    ]
    steps = [0, 1, 2, 3, 4]
    assert all([c["step"] for c in run["checkpoints"]] == steps for run in report["runs"])
    weights = {run["dse_weight"]: run["checkpoints"][-1] for run in report["runs"]}
    assert weights[0.0]["m_inter"] != weights[0.001]["m_inter"]


def test_figures_of_a_run_follow_from_its_checkpoints(report):
    for run in report["runs"]:
        untrained, *trained = run["checkpoints"]
        miou = [checkpoint["miou"] for checkpoint in trained]
        result = select_by_dse(
            [c["class_relevance"] for c in trained], [c["m_dim"] for c in trained]
        )
        assert run["lambda"] == result.dim_weight
        assert run["chosen"] == [trained[i]["step"] for i in result.chosen]
        assert run["miou"] == {
            "untrained": untrained["miou"],
            "last": miou[-1],
            "best": max(miou),
            "first_choice": miou[result.chosen[0]],
            "selected": max(miou[i] for i in result.chosen),
        }
        for name in METRICS:
            values = result.scores if name == "dse" else [c[name] for c in trained]
            assert run["tau"][name] == kendall_tau(values, miou)[0]


def test_summary_is_that_of_the_runs(report):
    summary = report["summary"]
    assert summary["diverged"] == []
    for weight in PLAN.dse_weights:
        runs = [run for run in report["runs"] if run["dse_weight"] == weight]
        for part, key in (("quality", "miou"), ("tau", "tau")):
            rows = [row for row in summary[part] if row["dse_weight"] == weight]
            # One method: the mean of methods is the method's.
            assert [row["method"] for row in rows] == ["simsiam", sdd_report.MEAN]
            for row in rows:
                for name, value in row.items():
                    if name in ("method", "dse_weight"):
                        continue
                    known = [v for run in runs if (v := run[key][name]) is not None]
                    assert value["n"] == len(known)
                    assert value["mean"] == pytest.approx(statistics.fmean(known))
                    assert value["std"] == pytest.approx(statistics.stdev(known))
    runs = {(run["seed"], run["dse_weight"]): run for run in report["runs"]}
    gains = [
        runs[seed, 0.001]["miou"]["last"] - runs[seed, 0.0]["miou"]["last"] for seed in PLAN.seeds
    ]
    assert summary["effect"][0]["last"]["mean"] == pytest.approx(statistics.fmean(gains))


def test_tables_show_the_summary(report, finished):
    text = (finished / "out" / FILES[1]).read_text()
    row = report["summary"]["quality"][0]["last"]
    assert f"{100 * row['mean']:.2f} ± {100 * row['std']:.2f}" in text
    lines = text.splitlines()
    assert sum(line.startswith("| simsiam | 0 |") for line in lines) == 2
    assert sum(line.startswith("| simsiam | 0.001 |") for line in lines) == 3
    assert (finished / "out" / FILES[2]).read_bytes().startswith(b"\x89PNG")


def test_interrupted_experiment_ends_in_the_same_files(finished, tmp_path, monkeypatch, capsys):
    first, second, third, _ = PLAN.runs()
    for name in ("plan.json", f"{first.name}.json", f"{second.name}.json"):
        (tmp_path / "work").mkdir(exist_ok=True)
        shutil.copy(finished / "work" / name, tmp_path / "work" / name)

    schedule: Callable[[Trainer], None] = Trainer._schedule

    def interrupted(trainer: Trainer) -> None:
        schedule(trainer)
        if trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_schedule", interrupted)
        assert experiment(tmp_path) == 130
    assert "stopped after step 2" in capsys.readouterr().out
    assert (tmp_path / "work" / third.name / "resume.pt").is_file()
    assert not (tmp_path / "out").exists()

    assert experiment(tmp_path) == 0
    assert "2 of 4 runs are done already" in capsys.readouterr().out
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (finished / "out" / name).read_bytes()
    assert not (tmp_path / "work" / third.name).exists()


def test_runs_of_another_plan_are_not_mixed_in(finished, capsys):
    from rich.console import Console

    other = dataclasses.replace(PLAN, seeds=(0, 1, 2))
    with pytest.raises(ValueError, match="runs of another plan"):
        sdd_experiment.run_all(other, finished / "work", Console(quiet=True))


def test_a_run_that_diverged_is_reported_and_left_out_of_means(report):
    first, *others = report["runs"]
    broken = {
        "method": first["method"],
        "seed": first["seed"],
        "dse_weight": first["dse_weight"],
        "diverged": "the loss became nan",
    }
    summary = sdd_report.summarize([broken, *others])
    assert summary["quality"][0]["last"]["n"] == 1
    assert summary["effect"][0]["last"]["n"] == 1
    assert summary["diverged"] == [broken]
    changed = {**report, "runs": [broken, *others], "summary": summary}
    assert "diverged: simsiam, β 0, seed 0: the loss became nan" in sdd_report.markdown(changed)
    sdd_report.figure(changed)


def test_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit):
        sdd_experiment.main(["--preset", "huge"])
    assert "huge" in capsys.readouterr().err
