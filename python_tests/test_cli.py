"""The command: help, messages, exit codes, and that options arrive."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from ssl_run import TINY
from typer.testing import CliRunner

from dse_ext import ops
from dse_ext.cli import app
from dse_ext.ssl import TrainConfig, Trainer

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})

# Options of the configuration that the command spells differently.
_SPELLED = {"method_args": "method-arg", "backbone_args": "backbone-arg"}


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def tiny_options(**changes):
    arguments = []
    for name, value in {**TINY, **changes}.items():
        option = "--" + _SPELLED.get(name, name).replace("_", "-")
        if isinstance(value, dict):
            for key, item in value.items():
                arguments += [option, f"{key}={item}"]
        else:
            arguments += [option, value]
    return arguments


def test_help_names_the_commands():
    for arguments in ((), ("--help",)):
        result = run(*arguments)
        assert "train" in result.output
        assert "info" in result.output


def test_train_help_has_every_option_with_its_default():
    result = run("train", "--help")
    assert result.exit_code == 0
    text = plain(result.output)
    defaults = TrainConfig()
    for name in defaults.to_dict():
        option = "--" + _SPELLED.get(name, name).replace("_", "-")
        assert option in text, option
    rows = " ".join(text.replace("│", " ").split())
    for name, value in defaults.to_dict().items():
        if isinstance(value, (dict, type(None))):
            continue
        # The description of an option ends with its default.
        after = rows.split(f"--{name.replace('_', '-')} ", 1)[1]
        shown = re.search(r"\[default: ([^\]]*)\]", after).group(1)
        assert shown == str(value) or float(shown) == value, name
    for option in ("--out", "--preset", "--resume", "--overwrite"):
        assert option in text


def test_info():
    result = run("info")
    assert result.exit_code == 0
    assert "torch" in result.output
    facts = json.loads(run("info", "--json").output)
    assert facts["versions"]["dse-ext"]


def test_train_prints_one_table_and_says_where_everything_is(tmp_path):
    out = tmp_path / "run"
    result = run("train", "--out", out, *tiny_options(steps=2, checkpoints=2))
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    for word in ("step", "M inter", "M dim", "DSE", "mIoU %", "chosen", "untrained", "λ ="):
        assert word in text, word
    assert str(out / "report.html") in text
    assert str(out / "results.json") in text
    assert "training 2/2" in text
    assert json.loads((out / "results.json").read_text())["config"]["steps"] == 2
    again = run("train", "--out", out)
    assert again.exit_code == 2
    assert "already holds a run" in plain(again.output)
    # The options of the run need not be repeated.
    resumed = run("train", "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "continuing after step 2 of 2" in plain(resumed.output)


def test_interruption_says_how_to_continue(tmp_path, monkeypatch):
    step = Trainer._train_step

    def interrupted(self, batch):
        row = step(self, batch)
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    out = tmp_path / "run"
    result = run("train", "--out", out, *tiny_options(save_every=100))
    assert result.exit_code == 130
    text = plain(result.output)
    assert "stopped after step 1; everything is saved" in text
    assert f"dse-ext train --out {out} --resume" in text
    assert (out / "resume.pt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dyno"], "resa, simsiam, swav, vicreg, vicregl, got 'dyno'"),
        (["--backbone", "vit_tinny"], "timm has no model 'vit_tinny'"),
        (["--preset", "fast"], "preset must be one of demo, got 'fast'"),
        (["--steps", "0"], "steps must be >= 1, got 0"),
        (["--method-arg", "momentun=0.9"], "method dino has no option 'momentun'"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--data", "/no/such/folder"], "data must be 'texture-scenes' or a folder of images"),
    ],
)
def test_errors_are_one_message(tmp_path, arguments, message):
    result = run("train", "--out", tmp_path / "run", *tiny_options(), *arguments)
    assert result.exit_code == 2
    text = " ".join(plain(result.output).split())
    assert message in text
    assert "error:" in text
    assert "Traceback" not in text


def test_folder_without_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "readme.txt").touch()
    result = run("train", "--out", tmp_path / "run", "--data", tmp_path / "images")
    assert result.exit_code == 2
    text = " ".join(plain(result.output).split())
    assert "no image in" in text
    assert ".jpeg, .jpg" in text
    assert "readme.txt" in text


def test_pairs_are_checked(tmp_path):
    result = run("train", "--out", tmp_path, "--method-arg", "momentum")
    assert result.exit_code == 2
    assert "expected KEY=VALUE, got 'momentum'" in plain(result.output)
    assert run("train").exit_code == 2
    assert "--out" in plain(run("train").output)


@pytest.mark.skipif("_cuda" not in ops.LIBRARIES, reason="built without CUDA")
def test_info_prints_a_plan():
    result = run("info", "--plan", "64", "196", "384", "bfloat16", "--gpu", "h100")
    assert result.exit_code == 0
    assert "(64, 196, 384) bfloat16, regularizer, on h100" in result.output
    assert "image_kernel" in result.output
    facts = json.loads(run("info", "--json", "--plan", 64, 196, 384, "float32").output)
    assert facts["dtype"] == "float32"
    assert facts["backward"]["steps"]


def test_info_refuses_a_plan_that_cannot_be():
    result = run("info", "--plan", 64, 196, 384, "int8")
    assert result.exit_code == 2
    assert "error:" in result.output
