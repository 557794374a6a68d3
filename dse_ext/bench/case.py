"""One measurement: what every implementation of an operation is asked to do."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

__all__ = ["DTYPES", "MODES", "Case", "default_threads", "group_shape"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

MODES = ("forward", "training")
"""`"forward"` is scoring, without a graph; `"training"` is forward and backward."""


def default_threads() -> int:
    """Threads of a measurement where none are asked for: the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Case:
    """What is measured, the same for every implementation.

    Attributes:
        operation: A key of `dse_ext.bench.registry.OPERATIONS`.
        shape: Of the input, see `Operation.axes`.
        mode: One of `MODES`.
        kind: Kind of input, see `dse_ext.bench.inputs.make_features`.
        clusters: k: global clusters of DSE, else clusters of a set of rows. Not used by spectra of
            whole matrices.
        dtype: A key of `DTYPES`.
        device: `"cpu"`, or a CUDA device as torch names it.
        threads: Threads of every implementation on a CPU.
        part: What the measurement is for, a heading in reports: `"operations"`, `"threads"`,
            `"compiled"` or `"scaling AXIS"`.
    """

    operation: str
    shape: tuple[int, ...]
    mode: str = "training"
    kind: str = "mixture"
    clusters: int = 24
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    part: str = "operations"

    @property
    def name(self) -> str:
        """A name that sorts and greps well, such as `kmeans-forward-mixture-8x1568x384-k24-…`."""
        sizes = "x".join(map(str, self.shape))
        device = self.device.replace(":", "")
        return (
            f"{self.operation}-{self.mode}-{self.kind}-{sizes}-k{self.clusters}"
            f"-{self.dtype}-{device}-t{self.threads}"
        )

    def __str__(self) -> str:
        k = "" if self.operation == "effective_rank" else f"k = {self.clusters}, "
        return f"{self.operation} {self.shape} {self.mode}, {k}{self.kind}, {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain values."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        """The case of such values."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    def tiny(self) -> Case:
        """The same at a size that takes no time: what is done once happens there."""
        shape = (9, 16, 32)[-len(self.shape) :]
        return replace(self, shape=shape, clusters=min(self.clusters, 4))


def group_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Sets of rows that the global clusters of features `(B, N, d)` are made of: groups of 8."""
    images, positions, dim = shape
    return max(images // 8, 1), min(images, 8) * positions, dim
