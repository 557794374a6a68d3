"""The global random generators of Python, NumPy and torch, taken together.

Augmentations and layers of other libraries draw from them, NumPy's older one included, so they
have to be seeded, saved and restored as one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_all(*entropy: int) -> None:
    """Seeds the three generators.

    Args:
        *entropy: Non-negative integers; the same ones give the same random numbers.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    torch.manual_seed(int(seeds[2]))


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds the three generators for a while and restores them afterwards.

    Args:
        *entropy: As in :func:`seed_all`.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # torch.manual_seed would seed (and forked workers must not touch) the GPUs' generators too.
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators' states as tensors and plain values.

    Args:
        device: A GPU whose generator is included, or the CPU.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        # JSON, because a state file holds tensors and plain values only.
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, np.asarray(keys).tolist(), position, has_gauss, cached]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what :func:`random_state` returned.

    Args:
        state: The states.
        device: The device that the run goes on with.
    """
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = json.loads(state["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
