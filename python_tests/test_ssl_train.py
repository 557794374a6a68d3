"""A whole run: what it writes, and that an interruption changes nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from ssl_run import TINY, assert_same_networks, networks, tiny, without_times

from dse_ext.data import NoImagesError
from dse_ext.ssl import ConfigError, Interrupted, Trainer, TrainingDiverged, train
from dse_ext.ssl.run import load_checkpoint, open_source
from dse_ext.ssl.scoring import CheckpointScore, select
from dse_ext.ssl.storage import RunFolder, read_lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was not interrupted."""
    out = tmp_path_factory.mktemp("finished")
    return out, train(tiny(), out)


def test_results_have_every_number(finished):
    out, result = finished
    summary = json.loads((out / "results.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert [row["step"] for row in summary["checkpoints"]] == [0, 2, 4, 6]
    for row in summary["checkpoints"]:
        assert (out / row["path"]).is_file()
        for name in ("m_inter", "m_intra_image", "m_intra_batch", "m_dim", "dse", "miou"):
            assert math.isfinite(row[name]), name
        assert row["m_intra"] == pytest.approx((row["m_intra_image"] + row["m_intra_batch"]) / 2)
        expected = row["m_inter"] - row["m_intra"] + summary["lambda"] * row["m_dim"]
        assert row["dse"] == pytest.approx(expected)
        assert len(row["class_iou"]) == len(summary["classes"]) == 12
    chosen = [row["step"] for row in summary["checkpoints"] if row["chosen"]]
    assert sorted(summary["chosen"]) == chosen
    assert chosen
    assert 0 not in chosen
    assert -1 <= summary["kendall_tau"] <= 1
    assert summary["config"] == tiny().to_dict()
    assert 0 < summary["training"]["dse_share"] < 1
    assert summary["images"] == {"dse": 8, "probe": 8, "heldout": 8, "skipped": []}


def test_lambda_comes_from_the_trained_checkpoints(finished):
    _, result = finished
    trained = [score for score in result.scores if score.step > 0]
    relevance = torch.tensor([s.m_inter - s.m_intra for s in trained], dtype=torch.float64)
    m_dim = torch.tensor([s.m_dim for s in trained], dtype=torch.float64)
    assert result.selection.dim_weight == pytest.approx(float(relevance.std() / m_dim.std()))


def test_log_has_one_row_per_step(finished):
    out, _ = finished
    rows = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    for row in rows:
        assert row["loss"] == pytest.approx(row["ssl_loss"] + row["dse_loss"])
        assert row["dse_loss"] == pytest.approx(-0.001 * row["dse"], rel=1e-4)
        parts = row["m_inter"] - (row["m_intra_image"] + row["m_intra_batch"]) / 2 + row["m_dim"]
        assert row["dse"] == pytest.approx(parts, rel=1e-4)
        assert 0 < row["dse_seconds"] < row["step_seconds"]
        assert row["grad_norm"] > 0
    # One warm-up step, then a cosine that never rises.
    rates = [row["lr"] for row in rows]
    assert rates[0] == pytest.approx(TINY["lr"])
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0] / 5


def test_report_is_one_file_with_its_figures(finished):
    out, _ = finished
    text = (out / "report.html").read_text()
    assert text.count("data:image/svg+xml;base64,") == 2
    assert text.count("data:image/png;base64,") == 1
    for word in ("Kendall", "mIoU", "Cluster maps", "share is the wall", "untrained"):
        assert word in text
    assert "http" not in text.replace("http-equiv", "")


def test_networks_change_with_training_and_can_be_loaded(finished):
    out, _ = finished
    kept = networks(out)
    assert list(kept) == [f"step_{step:07d}.pt" for step in (0, 2, 4, 6)]
    weights = [state["blocks.0.attn.qkv.weight"] for state in kept.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights))
    backbone = load_checkpoint(tiny(), RunFolder(out), 4)
    pooled, dense = backbone(torch.zeros(2, 3, 32, 32))
    assert pooled.shape == (2, 32)
    assert dense.shape == (2, 16, 32)


