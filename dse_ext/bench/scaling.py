"""How time grows with one axis: the exponent of a power law, fitted in log-log coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dse_ext.bench.case import Case

__all__ = ["AXES", "Exponent", "fit_exponent", "scaling_cases"]

AXES = ("B", "N", "d", "k")

_BASE = (16, 196, 192)
_GRIDS: dict[str, tuple[int, ...]] = {
    "B": (8, 16, 32, 64),
    "N": (64, 128, 256, 512, 1024),
    "d": (96, 192, 384, 768),
    "k": (6, 12, 24, 48, 96),
}
_QUICK_BASE = (8, 16, 8)
_QUICK_GRIDS: dict[str, tuple[int, ...]] = {
    "B": (8, 16, 24),
    "N": (8, 16, 32),
    "d": (4, 8, 16),
    "k": (2, 4, 8),
}


@dataclass(frozen=True)
class Exponent:
    """A fit of time ∝ size^value.

    Attributes:
        value: Slope of the least squares line through (log size, log time).
        error: Its standard error; None for two points, which a line always meets.
        lowest: Smallest slope between neighbours.
        highest: Largest slope between neighbours: where it is far from `lowest`, no single power
            describes the range.
    """

    value: float
    error: float | None
    lowest: float
    highest: float

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.value:.2f}{error}"


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> Exponent:
    """Fits a power law.

    Args:
        sizes: Different positive sizes, at least two.
        seconds: Positive times.

    Returns:
        The exponent with its spread.

    Raises:
        ValueError: If there are fewer than two sizes, equal ones, or values that are not positive.
    """
    if len(sizes) != len(seconds) or len(sizes) < 2:
        raise ValueError(
            f"two sizes and times are needed at least, got {len(sizes)} and {len(seconds)}."
        )
    if min(*sizes, *seconds) <= 0 or len(set(sizes)) != len(sizes):
        raise ValueError("sizes must be different and positive, times positive.")
    points = sorted(zip(map(math.log, sizes), map(math.log, seconds), strict=True))
    mean_x = math.fsum(x for x, _ in points) / len(points)
    mean_y = math.fsum(y for _, y in points) / len(points)
    spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    freedom = len(points) - 2
    local = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(points)]
    return Exponent(
        value=slope,
        error=math.sqrt(rest / freedom / spread) if freedom else None,
        lowest=min(local),
        highest=max(local),
    )


def scaling_cases(base: Case, *, quick: bool = False) -> dict[str, list[Case]]:
    """Training steps of `dse_components` at sizes that differ along one axis each.

    Args:
        base: Device, dtype, threads and kind of input.
        quick: Tiny sizes.

    Returns:
        Cases by axis. k is the number of global clusters, in groups of eight images.
    """
    images, positions, dim = _QUICK_BASE if quick else _BASE
    grids = _QUICK_GRIDS if quick else _GRIDS
    clusters = 4 if quick else 24
    found: dict[str, list[Case]] = {}
    for axis, values in grids.items():
        part = replace(base, operation="dse_components", mode="training", part=f"scaling {axis}")
        for value in values:
            sizes = {"B": images, "N": positions, "d": dim, "k": clusters, axis: value}
            shape = (sizes["B"], sizes["N"], sizes["d"])
            found.setdefault(axis, []).append(replace(part, shape=shape, clusters=sizes["k"]))
    return found


def axis_value(case: Case) -> tuple[str, int]:
    """The axis that a case of `scaling_cases` varies, and its value there."""
    axis = case.part.removeprefix("scaling ")
    return axis, case.clusters if axis == "k" else case.shape["BNd".index(axis)]
