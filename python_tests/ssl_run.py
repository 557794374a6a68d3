"""A training run that takes a second: shared by the tests of the loop and of the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from dse_ext.ssl import TrainConfig
from dse_ext.ssl.methods import METHODS

TINY: dict[str, Any] = {
    "backbone_args": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "patch_size": 8,
    "image_size": 32,
    "train_images": 10,
    "steps": 6,
    "batch_size": 4,
    "lr": 1e-3,
    "checkpoints": 3,
    "score_images": 8,
    "probe_images": 8,
    "heldout_images": 8,
    "method_args": {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 32, "local_views": 1},
    "threads": 1,
    "workers": 0,
    "save_every": 1,
}


def tiny(**changes: Any) -> TrainConfig:
    """The small configuration with some changes."""
    return TrainConfig(**{**TINY, **changes})


BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
        "patch_size": 8,
    },
    "swin": {
        "backbone": "swin_tiny_patch4_window7_224",
        "backbone_args": {
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "patch_size": 2,
            "drop_path_rate": 0.0,
        },
        "patch_size": None,
    },
    "resnet": {
        "backbone": "test_resnet",
        "backbone_args": {"output_stride": 8},
        "patch_size": None,
    },
}
"""A small network of each family, for images of 32 x 32 pixels."""

_METHOD_ARGS: dict[str, Any] = {
    "hidden_dim": 16,
    "bottleneck_dim": 8,
    "output_dim": 32,
    "local_views": 1,
    "queue": 16,
    "prototypes": 8,
    "queue_start": 0.0,
    "decoder_dim": 24,
    "decoder_depth": 1,
    "predictor_depth": 1,
    "local_hidden_dim": 16,
    "local_output_dim": 16,
    "instance_dim": 8,
}


def tiny_method(name: str, family: str | None = None, **changes: Any) -> TrainConfig:
    """A small run of a method, on a backbone of the family of its recipe or of a given one."""
    method = METHODS[name]
    if family is None:
        family = next(f for f in BACKBONES if f in method.recipe.get("backbone", "vit"))
    known = {field.name for field in dataclasses.fields(method.Options)}
    values = {
        **{k: v for k, v in TINY.items() if k != "lr"},
        **BACKBONES[family],
        "method_args": {k: v for k, v in _METHOD_ARGS.items() if k in known},
        "steps": 4,
        "checkpoints": 1,
        "train_images": 8,
        **changes,
    }
    return TrainConfig.for_method(name, **values)


def networks(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every checkpoint's weights by file name."""
    return {
        path.name: torch.load(path, weights_only=True)["state_dict"]
        for path in sorted((root / "checkpoints").glob("*.pt"))
    }


def assert_same_networks(a: Path, b: Path) -> None:
    """Asserts that two runs kept bitwise the same networks."""
    first, second = networks(a), networks(b)
    assert first.keys() == second.keys()
    assert first
    for name, weights in first.items():
        assert weights.keys() == second[name].keys()
        for key, value in weights.items():
            assert torch.equal(value, second[name][key]), (name, key)


TIMES = ("step_seconds", "dse_seconds", "data_seconds")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log rows without what differs from one run to the next."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
