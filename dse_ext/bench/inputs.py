"""Features to measure with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KINDS", "make_features"]

KINDS = ("mixture", "random")


def make_features(kind: str, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Dense features of shape `(B, N, d)` in float32.

    Args:
        kind:
            `"mixture"`: every image shows some of a common set of parts, positions of a part vary
            around it with a spectrum that decays as 1/k, as the features of a trained backbone
            do. `"random"`: independent normal values.
        shape:
            (B, N, d).
        seed:
            Seed of the features.

    Raises:
        ValueError: If the kind is not known.
    """
    images, positions, dim = shape
    rng = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randn(shape, generator=rng)
    if kind != "mixture":
        raise ValueError(f"kind must be 'mixture' or 'random', got {kind!r}.")
    shown, known = 8, 40
    parts = torch.randn(known, dim, generator=rng)
    parts_of_image = torch.randint(known, (images, shown), generator=rng)
    part_of_position = torch.randint(shown, (images, positions), generator=rng)
    decay = torch.arange(1, dim + 1).rsqrt()
    variation = torch.randn(shape, generator=rng) * decay * (dim / decay.square().sum()).sqrt()
    style = 0.3 * torch.randn(images, 1, dim, generator=rng)
    return parts[parts_of_image.gather(1, part_of_position)] + 0.7 * variation + style
