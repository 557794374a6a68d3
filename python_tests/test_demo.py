"""The demo's preset: it runs, and its data set asks for texture and not for colour."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from dse_ext.cli import app
from dse_ext.data import TextureScenes
from dse_ext.probes import LinearProbe
from dse_ext.ssl import PRESETS, TrainConfig


def test_demo_keeps_eight_to_twelve_checkpoints_and_regularizes_as_the_paper_does():
    demo = TrainConfig(**PRESETS["demo"])
    assert 8 <= len(demo.checkpoint_steps()) - 1 <= 12
    assert demo.dse_weight == 0.001
    assert (demo.local_clusters, demo.global_clusters) == (3, 24)
    assert demo.data == "texture-scenes"
    assert demo.backbone.startswith("vit_")


def test_demo_runs_for_two_steps(tmp_path):
    out = tmp_path / "demo"
    arguments = ["train", "--preset", "demo", "--out", str(out), "--workers", "0"]
    arguments += ["--steps", "2", "--checkpoints", "1", "--batch-size", "4"]
    arguments += ["--score-images", "8", "--probe-images", "8", "--heldout-images", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "results.json").read_text())
    assert summary["config"]["backbone_args"] == PRESETS["demo"]["backbone_args"]
    assert (out / "report.html").is_file()


def test_colour_alone_does_not_tell_the_classes():
    """A probe on each patch's mean colour must stay far below what texture makes possible."""

    def mean_colours(split, count):
        scenes = TextureScenes(count, 64, split=split)
        images, labels = zip(*(scenes[i] for i in range(count)), strict=True)
        pixels = torch.stack([_tensor(image) for image in images])
        return F.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2), torch.stack(labels)

    probe = LinearProbe(len(TextureScenes.classes)).fit(*mean_colours("train", 96))
    assert probe.score(*mean_colours("heldout", 48)).miou < 0.2


def _tensor(image):
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