def test_same_configuration_gives_the_same_run(finished, tmp_path):
    out, result = finished
    again = train(tiny(), tmp_path, resume=True)  # nothing to resume: starts
    assert_same_networks(out, tmp_path)
    assert again.scores == result.scores


def test_regularizer_takes_part_in_training(finished, tmp_path):
    out, _ = finished
    few = {"checkpoints": 1}
    strong = train(tiny(dse_weight=1.0, **few), tmp_path / "strong")
    plain = train(tiny(dse_weight=0.0, **few), tmp_path / "plain")
    rows = read_lines(tmp_path / "plain" / "metrics.jsonl")
    assert all("dse" not in row and row["dse_seconds"] == 0 for row in rows)
    assert plain.summary["training"]["dse_share"] == 0
    last = "step_0000006.pt"
    results = [networks(root)[last] for root in (out, tmp_path / "strong", tmp_path / "plain")]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert any(not torch.equal(results[a][k], results[b][k]) for k in results[a])
    # Six steps hardly move the teacher, which is what is scored: that the term raises DSE is a
    # matter of gradients, tested where they are computed.
    assert strong.summary["training"]["dse_share"] > 0


# ---------------------------------------------------------------- interruption


def interrupt_at(step, number=signal.SIGINT):
    def on_step(row):
        if row["step"] == step:
            os.kill(os.getpid(), number)

    return on_step


def finish(config, out):
    """Trains an interrupted run to its end, without scores and report."""
    trainer = Trainer(config, RunFolder(out), open_source(config), torch.device("cpu"))
    assert trainer.resume()
    trainer.run()


def start(config, out):
    """A trainer in a folder as ``train`` prepares it."""
    folder = RunFolder(out)
    folder.checkpoints.mkdir(parents=True)
    config.save(folder.config)
    return Trainer(config, folder, open_source(config), torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_continues_to_the_same_result(finished, tmp_path, number):
    out, _ = finished
    handler = signal.getsignal(number)
    # Nothing is saved between checkpoints: the interruption itself has to save.
    config = tiny(save_every=100)
    with pytest.raises(Interrupted, match="stopped after step") as stop:
        start(config, tmp_path).run(interrupt_at(3, number))
    assert stop.value.step == 3
    assert signal.getsignal(number) is handler
    assert not (tmp_path / "checkpoints" / "step_0000004.pt").exists()
    finish(config, tmp_path)
    assert_same_networks(out, tmp_path)
    ours, theirs = (read_lines(root / "metrics.jsonl") for root in (tmp_path, out))
    assert without_times(ours) == without_times(theirs)


def test_steps_after_the_last_save_are_done_again(finished, tmp_path):
    out, _ = finished
    config = tiny(save_every=100)  # saved with the checkpoints only, at steps 2, 4 and 6

    def crash(row):
        if row["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        start(config, tmp_path).run(crash)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "los')  # a line that was cut off
    finish(config, tmp_path)
    assert_same_networks(out, tmp_path)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 7))


