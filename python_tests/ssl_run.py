"""A training run that takes a second: shared by the tests of the loop and of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dse_ext.ssl import TrainConfig

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
