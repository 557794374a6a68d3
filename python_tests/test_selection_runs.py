"""Results of runs: reading them, choosing over them, and comparing the choice with mIoU."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from scipy.stats import kendalltau
from typer.testing import CliRunner

from dse_ext import dse_lambda, select_checkpoints, selection
from dse_ext.cli import app
from dse_ext.commands.select import figure_names

runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})

RELEVANCE = [0.10, 0.30, 0.45, 0.40, 0.20, 0.25, 0.35, 0.15]
DIMENSION = [0.50, 0.45, 0.42, 0.40, 0.41, 0.46, 0.44, 0.30]
MIOU = [0.20, 0.28, 0.36, 0.37, 0.25, 0.27, 0.31, 0.18]


def results_rows(run="dino", relevance=RELEVANCE, dimension=DIMENSION, **changes):
    return [
        {
            "run": run,
            "checkpoint": f"checkpoint{i * 10:04d}.pth",
            "epoch": i * 10,
            "method": "dino",
            "variant": "evaluation",
            "images": 64,
            "m_inter": r + 0.3,
            "m_intra_image": 0.2,
            "m_intra_batch": 0.4,
            "m_intra": 0.3,
            "class_relevance": r,
            "m_dim": d,
            "avg_norm": 0.9,
            "rankme": 50 - i,
            "rankme_dense": 100 + i,
            "alpha_req": 1.0,
            "lidar": "",
            **changes,
        }
        for i, (r, d) in enumerate(zip(relevance, dimension, strict=True))
    ]


def miou_rows(run="dino", miou=MIOU, **more):
    return [
        {
            "run": run,
            "checkpoint": f"checkpoint{i * 10:04d}.pth",
            "epoch": i * 10,
            "voc_linear": value,
            **{name: values[i] for name, values in more.items()},
        }
        for i, value in enumerate(miou)
    ]


def save(path, rows, drop=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [name for name in rows[0] if name not in drop]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def select(*arguments):
    return runner.invoke(app, ["select", *map(str, arguments)])


def message(result):
    return " ".join(result.output.split())


# ------------------------------------------------------------------ reading


def test_results_are_read_by_run_and_sorted_by_epoch(tmp_path):
    rows = results_rows("b")[::-1] + results_rows("a")
    runs = selection.read_results(save(tmp_path / "results.csv", rows).parent)
    assert [run.run for run in runs] == ["b", "a"]
    assert runs[0].epochs == (0, 10, 20, 30, 40, 50, 60, 70)
    assert runs[0].checkpoints[2] == "checkpoint0020.pth"
    assert runs[0].metrics["m_dim"].tolist() == DIMENSION
    assert np.isnan(runs[0].metrics["lidar"]).all()
    assert runs[0].settings == {"method": "dino", "variant": "evaluation", "images": "64"}


def test_json_and_csv_say_the_same(tmp_path):
    rows = results_rows()
    save(tmp_path / "results.csv", rows)
    for row in rows:
        row["lidar"] = None
    content = {"format": 1, "settings": {}, "checkpoints": rows, "skipped": []}
    (tmp_path / "results.json").write_text(json.dumps(content))
    (one,) = selection.read_results(tmp_path / "results.csv")
    (two,) = selection.read_results(tmp_path / "results.json")
    assert (one.run, one.checkpoints, one.epochs) == (two.run, two.checkpoints, two.epochs)
    assert one.metrics.keys() == two.metrics.keys()
    for name, values in one.metrics.items():
        np.testing.assert_array_equal(values, two.metrics[name])


@pytest.mark.parametrize("drop", [("class_relevance",), ("class_relevance", "m_intra")])
def test_class_relevance_is_computed_where_it_is_missing(tmp_path, drop):
    (run,) = selection.read_results(save(tmp_path / "r.csv", results_rows(), drop))
    assert run.metrics["class_relevance"] == pytest.approx(RELEVANCE)


def test_a_table_without_runs_is_one_run_named_by_its_folder(tmp_path):
    (run,) = selection.read_results(save(tmp_path / "mine" / "r.csv", results_rows(), ("run",)))
    assert run.run == "mine"


def test_spreadsheets_byte_order_mark_is_no_part_of_a_column(tmp_path):
    path = save(tmp_path / "r.csv", results_rows())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert selection.read_results(path)[0].run == "dino"


def changed(rows, index, **values):
    return [{**row, **values} if i == index else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "drop", "text"),
    [
        (results_rows(), ("m_dim", "epoch"), "has no column epoch, m_dim; it has run, checkpoint"),
        (
            results_rows(),
            ("class_relevance", "m_inter"),
            "has no column class_relevance, nor m_inter to compute it from",
        ),
        (
            changed(results_rows(), 3, epoch=20),
            (),
            r"epoch 20 of run 'dino' is there twice, as checkpoint0020\.pth and checkpoint0030\.p",
        ),
        (
            changed(results_rows(), 3, checkpoint="checkpoint0020.pth"),
            (),
            r"checkpoint checkpoint0020\.pth of run 'dino' is there twice",
        ),
        (changed(results_rows(), 1, m_dim="high"), (), "line 3: column m_dim must hold numbers"),
        (changed(results_rows(), 0, epoch=""), (), "line 2: column epoch must hold a number, got"),
        (changed(results_rows(), 0, checkpoint=" "), (), "column checkpoint is empty"),
        (
            changed(results_rows(), 3, variant="paper"),
            (),
            r"measured with different variant \(evaluation, paper\), so their DSE cannot be",
        ),
    ],
)
def test_bad_results_are_named(tmp_path, rows, drop, text):
    path = save(tmp_path / "results.csv", rows, drop)
    with pytest.raises(selection.ResultsError, match=text):
        selection.read_results(path)


def test_files_that_are_no_results_are_named(tmp_path):
    with pytest.raises(selection.ResultsError, match=r"neither results\.csv nor results\.json"):
        selection.read_results(tmp_path)
    with pytest.raises(selection.ResultsError, match="does not exist"):
        selection.read_results(tmp_path / "no")
    with pytest.raises(selection.ResultsError, match="no results were given"):
        selection.read_results()
    (tmp_path / "old.json").write_text('{"format": 7}')
    with pytest.raises(selection.ResultsError, match="must be results of format 1, got format 7"):
        selection.read_results(tmp_path / "old.json")
    (tmp_path / "empty.csv").write_text("run,checkpoint,epoch,m_dim\n")
    with pytest.raises(selection.ResultsError, match=r"empty\.csv has no row"):
        selection.read_results(tmp_path / "empty.csv")
    (tmp_path / "twice.csv").write_text("run,epoch,epoch\na,1,2\n")
    with pytest.raises(selection.ResultsError, match="has a column twice: 'epoch'"):
        selection.read_results(tmp_path / "twice.csv")


def test_one_run_in_two_files_is_an_error(tmp_path):
    paths = [save(tmp_path / name / "results.csv", results_rows()) for name in "ab"]
    with pytest.raises(selection.ResultsError, match=r"run 'dino' is in both .* different names"):
        selection.read_results(*paths)


# ------------------------------------------------------------------ choosing


def run_of(tmp_path, **changes):
    (run,) = selection.read_results(save(tmp_path / "r.csv", results_rows(**changes)))
    return run


def test_a_run_is_scored_and_chosen_as_the_public_functions_do(tmp_path):
    choice = selection.select_run(run_of(tmp_path))
    weight = dse_lambda(RELEVANCE, DIMENSION)
    scores = [r + weight * d for r, d in zip(RELEVANCE, DIMENSION, strict=True)]
    assert choice.result.dim_weight == weight
    assert choice.result.dim_weight_computed
    assert choice.result.scores == pytest.approx(scores)
    assert list(choice.result.chosen) == select_checkpoints(scores) == [2, 6]
    assert choice.chosen_checkpoints == ("checkpoint0020.pth", "checkpoint0060.pth")
    assert choice.chosen_epochs == (20, 60)
    assert choice.notes == ()
    assert selection.select_run(run_of(tmp_path), top=1).result.chosen == (2,)


def test_a_given_weight_is_used(tmp_path):
    choice = selection.select_run(run_of(tmp_path), dim_weight=0)
    assert choice.result.scores == pytest.approx(RELEVANCE)
    assert not choice.result.dim_weight_computed
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="dim_weight must be a finite number >= 0"):
            selection.select_run(run_of(tmp_path), dim_weight=bad)


def test_one_checkpoint_has_weight_one_and_a_note(tmp_path):
    choice = selection.select_run(run_of(tmp_path, relevance=[0.2], dimension=[0.3]))
    assert choice.result.dim_weight == 1
    assert not choice.result.dim_weight_computed
    assert choice.result.scores == pytest.approx([0.5])
    assert choice.result.chosen == (0,)
    assert "λ = 1: the run has 1 checkpoint" in choice.notes[0]


def test_constant_dimensionality_has_weight_one_and_a_note(tmp_path):
    choice = selection.select_run(run_of(tmp_path, dimension=[0.3] * 8))
    assert choice.result.dim_weight == 1
    assert "M_dim is the same at every checkpoint" in choice.notes[0]


def test_checkpoints_that_are_not_finite_are_left_out_of_the_weight(tmp_path):
    broken = [*RELEVANCE[:2], math.nan, *RELEVANCE[3:]]
    choice = selection.select_run(run_of(tmp_path, relevance=broken))
    rest = [i for i in range(8) if i != 2]
    assert choice.result.dim_weight == pytest.approx(
        dse_lambda([RELEVANCE[i] for i in rest], [DIMENSION[i] for i in rest])
    )
    assert 2 not in choice.result.candidates
    assert "checkpoint0020.pth" in choice.notes[0]
    with pytest.raises(selection.ResultsError, match="no checkpoint with a finite"):
        selection.select_run(run_of(tmp_path, relevance=[math.nan] * 8))


def test_checkpoints_before_the_first_epoch_take_no_part(tmp_path):
    choice = selection.select_run(run_of(tmp_path), first_epoch=10)
    assert choice.run.epochs[0] == 10
    assert choice.result.dim_weight == pytest.approx(dse_lambda(RELEVANCE[1:], DIMENSION[1:]))
    assert "1 of 8 checkpoints are left out" in choice.notes[0]
    with pytest.raises(selection.ResultsError, match="no checkpoint from epoch 100 on; its last"):
        selection.select_run(run_of(tmp_path), first_epoch=100)


def test_select_by_dse_checks_its_arguments():
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        selection.select_by_dse([0.1, 0.2], [0.3])


# ------------------------------------------------------------------ comparing


def test_tau_is_scipys_over_the_checkpoints_with_both_values():
    tau, p_value = selection.kendall_tau([3.0, 1.0, math.nan, 2.0, 5.0], [0.3, 0.1, 0.9, None, 0.2])
    expected = kendalltau([3.0, 1.0, 5.0], [0.3, 0.1, 0.2])
    assert (tau, p_value) == (expected.statistic, expected.pvalue)
    assert selection.kendall_tau([1.0], [0.5]) == (None, None)
    assert selection.kendall_tau([1.0, 1.0], [0.5, 0.6]) == (None, None)
    with pytest.raises(ValueError, match="got 2 and 1"):
        selection.kendall_tau([1.0, 2.0], [0.5])


def test_evaluation_has_tau_of_every_metric_and_the_gain(tmp_path):
    runs = [
        selection.select_run(run)
        for run in selection.read_results(
            save(tmp_path / "r.csv", results_rows("a") + results_rows("b", RELEVANCE[::-1]))
        )
    ]
    rising = [0.1 + 0.01 * i for i in range(8)]
    table = selection.read_miou(
        save(
            tmp_path / "m.csv",
            miou_rows("b", rising, ade=MIOU, note=["x"] * 8)
            + miou_rows("a", ade=MIOU, note=[""] * 8),
        )
    )
    assert table.datasets == ("voc_linear", "ade")
    evaluation = selection.evaluate_selection(runs, table)
    assert evaluation.runs == ("a", "b")
    # lidar has no value anywhere, and α-ReQ does not vary.
    assert evaluation.metrics == (
        "dse",
        "rankme_dense",
        "alpha_req",
        "rankme",
        "class_relevance",
        "m_dim",
    )
    assert evaluation.tau("b", "voc_linear", "rankme_dense") == pytest.approx(1)
    assert evaluation.tau("b", "voc_linear", "rankme") == pytest.approx(-1)
    assert evaluation.tau("b", "voc_linear", "alpha_req") is None
    expected = kendalltau(runs[0].result.scores, MIOU).statistic
    assert evaluation.tau("a", "voc_linear", "dse") == pytest.approx(expected)
    means = [evaluation.tau(run, data, "dse") for run in "ab" for data in ("voc_linear", "ade")]
    assert evaluation.mean_tau("dse") == pytest.approx(np.mean(means))
    assert evaluation.mean_tau("dse", run="b") == pytest.approx(np.mean(means[2:]))
    assert evaluation.mean_tau("dse", dataset="ade") == pytest.approx(np.mean(means[1::2]))
    assert evaluation.mean_tau("alpha_req") is None
    gain = evaluation.gains[0]
    assert (gain.run, gain.dataset) == ("a", "voc_linear")
    assert gain.last == MIOU[-1]
    assert gain.selected == max(MIOU[i] for i in runs[0].result.chosen) == 0.36
    assert gain.first_choice == MIOU[runs[0].result.chosen[0]]
    assert (gain.oracle, gain.oracle_epoch) == (0.37, 30)
    assert gain.selected_gain == pytest.approx(0.18)
    assert gain.oracle_gain == pytest.approx(0.19)
    assert evaluation.mean_gain("oracle_gain", dataset="voc_linear") == pytest.approx(
        (0.19 + 0.0) / 2
    )
    assert any("without numbers: note" in text for text in evaluation.notes)


def test_a_choice_never_beats_the_oracle(tmp_path):
    rng = np.random.default_rng(3)
    for _ in range(5):
        rows = results_rows(relevance=rng.random(8).tolist(), dimension=rng.random(8).tolist())
        choice = selection.select_run(selection.read_results(save(tmp_path / "r.csv", rows))[0])
        table = selection.read_miou(
            save(tmp_path / "m.csv", miou_rows(miou=rng.random(8).tolist()))
        )
        (gain,) = selection.evaluate_selection([choice], table).gains
        assert gain.first_choice <= gain.selected <= gain.oracle
        assert gain.oracle_gain >= 0


def test_checkpoints_without_miou_are_noted(tmp_path):
    run = run_of(tmp_path)
    rows = changed(miou_rows(), 0, voc_linear="")[:-1]
    table = selection.read_miou(save(tmp_path / "m.csv", rows))
    evaluation = selection.evaluate_selection([selection.select_run(run)], table)
    assert "2 of 8 checkpoints have no mIoU on voc_linear" in evaluation.notes[0]
    assert "no gain on voc_linear" in evaluation.notes[1]
    assert evaluation.gains == ()
    assert evaluation.taus[0].checkpoints == 6
    assert evaluation.mean_gain() is None


@pytest.mark.parametrize(
    ("rows", "drop", "text"),
    [
        (miou_rows("ibot"), (), "no row of run 'dino'; it has the runs ibot"),
        (
            [{**row, "checkpoint": "x" + row["checkpoint"]} for row in miou_rows()],
            (),
            r"no checkpoint of run 'dino' .* have checkpoint0000\.pth.*xcheckpoint0000\.pth",
        ),
        (changed(miou_rows(), 2, epoch=25), (), "has epoch 20 in the results and epoch 25 in"),
        (miou_rows(), ("checkpoint",), "has no column checkpoint"),
        (miou_rows(), ("voc_linear",), "one column of mIoU for each data set is needed"),
        (changed(miou_rows(), 2, voc_linear=36.0), (), r"mIoU in \[0, 1\], got 36 \(divide perc"),
        (changed(miou_rows(), 2, voc_linear=-0.1), (), r"mIoU in \[0, 1\], got -0\.1\."),
        (changed(miou_rows(), 2, voc_linear="n/a"), (), "line 4: column voc_linear must hold numb"),
        (miou_rows() + miou_rows()[:1], (), "checkpoint0000.pth of run 'dino' is there twice"),
    ],
)
def test_bad_tables_of_miou_are_named(tmp_path, rows, drop, text):
    choice = selection.select_run(run_of(tmp_path))
    path = save(tmp_path / "m.csv", rows, drop)
    with pytest.raises(selection.ResultsError, match=text):
        selection.evaluate_selection([choice], selection.read_miou(path))


def test_a_table_of_miou_without_runs_serves_one_run(tmp_path):
    choice = selection.select_run(run_of(tmp_path))
    table = selection.read_miou(save(tmp_path / "m.csv", miou_rows(), ("run", "epoch")))
    assert selection.evaluate_selection([choice], table).gains[0].last == MIOU[-1]


# ------------------------------------------------------------------ the command


def test_select_prints_and_writes_everything(tmp_path):
    out = tmp_path / "results"
    save(out / "results.csv", results_rows("a/b") + results_rows("c", RELEVANCE[::-1]))
    table = save(tmp_path / "miou.csv", miou_rows("a/b", ade=MIOU) + miou_rows("c", ade=MIOU))
    result = select(out, "--against", table)
    assert result.exit_code == 0, result.output
    text = message(result)
    for word in ("λ = ", "Kendall's τ", "RankMe†", "oracle", "best of selected", "No metric has"):
        assert word in text, word
    assert "…" not in text  # nothing is cut off, though the terminal is narrow
    rows = list(csv.DictReader((out / "selection.csv").open()))
    assert len(rows) == 16
    assert [row["checkpoint"] for row in rows if row["run"] == "a/b" and row["chosen"] == "1"] == [
        "checkpoint0020.pth"
    ]
    for row in rows:
        dse = float(row["class_relevance"]) + float(row["dim_weight"]) * float(row["m_dim"])
        assert float(row["dse"]) == pytest.approx(dse, rel=1e-12)
    content = json.loads((out / "selection.json").read_text())
    assert content["settings"]["dim_weight"] == "auto"
    assert [run["run"] for run in content["runs"]] == ["a/b", "c"]
    assert content["runs"][0]["chosen"] == ["checkpoint0020.pth", "checkpoint0060.pth"]
    mean = content["against"]["mean_kendall_tau"]["dse"]
    taus = [row for row in csv.DictReader((out / "kendall.csv").open()) if row["metric"] == "dse"]
    assert len(taus) == 4
    assert mean == pytest.approx(np.mean([float(row["tau"]) for row in taus]))
    gains = list(csv.DictReader((out / "gain.csv").open()))
    assert [(row["run"], row["dataset"]) for row in gains] == [
        ("a/b", "voc_linear"),
        ("a/b", "ade"),
        ("c", "voc_linear"),
        ("c", "ade"),
    ]
    for name in ("selection-a_b.png", "selection-c.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert select(out, "--against", table).exit_code == 0
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_select_of_one_checkpoint_shows_the_note(tmp_path):
    save(tmp_path / "results.csv", results_rows(relevance=[0.2], dimension=[0.3]))
    result = select(tmp_path)
    assert result.exit_code == 0, result.output
    assert "λ = 1 (see below); chosen: checkpoint0000.pth" in message(result)
    assert "note: λ = 1: the run has 1 checkpoint" in message(result)


def test_long_runs_are_shown_by_their_maxima(tmp_path):
    count = 60
    wave = [0.3 + 0.1 * math.sin(i) for i in range(count)]
    flat = [0.5 + 0.001 * i for i in range(count)]
    save(tmp_path / "results.csv", results_rows(relevance=wave, dimension=flat))
    text = message(select(tmp_path))
    assert "of 60 checkpoints: local maxima of DSE, and the last" in text
    assert "checkpoint0590.pth" in text
    assert text.count("maximum") + 3 < 25


def test_options_of_select_arrive(tmp_path):
    save(tmp_path / "results.csv", results_rows())
    arguments = ("--top", 1, "--window", 0, "--dim-weight", 0, "--first-epoch", 10)
    assert select(tmp_path, *arguments, "--out", tmp_path / "out").exit_code == 0
    content = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert content["settings"] == {"top": 1, "window": 0, "dim_weight": 0, "first_epoch": 10}
    (run,) = content["runs"]
    assert run["lambda"] == 0
    assert run["chosen"] == ["checkpoint0020.pth"]
    assert len(run["checkpoints"]) == 7
    assert [c["candidate"] for c in run["checkpoints"]] == [4, 1, 2, 6, 5, 3, 7]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--dim-weight", "big"), "--dim-weight must be auto or a number, got 'big'"),
        (("--dim-weight", "-1"), "dim_weight must be a finite number >= 0, got -1.0"),
        (("--top", "0"), "top must be >= 1, got 0"),
        (("--against", "no.csv"), "cannot read no.csv"),
    ],
)
def test_errors_of_select_are_one_message(tmp_path, arguments, text):
    save(tmp_path / "results.csv", results_rows())
    result = select(tmp_path, *arguments)
    assert result.exit_code == 2
    assert f"error: {text}" in message(result)
    assert "Traceback" not in result.output
    assert not (tmp_path / "selection.csv").exists()


def test_several_results_need_a_folder(tmp_path):
    paths = [save(tmp_path / n / "results.csv", results_rows(n)).parent for n in "ab"]
    assert "--out is needed where there are several RESULTS, got 2" in message(select(*paths))
    result = select(*paths, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert (tmp_path / "out" / "selection-b.png").is_file()


def test_select_help_has_every_option():
    text = message(select("--help"))
    for word in ("RESULTS", "--against", "--top", "--window", "--dim-weight", "--first-epoch"):
        assert word in text
    assert "--out" in text


def test_figures_have_names_of_their_own():
    assert figure_names(["a/b", "a:b", "A b", "..", "x-1.2"]) == [
        "selection-a_b.png",
        "selection-a_b-2.png",
        "selection-A_b-3.png",
        "selection-run.png",
        "selection-x-1.2.png",
    ]
