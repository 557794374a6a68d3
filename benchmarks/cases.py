"""What is measured: shapes, inputs and the implementations that are compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

#: Threads of PyTorch in every measurement, ours and the peers'.
THREADS = int(os.environ.get("DSE_BENCH_THREADS", "2"))

#: Replaces the shapes by tiny ones, to see in seconds that the suite itself works.
QUICK = os.environ.get("DSE_BENCH_QUICK", "0") == "1"

#: (B, N, d): images, positions, features. ViT-S, ViT-B and ViT-L at 224 pixels; a stride-8 map.
SHAPES: tuple[tuple[int, int, int], ...] = (
    ((6, 16, 8), (4, 9, 12))
    if QUICK
    else ((64, 196, 384), (32, 196, 768), (8, 196, 1024), (16, 1024, 384))
)

#: "forward" is scoring, without a graph; "training" is forward and backward.
MODES = ("forward", "training")


@dataclass(frozen=True)
class Implementation:
    """One of the implementations that are compared.

    Attributes:
        title: How tables name it.
        rounds: Timed rounds of a benchmark; fewer for those that take seconds.
        build: Imports the implementation and returns its regularizer with default settings.
    """

    title: str
    rounds: int
    build: Callable[[], Module]


def _dse_ext() -> Module:
    import dse_ext

    return dse_ext.DSERegularizer()


def _lightly() -> Module:
    from lightly.loss.regularizer import DSERegularizer

    module: Module = DSERegularizer()
    return module


def _batched() -> Module:
    from benchmarks.batched_torch import BatchedDSERegularizer

    return BatchedDSERegularizer()


#: In the order in which a round of benchmarks runs them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "dse_ext": Implementation("dse-ext", 5, _dse_ext),
    "batched": Implementation("batched PyTorch", 3, _batched),
    "lightly": Implementation("lightly", 3, _lightly),
}


@dataclass(frozen=True)
class Case:
    """One measurement, the same for every implementation.

    Attributes:
        kind: Kind of input, see `make_features`.
        shape: (B, N, d).
        mode: One of `MODES`.
    """

    kind: str
    shape: tuple[int, int, int]
    mode: str

    @property
    def name(self) -> str:
        """A name that sorts and greps well, such as `training-mixture-64x196x384`."""
        return f"{self.mode}-{self.kind}-{'x'.join(map(str, self.shape))}"


#: Clustered features at every shape; unstructured ones, on which k-means takes longest, at two.
CASES: tuple[Case, ...] = (
    *(Case("mixture", shape, mode) for shape in SHAPES for mode in MODES),
    *(Case("random", shape, "training") for shape in SHAPES[:2]),
)


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


def run(module: Module, z: Tensor, mode: str) -> Tensor:
    """One step of what is timed; in `training` the gradient is left in `z.grad`."""
    if mode == "forward":
        with torch.no_grad():
            loss: Tensor = module(z)
            return loss
    loss = module(z)
    loss.backward()
    return loss
