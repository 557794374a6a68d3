"""A short real training run: its checkpoints evaluated, probed and selected by the commands."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy.stats import kendalltau
from ssl_run import tiny
from typer.testing import CliRunner

from dse_ext import dse_lambda, select_checkpoints
from dse_ext.cli import app
from dse_ext.ssl import train

runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def column(table, name):
    return [float(row[name]) for row in table]


def invoke(*arguments):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six checkpoints of a run, what the run itself found, and the folder of the commands."""
    root = tmp_path_factory.mktemp("run") / "short"
    result = train(tiny(checkpoints=6, score_images=8), root)
    checkpoints = root / "checkpoints"
    out = root.parent / "results"
    common = ("--method", "dse-ext", "--checkpoints", checkpoints, "--workers", 0)
    evaluated = invoke(
        "evaluate",
        *common,
        "--data",
        "texture-scenes",
        "--images",
        8,
        "--lidar-images",
        4,
        "--out",
        out,
    )
    probed = invoke(
        "probe",
        *common,
        "--dataset",
        "texture-scenes",
        "--train-scenes",
        8,
        "--val-scenes",
        8,
        "--out",
        out,
    )
    selected = invoke("select", out, "--against", out / "miou.csv", "--first-epoch", 1, "--top", 2)
    return result, out, evaluated, probed, selected


def test_every_command_has_a_row_for_every_checkpoint(trained):
    result, out, evaluated, probed, selected = trained
    names = [f"step_{score.step:07d}.pt" for score in result.scores]
    for name in ("results.csv", "miou.csv"):
        table = rows(out / name)
        assert [row["checkpoint"] for row in table] == names
        assert {row["run"] for row in table} == {"short"}
    chosen = rows(out / "selection.csv")
    assert [row["checkpoint"] for row in chosen] == names[1:]  # without the untrained network
    for text in (evaluated, probed, selected):
        assert names[-1] in text
    assert "1 of 7 checkpoints are left out" in selected
    assert (out / "selection-short.png").stat().st_size > 10_000


def test_the_probe_finds_what_the_training_run_found(trained):
    result, out, *_ = trained
    # The same scenes, network and probe, by two ways through the code.
    expected = [score.miou for score in result.scores]
    assert column(rows(out / "miou.csv"), "texture_scenes_linear") == pytest.approx(
        expected, abs=0.01
    )


def test_selection_follows_from_the_two_tables(trained):
    _, out, *_ = trained
    table, truth = rows(out / "results.csv")[1:], rows(out / "miou.csv")[1:]
    relevance, dim = column(table, "class_relevance"), column(table, "m_dim")
    weight = dse_lambda(relevance, dim)
    dse = [r + weight * d for r, d in zip(relevance, dim, strict=True)]
    chosen = rows(out / "selection.csv")
    assert column(chosen, "dse") == pytest.approx(dse)
    assert {float(row["dim_weight"]) for row in chosen} == {weight}
    places = {row["chosen"]: i for i, row in enumerate(chosen) if row["chosen"]}
    best = [places[str(i + 1)] for i in range(len(places))]
    assert best == select_checkpoints(dse, top=2)

    content = json.loads((out / "selection.json").read_text())
    taus = {(t["dataset"], t["metric"]): t["tau"] for t in content["against"]["kendall_tau"]}
    for dataset in ("texture_scenes_linear", "texture_scenes_knn"):
        miou = column(truth, dataset)
        metrics = {"dse": dse, "class_relevance": relevance, "m_dim": dim}
        metrics |= {m: column(table, m) for m in ("rankme", "rankme_dense", "alpha_req", "lidar")}
        for metric, values in metrics.items():
            expected = kendalltau(values, miou).statistic
            if np.isnan(expected):
                assert taus[dataset, metric] is None
            else:
                assert taus[dataset, metric] == pytest.approx(expected)
        (gain,) = (g for g in content["against"]["gain"] if g["dataset"] == dataset)
        assert gain["last"] == miou[-1]
        assert gain["selected"] == max(miou[i] for i in best)
        assert gain["oracle"] == max(miou)
