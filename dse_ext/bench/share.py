"""The regularizer's share of a training step of a vision transformer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dse_ext.bench.case import DTYPES, Case
from dse_ext.bench.machine import set_threads
from dse_ext.bench.operation import OURS
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.timing import one_step, synchronize

__all__ = ["BACKBONES", "STEP", "Backbone", "measure_share"]

STEP = (
    "the step: one plain view at 224² pixels, random weights; forward, a stub for the loss (mean "
    "square of the tokens), backward and AdamW of the backbone alone; no data loading, no heads, "
    "no second view or teacher, all of which make the share smaller. dse-ext: forward and backward "
    "on features of that shape. Share: dse-ext / (step + dse-ext)"
)


class Backbone(NamedTuple):
    """A timm model with 196 patch tokens of an image.

    Attributes:
        name: timm's name.
        dim: Features of a token.
        depth: Blocks.
        heads: Attention heads.
        images: Images in a step on a CPU.
    """

    name: str
    dim: int
    depth: int
    heads: int
    images: int

    @property
    def parameters(self) -> int:
        """Weights, about."""
        return 12 * self.depth * self.dim**2 + 1000 * self.dim

    def bytes_needed(self, images: int) -> int:
        """Memory of a step in float32: weights with gradient and AdamW's state, activations."""
        activations = self.depth * 197 * (18 * self.dim + 2 * 197 * self.heads)
        return 20 * self.parameters + 4 * images * activations + (64 << 20)

    def operations(self, images: int) -> float:
        """Floating-point operations of a step, about."""
        return 6.0 * images * 197 * self.parameters


BACKBONES = {
    "ViT-Ti/16": Backbone("vit_tiny_patch16_224", 192, 12, 3, 32),
    "ViT-S/16": Backbone("vit_small_patch16_224", 384, 12, 6, 32),
    "ViT-B/16": Backbone("vit_base_patch16_224", 768, 12, 12, 16),
    "ViT-L/16": Backbone("vit_large_patch16_224", 1024, 24, 16, 8),
}


def measure_share(
    title: str,
    case: Case,
    *,
    images: int | None = None,
    repeats: int = 2,
    quick: bool = False,
    left: Callable[[], float] = lambda: float("inf"),
) -> dict[str, Any]:
    """Times a training step of a backbone and the regularizer's on features of its shape.

    Args:
        title: A key of `BACKBONES`.
        case: Device, dtype, threads and kind of input.
        images: Images in a step; the backbone's own by default.
        repeats: Steps that are timed, after one that is not.
        quick: One block, small images: does it work?
        left: Seconds until everything has to end; only the first repeat comes in any case.

    Returns:
        Plain values: `backbone_ms` and `dse_ms` (medians), `share`, what the step is, and how many
        steps were timed.
    """
    backbone = BACKBONES[title]
    count = images or backbone.images
    size = 64 if quick else 224
    set_threads(case.threads)
    seconds = _seconds_of_steps(backbone, case, count, size, repeats, quick, left)

    own = replace(
        case,
        operation="dse_components",
        shape=(count, (size // 16) ** 2, backbone.dim),
        mode="training",
    )
    operation = OPERATIONS[own.operation]
    ours = operation.implementations[OURS].prepare(own, operation.inputs(own))
    one_step(ours, own, seed=0)
    dse = statistics.median(one_step(ours, own, seed=1 + number) for number in range(5))
    total = statistics.median(seconds)
    return {
        "model": title,
        "images": count,
        "shape": list(own.shape),
        "dtype": case.dtype,
        "device": case.device,
        "threads": case.threads,
        "repeats": len(seconds),
        "step": STEP,
        "backbone_ms": round(1e3 * total, 3),
        "dse_ms": round(1e3 * dse, 3),
        "share": round(dse / (total + dse), 5),
    }


def _seconds_of_steps(
    backbone: Backbone,
    case: Case,
    images: int,
    size: int,
    repeats: int,
    quick: bool,
    left: Callable[[], float],
) -> list[float]:
    import timm

    options: dict[str, Any] = {"img_size": size, "depth": 1} if quick else {}
    dtype = DTYPES[case.dtype]
    model: Any = timm.create_model(backbone.name, num_classes=0, **options)
    model.to(case.device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pixels = torch.randn(images, 3, size, size, device=case.device, dtype=dtype)

    def step() -> float:
        synchronize(case)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model.forward_features(pixels).square().mean().backward()
        optimizer.step()
        synchronize(case)
        return time.perf_counter() - start

    step()
    seconds = [step()]
    while len(seconds) < repeats and left() > 2 * seconds[0]:
        seconds.append(step())
    return seconds