def test_killed_command_continues_to_the_same_result(finished, tmp_path):
    out, result = finished
    options = {k: v for k, v in TINY.items() if not k.endswith("_args")}
    command = [sys.executable, "-m", "dse_ext.cli", "train", "--out", str(tmp_path / "run")]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    for option in ("backbone", "method"):
        for key, value in TINY[f"{option}_args"].items():
            command += [f"--{option}-arg", f"{key}={value}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    resumed = train(tiny(), tmp_path / "run", resume=True)
    assert_same_networks(out, tmp_path / "run")
    assert resumed.scores == result.scores


def test_resuming_a_finished_run_does_no_work_twice(finished, tmp_path, monkeypatch):
    train(tiny(steps=2, checkpoints=2), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    monkeypatch.setattr(Trainer, "_train_step", None)
    monkeypatch.setattr("dse_ext.ssl.run.score_checkpoint", None)
    again = train(tiny(steps=2, checkpoints=2), tmp_path, resume=True)
    assert [score.step for score in again.scores] == [0, 1, 2]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_folder_with_a_run_is_not_overwritten_by_accident(finished, tmp_path):
    out, _ = finished
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume.*--overwrite"):
        train(tiny(), out)
    with pytest.raises(ConfigError, match=r"has lr = 0\.001, which cannot be changed to 0\.5"):
        train(tiny(lr=0.5), out, resume=True)
    train(tiny(steps=1, checkpoints=1), tmp_path)
    train(tiny(steps=2, checkpoints=1), tmp_path, overwrite=True)
    assert list(networks(tmp_path)) == ["step_0000000.pt", "step_0000002.pt"]


def test_divergence_stops_the_run(tmp_path):
    with pytest.raises(TrainingDiverged, match="try a smaller lr than 1e"):
        train(tiny(lr=1e30, clip_grad=0.0), tmp_path)


# ---------------------------------------------------------------- any folder of images


def photographs(folder, count=6):
    folder.mkdir()
    scenes = open_source(tiny(train_images=count, image_size=48))
    for index in range(count):
        scenes[index][0].crop((0, 0, 48, 40)).save(folder / f"{index}.png")
    return folder


def test_folder_of_images_gives_a_run_without_labels(tmp_path):
    folder = photographs(tmp_path / "images")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    result = train(tiny(data=str(folder)), tmp_path / "run")
    assert all(score.miou is None for score in result.scores)
    assert result.selection.kendall_tau is None
    assert result.selection.chosen
    summary = json.loads(result.results.read_text())
    assert summary["images"]["dse"] == 6
    assert summary["images"]["heldout"] == 0
    assert len(summary["images"]["skipped"]) == 1
    assert "broken.jpg" in summary["images"]["skipped"][0]
    report = result.report.read_text()
    assert "no labels" in report
    assert "broken.jpg" in report


def test_folder_without_images_is_an_error_before_anything_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImagesError, match=r"no image in .*empty.*\.jpeg"):
        train(tiny(data=str(tmp_path / "empty")), tmp_path / "run")
    with pytest.raises(NotADirectoryError, match="must be 'texture-scenes' or a folder"):
        train(tiny(data=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_convolutional_backbone(tmp_path):
    result = train(
        tiny(
            backbone="test_resnet",
            backbone_args={},
            patch_size=None,
            image_size=64,
            steps=1,
            checkpoints=1,
        ),
        tmp_path,
    )
    assert not result.selection.dim_weight_computed  # one checkpoint has no deviation
    assert result.selection.dim_weight == 1
    assert result.scores[-1].miou is not None


# ---------------------------------------------------------------- selection


def score(step, relevance, m_dim, miou):
    return CheckpointScore(step, relevance, 0.0, 0.0, m_dim, miou)


def test_untrained_network_takes_no_part_in_the_choice():
    trained = [score(1, 0.1, 0.5, 0.2), score(2, 0.35, 0.6, 0.3), score(3, 0.2, 0.7, 0.4)]
    with_untrained = select([score(0, 9.0, 9.0, 0.0), *trained])
    assert with_untrained == select(trained)
    assert with_untrained.dim_weight == pytest.approx((0.0316666666 / 0.02) ** 0.5)
    assert with_untrained.chosen == (2,)
    assert with_untrained.kendall_tau == pytest.approx(1 / 3)


def test_kendall_tau_needs_labels_and_variation():
    assert select([score(1, 0.1, 0.5, None), score(2, 0.3, 0.6, None)]).kendall_tau is None
    assert select([score(1, 0.1, 0.5, 0.2), score(2, 0.3, 0.6, 0.2)]).kendall_tau is None
    assert select([score(1, 0.1, 0.5, 0.2)]).kendall_tau is None
