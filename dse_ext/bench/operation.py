"""An operation and those who perform it, ready to be timed and compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dse_ext.bench.case import DTYPES, Case

__all__ = [
    "GRAM_REMARK",
    "OURS",
    "Agreement",
    "Contestant",
    "Implementation",
    "Operation",
    "gradient_tolerance",
    "relative",
    "value_tolerance",
]

OURS = "dse_ext"
"""Key of the implementation that the others are compared with."""


@dataclass(frozen=True)
class Contestant:
    """An implementation with its inputs.

    Attributes:
        reset: What is done before each round and not timed: seeds are drawn, gradients cleared.
        step: What is timed. It returns the result, and in training leaves the gradient.
        gradient: The gradient that the last step left, None in forward mode.
    """

    reset: Callable[[int], None]
    step: Callable[[], Any]
    gradient: Callable[[], Tensor | None] = lambda: None


@dataclass(frozen=True)
class Agreement:
    """How far a peer's result is from ours.

    Attributes:
        quantity: What was compared.
        difference: Relative difference.
        tolerance: What is allowed; a peer beyond it computes something else.
    """

    quantity: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether it is the same quantity; NaN is not."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return f"{self.quantity} differs by {self.difference:.1e}, allowed {self.tolerance:.0e}"


@dataclass(frozen=True)
class Implementation:
    """One of the implementations that are compared.

    Attributes:
        title: How tables name it.
        prepare: Imports it and gives it a case's inputs.
        compare: Its result beside ours, on the inputs of a case; None for ours.
        needs: Module and distribution that it needs, where that is not torch.
        modes: Those that it can do.
        on_gpu: Whether it runs on CUDA devices too.
        refuses: Why it cannot run a case, for reasons of its own; None where it can.
        compiled: Whether the first step compiles, which takes a minute and may fail.
        remark: What is not equal to ours in spite of equal settings.
    """

    title: str
    prepare: Callable[[Case, Tensor], Contestant]
    compare: Callable[[Case, Tensor], list[Agreement]] | None = None
    needs: tuple[str, str] | None = None
    modes: Sequence[str] = ("forward", "training")
    on_gpu: bool = True
    refuses: Callable[[Case], str | None] = lambda case: None
    compiled: bool = False
    remark: str = ""

    def obstacle(self, case: Case) -> str | None:
        """Why it cannot run a case, or None."""
        if self.needs is not None and importlib.util.find_spec(self.needs[0]) is None:
            extra = "bench" if self.needs[0] == "faiss" else "ssl"
            return f"{self.needs[1]} is not installed (pip install 'dse-ext[{extra}]')"
        if case.mode not in self.modes:
            return "it has no gradient"
        if torch.device(case.device).type != "cpu" and not self.on_gpu:
            return "it runs on CPUs only"
        return self.refuses(case)


@dataclass(frozen=True)
class Operation:
    """What is measured.

    Attributes:
        name: Its name in `dse_ext`.
        axes: What the axes of a case's shape are.
        inputs: Makes the input of a case.
        implementations: Ours first, the peers by key.
        modes: Modes that are measured.
        bytes_per_value: Upper bound on the extra memory of any implementation, over the values of
            the input. Measured ones are below it (`python_tests/test_bench_machine.py`).
    """

    name: str
    axes: str
    inputs: Callable[[Case], Tensor]
    implementations: dict[str, Implementation]
    modes: Sequence[str]
    bytes_per_value: int

    def bytes_needed(self, case: Case) -> int:
        """Upper bound on the memory that a case needs, its input included."""
        values = torch.Size(case.shape).numel()
        side = min(values // case.shape[-1], case.shape[-1])
        return (self.bytes_per_value + 8) * values + 64 * side * side + (64 << 20)


GRAM_REMARK = "Gram matrices: in float32 gradients off by percents, collapsed spectra lost"
"""What peers give up that take singular values from the eigenvalues of Gram matrices."""


def gradient_tolerance(case: Case, gram: bool = False) -> float:
    """What a peer's gradient may differ from ours by, relative, in a dtype.

    Args:
        case: The case.
        gram: Whether the peer takes singular values from float32 Gram matrices. Their eigenvalues
            have half of the digits, and near zero the gradient 1 / (2 √λ) shows it: where clusters
            have about as many rows as features, by percents; where there are few features at all,
            by more.
    """
    if DTYPES[case.dtype].itemsize < 4:
        return 5e-2 if gram else 2e-2
    if gram and case.dtype == "float32":
        return 0.2 if case.shape[-1] < 64 else 5e-2
    return 1e-3


def value_tolerance(case: Case) -> float:
    """What a peer's result may differ from ours by, relative, in a dtype."""
    return 1e-3 if DTYPES[case.dtype].itemsize < 4 else 1e-4


def relative(theirs: Tensor, ours: Tensor) -> float:
    """‖theirs − ours‖ / ‖ours‖ in float64."""
    difference = torch.linalg.vector_norm(theirs.double() - ours.double())
    size = torch.linalg.vector_norm(ours.double()).clamp(min=1e-300)
    return float(difference / size)
