"""``dse-ext probe``: from checkpoints and labels to miou.csv, one checkpoint at a time."""

from __future__ import annotations

import csv
import json
import re

import pytest
import segmentation_folders as folders
import timm
import torch
from typer.testing import CliRunner

from dse_ext.cli import app
from dse_ext.evaluation import probing

runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})

MODEL = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}


def save_checkpoint(path, seed, **changes):
    """A network in the layout of DINO."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, **{**MODEL, **changes}
    )
    state = {f"module.backbone.{key}": value for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"teacher": state, "epoch": seed}, path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "mine"
    for epoch in (0, 10, 20):
        save_checkpoint(folder / f"checkpoint{epoch:04d}.pth", epoch)
    return folder


def probe(checkpoints, out, *arguments, dataset="ade20k"):
    options = [
        *("--method", "dino", "--checkpoints", checkpoints, "--dataset", dataset, "--out", out),
        *("--model", "vit_tiny_patch16_224", "--image-size", 32, "--workers", 0, "--bank", 64),
        *("--max-iter", 20, "--device", "cpu"),
    ]
    for key, value in MODEL.items():
        options += ["--model-arg", f"{key}={value}"]
    return runner.invoke(app, ["probe", *map(str, [*options, *arguments])])


def table(out):
    with (out / "miou.csv").open() as file:
        return list(csv.DictReader(file))


def message(result):
    return " ".join(result.output.split())


LAYOUTS = {
    "voc": folders.voc,
    "ade20k": folders.ade20k,
    "cityscapes": folders.cityscapes,
    "coco-stuff": folders.coco_stuff,
    "folder": folders.pairs,
}


@pytest.mark.parametrize("dataset", [*LAYOUTS, "texture-scenes"])
def test_every_data_set_is_probed(checkpoints, tmp_path, dataset):
    arguments = ["--train-scenes", 6, "--val-scenes", 4]
    if dataset in LAYOUTS:
        arguments = ["--data", LAYOUTS[dataset](tmp_path / "data")]
    file = checkpoints / "checkpoint0010.pth"
    result = probe(file, tmp_path / "out", *arguments, dataset=dataset)
    assert result.exit_code == 0, result.output
    name = dataset.replace("-", "_")
    (row,) = table(tmp_path / "out")
    assert (row["run"], row["checkpoint"], row["epoch"]) == ("mine", "checkpoint0010.pth", "10")
    for kind in ("linear", "knn"):
        miou = float(row[f"{name}_{kind}"])
        assert 0 < miou <= 1
        assert f"{100 * miou:.2f}" in result.output
    details = json.loads((tmp_path / "out" / "probe.json").read_text())
    entry = details["columns"][f"{name}_linear"]
    (scored,) = entry["checkpoints"]
    known = [iou for iou in scored["class_iou"] if iou is not None]
    assert scored["miou"] == pytest.approx(sum(known) / len(known))
    assert len(scored["class_iou"]) == len(entry["classes"])
    assert entry["settings"]["image_size"] == [32, 32]
    assert str(tmp_path) not in json.dumps(details)


def test_sweep_goes_on_where_it_stopped(checkpoints, tmp_path, monkeypatch):
    data = folders.ade20k(tmp_path / "data")
    whole = probe(checkpoints, tmp_path / "whole", "--data", data)
    assert whole.exit_code == 0, whole.output
    measured = []
    measure = probing.measure

    def interrupted(*arguments, **keywords):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(arguments)
        return measure(*arguments, **keywords)

    out = tmp_path / "out"
    monkeypatch.setattr(probing, "measure", interrupted)
    stopped = probe(checkpoints, out, "--data", data)
    assert stopped.exit_code == 130
    assert "what was measured is kept" in message(stopped)
    assert [row["epoch"] for row in table(out)] == ["0"]
    (out / "miou.csv").unlink()  # as if the process had ended between the two files
    monkeypatch.setattr(probing, "measure", measure)
    resumed = probe(checkpoints, out, "--data", data)
    assert resumed.exit_code == 0, resumed.output
    assert "1 of 3 are done already" in message(resumed)
    for name in ("miou.csv", "probe.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["miou.csv", "probe.json"]


def test_columns_are_added_and_kept(checkpoints, tmp_path):
    file, out = checkpoints / "checkpoint0020.pth", tmp_path / "out"
    ade = ("--data", folders.ade20k(tmp_path))
    assert probe(file, out, *ade, "--probe", "knn").exit_code == 0
    (first,) = table(out)
    assert list(first) == ["run", "checkpoint", "epoch", "ade20k_knn"]
    (out / "miou.csv").write_text(
        "run,checkpoint,epoch,ade20k_knn,mine\n"
        f"mine,checkpoint0020.pth,20,{first['ade20k_knn']},0.5\n"
    )
    assert probe(file, out, *ade, "--probe", "linear", "--name", "other").exit_code == 0
    voc = ("--data", folders.voc(tmp_path))
    assert probe(file, out, *voc, "--probe", "knn", dataset="voc").exit_code == 0
    (row,) = table(out)
    assert list(row)[3:] == ["ade20k_knn", "mine", "other_linear", "voc_knn"]
    assert row["ade20k_knn"] == first["ade20k_knn"]
    assert row["mine"] == "0.5"
    differs = probe(file, out, *ade, "--probe", "knn", "--k", 3)
    assert differs.exit_code == 2
    assert "ade20k_knn was measured with other settings (k 30 then, 3 now)" in message(differs)
    again = probe(file, out, *ade, "--probe", "knn", "--k", 3, "--overwrite")
    assert again.exit_code == 0
    assert list(table(out)[0]) == list(row)


def test_a_grid_that_is_not_square(checkpoints, tmp_path):
    file = checkpoints / "checkpoint0000.pth"
    data = folders.cityscapes(tmp_path)
    options = ("--data", data, "--image-size", "24x40")
    result = probe(file, tmp_path / "out", *options, dataset="cityscapes")
    assert result.exit_code == 0, result.output
    details = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert details["columns"]["cityscapes_knn"]["settings"]["image_size"] == [24, 40]


def test_a_checkpoint_that_does_not_fit_is_skipped(tmp_path):
    save_checkpoint(tmp_path / "run" / "checkpoint0000.pth", 0)
    save_checkpoint(tmp_path / "run" / "checkpoint0001.pth", 1, depth=2)
    broken = tmp_path / "run" / "checkpoint0002.pth"
    save_checkpoint(broken, 2)
    content = torch.load(broken)
    content["teacher"]["module.backbone.norm.weight"].fill_(float("inf"))
    torch.save(content, broken)
    result = probe(tmp_path / "run", tmp_path / "out", "--data", folders.ade20k(tmp_path))
    assert result.exit_code == 3
    text = message(result)
    assert "skipped: run/checkpoint0001.pth: the weights do not fit" in text
    assert "skipped: run/checkpoint0002.pth: features that are not finite" in text
    assert [row["epoch"] for row in table(tmp_path / "out")] == ["0"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--probe", "mlp"), "--probe must be linear, knn or both, got 'mlp'"),
        (("--image-size", "big"), "--image-size must be a number of pixels or HEIGHTxWIDTH"),
        (("--k", "0"), "k must be >= 1, got 0"),
        (("--precision", "int8"), "precision must be one of float32, bfloat16, float16, got"),
        (("--batch-size", "0"), "batch_size must be >= 1, got 0"),
        (("--data", "no-such-folder"), "must be the folder of ade20k, but no-such-folder does not"),
        (("--method", "dyno"), "method must be one of"),
        (("--checkpoints", "nothing*"), "must name files like checkpoint"),
    ],
)
def test_errors_of_probe_are_one_message(checkpoints, tmp_path, arguments, text):
    data = folders.ade20k(tmp_path)
    result = probe(checkpoints, tmp_path / "out", "--data", data, *arguments)
    assert result.exit_code == 2
    assert text in message(result)
    assert "error:" in result.output
    assert "Traceback" not in result.output


def test_probe_help_has_every_option_with_its_meaning():
    result = runner.invoke(app, ["probe", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for option in (
        *("method", "checkpoints", "dataset", "out", "data", "probe", "name", "run", "model"),
        *("model-arg", "layer", "image-size", "train-images", "val-images", "train-split"),
        *("val-split", "num-classes", "ignore-index", "reduce-zero-label", "val-share"),
        *("train-scenes", "val-scenes", "l2", "max-iter", "k", "temperature", "bank", "seed"),
        *("precision", "batch-size", "device", "workers", "allow-pickle", "overwrite"),
    ):
        assert f"--{option} " in text, option


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_label_map_is_named(checkpoints, tmp_path, workers):
    data = folders.ade20k(tmp_path)
    (data / "annotations" / "validation" / "ADE_val_00000002.png").write_bytes(b"broken")
    file = checkpoints / "checkpoint0000.pth"
    result = probe(file, tmp_path / "out", "--data", data, "--workers", workers)
    assert result.exit_code == 2
    assert message(result).startswith("error: cannot read the label map")
    assert "ADE_val_00000002.png" in message(result)
    assert "Traceback" not in result.output
