"""Optimizers by name."""

from __future__ import annotations

from typing import Any

import torch

from dse_ext.ssl.config import TrainConfig
from dse_ext.ssl.methods import Method


def create_optimizer(config: TrainConfig, method: Method) -> torch.optim.Optimizer:
    """Creates the optimizer of a run.

    Parameters fall into two groups: weights, whose decay follows the run's schedule
    (``group["decay"]``), and biases and norms, which are not decayed (nor scaled by LARS).

    Args:
        config: The run's configuration.
        method: The method whose networks are trained.
    """
    from lightly.models.utils import get_weight_decay_parameters

    decayed, plain = get_weight_decay_parameters(method.trained())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decayed if p.requires_grad], "decay": True},
        {"params": [p for p in plain if p.requires_grad], "decay": False, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum)
    if config.optimizer == "lars":
        from lightly.utils.lars import LARS

        lars: torch.optim.Optimizer = LARS(groups, lr=config.lr, momentum=config.sgd_momentum)
        return lars
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)
