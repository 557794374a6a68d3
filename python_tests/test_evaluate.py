"""``dse-ext evaluate``: figures, results folder, resumption, several processes, messages."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoint_files import dino, vit
from PIL import Image
from ssl_run import tiny
from typer.testing import CliRunner

import dse_ext
from dse_ext.checkpoints import PAPER, load
from dse_ext.cli import app
from dse_ext.data import TextureScenes
from dse_ext.evaluation import EvaluateConfig, evaluate
from dse_ext.evaluation.images import ImageSet, Prepared, augmentation, batch_sizes
from dse_ext.evaluation.results import COLUMNS
from dse_ext.spectrum import RankMeAccumulator
from dse_ext.ssl import Trainer
from dse_ext.ssl.run import load_checkpoint, open_source
from dse_ext.ssl.scoring import ScoringData, score_checkpoint
from dse_ext.ssl.storage import RunFolder

runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})
SIZE = 64
MODEL_ARGS = {"embed_dim": 48, "depth": 1}
OPTIONS = {
    "method": "dino",
    "data": "texture-scenes",
    "images": 20,
    "image_size": SIZE,
    "batch_size": 6,
    "dse_batch": 16,
    "lidar_images": 5,
    "lidar_views": 3,
    "workers": 0,
    "device": "cpu",
}


def write_checkpoints(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    model = vit(depth=1)
    for number in range(count):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state["pos_embed"] *= 1 + 0.3 * number
        teacher = {f"backbone.{key}": value for key, value in state.items()}
        torch.save({"teacher": teacher}, folder / f"checkpoint{10 * number:04d}.pth")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("files") / "run", 3)


def config(checkpoints, **changes):
    options = {**OPTIONS, "checkpoints": str(checkpoints), "model_args": MODEL_ARGS, **changes}
    return EvaluateConfig(**options)


def arguments(checkpoints, out, **changes):
    options = {**OPTIONS, **changes}
    result = ["evaluate", "--checkpoints", f"{checkpoints}/*.pth", "--out", str(out)]
    for name, value in MODEL_ARGS.items():
        result += ["--model-arg", f"{name}={value}"]
    for name, value in options.items():
        if value is not None:
            result += ["--" + name.replace("_", "-"), str(value)]
    return result


def run(*given):
    return runner.invoke(app, [str(argument) for argument in given])


def text_of(result):
    return " ".join(result.output.split())


def tables(folder):
    return [(folder / name).read_bytes() for name in ("results.csv", "results.json")]


@pytest.fixture(scope="module")
def uninterrupted(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "results"
    evaluate(config(checkpoints), out)
    return out


def test_figures_are_those_of_the_features(checkpoints, uninterrupted):
    row = json.loads((uninterrupted / "results.json").read_text())["checkpoints"][1]
    network = load(
        checkpoints / "checkpoint0010.pth", "dino", model_args=MODEL_ARGS, image_size=SIZE
    )
    scenes = TextureScenes(20, SIZE, seed=0)
    images = torch.stack([network.transform(scenes[i][0]) for i in range(20)])
    pooled, dense = network(images)
    metric = dse_ext.DSEMetric(variant="evaluation")
    for part in dense.split(10):  # 20 images in batches of at most 16 are two equal ones
        metric.update(part)
    expected = {name: float(value) for name, value in metric.compute().items()}
    for name in ("m_inter", "m_intra_image", "m_intra_batch", "m_dim", "avg_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    assert row["class_relevance"] == pytest.approx(expected["class_relevance"], rel=1e-3)
    assert row["m_intra"] == (row["m_intra_image"] + row["m_intra_batch"]) / 2
    assert row["rankme"] == pytest.approx(float(dse_ext.rankme(pooled)), rel=1e-4)
    assert row["rankme_dense"] == pytest.approx(float(dse_ext.rankme(dense)), rel=1e-4)
    assert row["alpha_req"] == pytest.approx(float(dse_ext.alpha_req(pooled)), rel=1e-3)
    views = Prepared(
        ImageSet(config(checkpoints), SIZE),
        augmentation(SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        count=5,
        views=3,
    )
    vectors = torch.stack([network(item.pixels)[0] for item in (views[i] for i in range(5))])
    assert row["lidar"] == pytest.approx(float(dse_ext.lidar(vectors)), rel=1e-3)
    assert not torch.equal(views[0].pixels[0], views[0].pixels[1])


def test_results_folder(uninterrupted):
    with open(uninterrupted / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert ",".join(COLUMNS) == (
        "run,checkpoint,epoch,method,variant,images,m_inter,m_intra_image,m_intra_batch,m_intra,"
        "class_relevance,m_dim,avg_norm,rankme,rankme_dense,alpha_req,lidar"
    )
    content = json.loads((uninterrupted / "results.json").read_text())
    assert content["format"] == 1
    assert content["skipped"] == []
    assert [row["epoch"] for row in content["checkpoints"]] == [0, 10, 20]
    for row, kept in zip(rows, content["checkpoints"], strict=True):
        assert tuple(kept) == COLUMNS
        assert row == {name: str(value) for name, value in kept.items()}
        assert kept["run"] == "run"
        assert kept["images"] == 20
    settings = content["settings"]
    assert settings["variant"] == "evaluation"
    assert settings["images"] == 20
    assert len(settings["images_sha256"]) == 64
    assert len((uninterrupted / "images.txt").read_text().splitlines()) == 20
    # Nothing of the machine, and no time: a resumed sweep gives the same bytes.
    for name in ("device", "batch_size", "workers", "out", "checkpoints"):
        assert name not in settings


def test_interruption_and_batches_do_not_change_a_byte(checkpoints, uninterrupted, tmp_path):
    out = tmp_path / "results"
    stop = {"after": 2}

    from dse_ext.evaluation import sweep

    class Stopping(sweep.Scorer):
        def score(self, *given, **named):
            if not stop["after"]:
                raise KeyboardInterrupt
            stop["after"] -= 1
            return super().score(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "Scorer", Stopping)
        result = run(*arguments(checkpoints, out))
    assert result.exit_code == 130
    assert "what was scored is kept" in text_of(result)
    assert len((out / "results.csv").read_text().splitlines()) == 3
    assert json.loads((out / "results.json").read_text())["checkpoints"][1]["epoch"] == 10
    result = run(*arguments(checkpoints, out))
    assert result.exit_code == 0, result.output
    assert "2 of 3 are done already" in text_of(result)
    assert tables(out) == tables(uninterrupted)


def test_processes_that_prepare_images_do_not_change_a_byte(checkpoints, uninterrupted, tmp_path):
    evaluate(config(checkpoints, workers=2), tmp_path)
    assert tables(tmp_path) == tables(uninterrupted)


def environment():
    # Sums over another number of threads are rounded otherwise.
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "120"}


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """SIGKILL and SIGTERM in the middle, in a process of its own; then the rest."""
    files = write_checkpoints(tmp_path / "run", 8)
    whole = tmp_path / "whole"
    evaluate(config(files, images=64), whole)
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM}

    def rows(name):
        table = tmp_path / name / "results.csv"
        return len(table.read_text().splitlines()) - 1 if table.is_file() else 0

    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "dse_ext.cli", *arguments(files, tmp_path / name, images=64)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        for name in signals
    }
    deadline = time.monotonic() + 240
    while running:
        for name, process in list(running.items()):
            stopped = process.poll()
            if rows(name) == 0 and stopped is None and time.monotonic() < deadline:
                continue
            process.send_signal(signals[name])
            _, errors = running.pop(name).communicate(timeout=60)
            assert process.returncode == -signals[name], errors.decode()
        time.sleep(0.002)
    for name in signals:
        out = tmp_path / name
        done = len(list(out.glob("parts/*.json")))
        assert 1 <= rows(name) <= done < 8
        assert 1 <= len(json.loads((out / "results.json").read_text())["checkpoints"]) <= done
        (out / ".results.csv.1.tmp").write_text("left by a process that was killed")
        result = run(*arguments(files, out, images=64))
        assert result.exit_code == 0, result.output
        assert f"{done} of 8 are done already" in text_of(result)
        assert tables(out) == tables(whole)
        assert not list(out.glob(".*"))


@pytest.mark.slow
def test_two_processes_share_the_checkpoints(checkpoints, uninterrupted, tmp_path):
    (checkpoints / "checkpoint0030.pth").write_bytes(b"damaged")
    try:
        process = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", "2", "-m", "dse_ext.cli"),
                *arguments(checkpoints, tmp_path),
            ],
            capture_output=True,
            env=environment(),
            timeout=300,
        )
    finally:
        (checkpoints / "checkpoint0030.pth").unlink()
    output = process.stdout.decode() + process.stderr.decode()
    assert process.returncode != 0, output  # a checkpoint was skipped
    assert "exitcode  : 3" in output, output
    content = json.loads((tmp_path / "results.json").read_text())
    assert [skipped["epoch"] for skipped in content["skipped"]] == [30]
    assert (tmp_path / "results.csv").read_bytes() == tables(uninterrupted)[0]
    # Each process showed the other's checkpoints in no bar of its own, and the table came once.
    assert output.count("results.csv") == 1


def test_other_settings_are_refused(checkpoints, uninterrupted, tmp_path):
    out = tmp_path / "results"
    run(*arguments(checkpoints, out))
    assert tables(out) == tables(uninterrupted)
    result = run(*arguments(checkpoints, out, variant="paper", images=16))
    assert result.exit_code == 2
    message = text_of(result)
    assert "variant = 'evaluation' there and 'paper' here" in message
    assert "images = 20 there and 16 here" in message
    assert "--overwrite" in message
    assert tables(out) == tables(uninterrupted)
    # How the machine does it may change.
    result = run(*arguments(checkpoints, out, batch_size=3))
    assert result.exit_code == 0
    assert "3 of 3 are done already" in text_of(result)
    result = run(*arguments(checkpoints, out, variant="paper"), "--overwrite")
    assert result.exit_code == 0
    rows = json.loads((out / "results.json").read_text())["checkpoints"]
    assert {row["variant"] for row in rows} == {"paper"}


def test_a_checkpoint_that_changed_is_scored_again(tmp_path):
    files = write_checkpoints(tmp_path / "run", 2)
    out = tmp_path / "results"
    evaluate(config(files), out)
    before = tables(out)
    state = torch.load(files / "checkpoint0010.pth", weights_only=True)
    state["teacher"]["backbone.norm.weight"] *= 2
    torch.save(state, files / "checkpoint0010.pth")
    os.utime(files / "checkpoint0010.pth", ns=(1, 1))
    evaluate(config(files), out)
    kept, changed = (json.loads(content[1])["checkpoints"] for content in (before, tables(out)))
    assert kept[0] == changed[0]
    assert kept[1]["rankme"] != changed[1]["rankme"]


def test_checkpoints_that_do_not_fit_are_skipped(tmp_path):
    files = write_checkpoints(tmp_path / "run", 2)
    written = dino()  # of two blocks
    torch.save(written.content, files / "checkpoint0005.pth")
    out = tmp_path / "results"
    result = run(*arguments(files, out))
    assert result.exit_code == 3
    message = text_of(result)
    assert "skipped: run/checkpoint0005.pth" in message
    content = json.loads((out / "results.json").read_text())
    (skipped,) = content["skipped"]
    assert skipped["checkpoint"] == "checkpoint0005.pth"
    assert skipped["unexpected"][0].startswith("blocks.1.")
    assert skipped["missing"] == []
    assert str(tmp_path) not in (out / "results.json").read_text()
    assert [row["epoch"] for row in content["checkpoints"]] == [0, 10]
    # Once it is mended, the same command scores it.
    good = torch.load(files / "checkpoint0000.pth", weights_only=True)
    torch.save(good, files / "checkpoint0005.pth")
    assert run(*arguments(files, out)).exit_code == 0
    content = json.loads((out / "results.json").read_text())
    assert content["skipped"] == []
    assert [row["epoch"] for row in content["checkpoints"]] == [0, 5, 10]


def test_features_that_are_not_finite(tmp_path):
    files = write_checkpoints(tmp_path / "run", 2)
    state = torch.load(files / "checkpoint0010.pth", weights_only=True)
    state["teacher"]["backbone.norm.bias"][0] = float("nan")
    torch.save(state, files / "checkpoint0010.pth")
    result = run(*arguments(files, tmp_path / "results"))
    assert result.exit_code == 0, result.output
    assert "features that are not finite" in text_of(result)
    row = json.loads((tmp_path / "results" / "results.json").read_text())["checkpoints"][1]
    assert row["m_dim"] is None
    assert row["rankme_dense"] is None
    last = (tmp_path / "results" / "results.csv").read_text().splitlines()[-1]
    assert last == "run,checkpoint0010.pth,10,dino,evaluation,20" + "," * 11


def test_a_folder_of_images(checkpoints, tmp_path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    scenes = TextureScenes(9, 80, seed=3)
    for number in range(9):
        scenes[number][0].save(photos / ("more" if number % 2 else ".") / f"{number}.png")
    (photos / "0.jpg").write_bytes(b"no image")
    result = run(*arguments(checkpoints, tmp_path / "a", data=photos))
    assert result.exit_code == 0, result.output
    message = text_of(result)
    assert "has 10 images, fewer than the 20 that were asked for" in message
    assert "cannot read the image" in message
    names = (tmp_path / "a" / "images.txt").read_text().split()
    assert sorted(names) == sorted(
        path.relative_to(photos).as_posix() for path in photos.rglob("*.*")
    )
    assert names != sorted(names)  # drawn at random, and left in that order
    settings = json.loads((tmp_path / "a" / "results.json").read_text())["settings"]
    assert settings["data"] == "photos"
    assert settings["images"] == 10
    # A choice of them is fixed by the seed.
    chosen = [
        ImageSet(config(checkpoints, data=str(photos), images=4, seed=seed), SIZE).names
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 4


def test_half_precision_and_layers(checkpoints, uninterrupted, tmp_path):
    evaluate(config(checkpoints, precision="bfloat16"), tmp_path / "half")
    evaluate(config(checkpoints, layer=0, lidar_images=0), tmp_path / "layer")
    whole, half, layer = (
        json.loads((folder / "results.json").read_text())["checkpoints"][0]
        for folder in (uninterrupted, tmp_path / "half", tmp_path / "layer")
    )
    assert half["rankme_dense"] == pytest.approx(whole["rankme_dense"], rel=0.02)
    assert half["rankme_dense"] != whole["rankme_dense"]
    assert layer["rankme_dense"] != pytest.approx(whole["rankme_dense"], rel=1e-4)
    assert layer["lidar"] is None


def test_checkpoints_of_a_training_run(tmp_path):
    """Scores are those that the run itself gives its checkpoints."""
    run_config = tiny(steps=4, checkpoints=2)
    folder = RunFolder(tmp_path / "demo")
    folder.root.mkdir()
    run_config.save(folder.config)
    source = open_source(run_config)
    Trainer(run_config, folder, source, torch.device("cpu")).run()
    result = run(
        *("evaluate", "--method", "dse-ext", "--checkpoints", folder.checkpoints),
        *("--data", "texture-scenes", "--images", 8, "--lidar-images", 4, "--workers", 0),
        *("--out", tmp_path / "results"),
    )
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "results" / "results.json").read_text())
    assert content["settings"]["image_size"] == 32  # as in training
    data = ScoringData(run_config, source)
    for row, step in zip(content["checkpoints"], (0, 2, 4), strict=True):
        assert (row["run"], row["epoch"]) == ("demo", step)
        score = score_checkpoint(load_checkpoint(run_config, folder, step), step, data, run_config)
        for name in ("m_inter", "m_intra", "m_dim", "class_relevance"):
            assert row[name] == pytest.approx(getattr(score, name), rel=1e-3), name


def test_the_share_of_dse_is_printed(checkpoints, tmp_path):
    result = run(*arguments(checkpoints, tmp_path / "results"))
    assert re.search(r"DSE \d+\.\d s \(\d+\.\d % of the forward passes\)", text_of(result))
    assert re.search(r"forward passes \d+\.\d s \(\d+ images/s\)", text_of(result))


def test_list():
    result = run("evaluate", "--list")
    assert result.exit_code == 0
    first = [line.split()[0] for line in result.output.splitlines() if line.split()]
    for reader in PAPER:
        assert reader.name in first
    assert len(PAPER) == 16
    for name in ("dinov2", "dinov3", "lightly", "dse-ext"):
        assert name in first


def test_help_has_every_option():
    result = run("evaluate", "--help")
    assert result.exit_code == 0
    text = text_of(result)
    for name in EvaluateConfig.__dataclass_fields__:
        option = {"model_args": "model-arg"}.get(name, name).replace("_", "-")
        assert f"--{option}" in text, option
    for option in ("--out", "--list", "--overwrite"):
        assert option in text
    assert "Exit status" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dyno"}, "method must be one of mocov3"),
        ({"variant": "papers"}, "variant must be one of regularizer, evaluation, paper, got"),
        ({"precision": "int8"}, "precision must be one of float32, bfloat16, float16, got 'int8'"),
        ({"images": 0}, "images must be >= 1, got 0"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"data": "/no/such/folder"}, "data must be 'texture-scenes' or a folder of images"),
        ({"layer": "5"}, "layer must be in [-1, 0]"),
        ({"model": "vit_tinny"}, "timm has no 'vit_tinny'"),
        ({"method": "swav"}, "must name files like ckp-{epoch}.pth"),
    ],
)
def test_errors_are_one_message(checkpoints, tmp_path, changes, message):
    result = run(*arguments(checkpoints, tmp_path / "results", **changes))
    assert result.exit_code == 2
    assert message in text_of(result)
    assert "Traceback" not in result.output


def test_missing_options_are_named():
    result = run("evaluate", "--method", "dino")
    assert result.exit_code == 2
    assert "missing --checkpoints, --data, --out (or give --list)" in text_of(result)


def test_one_name_for_several_runs_is_refused(tmp_path):
    write_checkpoints(tmp_path / "a", 1)
    write_checkpoints(tmp_path / "b", 1)
    out = tmp_path / "results"
    given = arguments(tmp_path / "*", out)
    result = run(*given, "--run", "mine")
    assert result.exit_code == 2
    assert "has checkpoints of several: a, b" in text_of(result)
    assert run(*given).exit_code == 0
    rows = json.loads((out / "results.json").read_text())["checkpoints"]
    assert [row["run"] for row in rows] == ["a", "b"]
    one = arguments(tmp_path / "a", tmp_path / "one")
    assert run(*one, "--run", "mine").exit_code == 0
    rows = json.loads((tmp_path / "one" / "results.json").read_text())["checkpoints"]
    assert rows[0]["run"] == "mine"


def test_batches_are_as_equal_as_possible():
    assert list(batch_sizes(2048, 1024)) == [1024, 1024]
    assert list(batch_sizes(2050, 1024)) == [684, 683, 683]
    assert list(batch_sizes(5, 1024)) == [5]
    for images in range(1, 40):
        sizes = list(batch_sizes(images, 7))
        assert sum(sizes) == images
        assert max(sizes) <= 7
        assert sizes == sorted(sizes, reverse=True)


def test_rankme_of_batches():
    z = torch.randn(60, 7, 12) * torch.logspace(0, -3, 12)
    rank = RankMeAccumulator()
    for part in z.split(13):
        rank.update(part)
    assert float(rank.compute()) == pytest.approx(float(dse_ext.rankme(z.double())), rel=1e-6)
    few = RankMeAccumulator()
    few.update(z[0, :3])
    assert float(few.compute()) == pytest.approx(float(dse_ext.rankme(z[0, :3])), rel=1e-6)
    one = RankMeAccumulator()
    one.update(torch.ones(50, 12))
    assert float(one.compute()) == pytest.approx(1, rel=1e-3)
    with pytest.raises(ValueError, match="z must have 12 features, got 3"):
        rank.update(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="at least one"):
        RankMeAccumulator().compute()
    rank.update(torch.full((1, 12), float("nan")))
    assert bool(rank.compute().isnan())


def test_images_have_the_size_of_the_network(checkpoints):
    network = load(
        checkpoints / "checkpoint0000.pth", "dino", model_args=MODEL_ARGS, image_size=SIZE
    )
    assert network.transform(Image.new("RGB", (300, 100))).shape == (3, SIZE, SIZE)
