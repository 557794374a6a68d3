"""What a run of `dse-ext bench` measures, the most important first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dse_ext.bench.case import Case, group_shape
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.scaling import scaling_cases

__all__ = ["QUICK_SHAPES", "SHAPES", "Plan", "Settings", "operation_cases", "plan"]

Shape = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = ((64, 196, 384), (32, 196, 768), (8, 196, 1024), (16, 1024, 384))
"""(B, N, d): images, positions, features. ViT-S, ViT-B and ViT-L at 224 pixels; a stride-8 map."""

QUICK_SHAPES: tuple[Shape, ...] = ((6, 16, 8), (4, 9, 12))


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        shapes: Shapes `(B, N, d)` of features.
        dtype: A key of `dse_ext.bench.case.DTYPES`.
        device: Where everything runs.
        threads: Threads of every implementation.
        seconds: Time for everything.
        quick: Tiny sizes of what the shapes do not decide, and few rounds.
    """

    shapes: Sequence[Shape] = SHAPES
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    seconds: float = 120.0
    quick: bool = False

    @property
    def base(self) -> Case:
        """A case with the device, dtype and threads."""
        return Case(
            "dse_components",
            self.shapes[0],
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
        )


@dataclass(frozen=True)
class Plan:
    """Parts of a run in the order in which they are measured.

    Attributes:
        operations: The regularizer's steps and the parts of DSE at the first shape.
        shapes: The regularizer's steps at the other shapes.
        memory: The training step whose extra peak memory is measured.
        scaling: Training steps that vary one axis each.
        shares: Keys of `dse_ext.bench.share.BACKBONES`.
        threads: The same cases with one thread and with all.
        compiled: Cases that peers compile for.
    """

    operations: Sequence[Case]
    shapes: Sequence[Case]
    memory: Sequence[Case]
    scaling: Sequence[Case]
    shares: Sequence[str]
    threads: Sequence[Case]
    compiled: Sequence[Case]


def operation_cases(base: Case, shape: Shape) -> list[Case]:
    """The parts of DSE at the sizes that features of a shape lead to.

    Args:
        base: Device, dtype, threads, kind of input and number of clusters.
        shape: (B, N, d).

    Returns:
        k-means and nuclear norms of groups of eight images, the effective rank of all rows. Tiny
        groups have fewer clusters: with few rows in each, one draw says nothing about another.
    """
    images, positions, dim = shape
    clusters = min(base.clusters, max(group_shape(shape)[1] // 8, 1))
    shapes: dict[str, tuple[int, ...]] = {
        "kmeans": group_shape(shape),
        "cluster_nuclear_norms": group_shape(shape),
        "effective_rank": (images * positions, dim),
    }
    return [
        replace(base, operation=name, shape=own, mode=mode, clusters=clusters)
        for name, own in shapes.items()
        for mode in OPERATIONS[name].modes
    ]


def plan(settings: Settings) -> Plan:
    """Plans a run.

    Args:
        settings: What the user asked for.
    """
    base = settings.base
    training = [replace(base, shape=shape) for shape in settings.shapes]
    parts = operation_cases(base, settings.shapes[0])
    forward = [replace(case, mode="forward") for case in training]
    on_gpu = settings.device != "cpu"
    counts = sorted({1, settings.threads})
    small = (8, 16, 8) if settings.quick else (16, 196, 384)
    return Plan(
        operations=[training[0], forward[0], *parts],
        shapes=[*training[1:], *forward[1:]],
        memory=training[:1],
        scaling=[
            case for cases in scaling_cases(base, quick=settings.quick).values() for case in cases
        ],
        shares=("ViT-Ti/16", "ViT-S/16"),
        threads=[]
        if on_gpu or len(counts) < 2
        else [replace(base, shape=small, part="threads", threads=count) for count in counts],
        compiled=[replace(base, part="compiled")],
    )
