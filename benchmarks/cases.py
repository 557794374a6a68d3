"""What `make bench` measures, and the settings that it takes from the environment."""

from __future__ import annotations

import os
from dataclasses import replace

from dse_ext.bench.case import MODES, Case
from dse_ext.bench.inputs import make_features
from dse_ext.bench.plan import QUICK_SHAPES, operation_cases
from dse_ext.bench.plan import SHAPES as FULL_SHAPES
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.regularizers import REGULARIZERS as IMPLEMENTATIONS
from dse_ext.bench.regularizers import run
from dse_ext.bench.scaling import scaling_cases

__all__ = ["IMPLEMENTATIONS", "MODES", "SHAPES", "make_features", "run"]

#: Threads in every measurement, ours and the peers'.
THREADS = int(os.environ.get("DSE_BENCH_THREADS", "2"))

#: Replaces the shapes by tiny ones, to see in seconds that the suite itself works.
QUICK = os.environ.get("DSE_BENCH_QUICK", "0") == "1"

DTYPE = os.environ.get("DSE_BENCH_DTYPE", "float32")
DEVICE = os.environ.get("DSE_BENCH_DEVICE", "cpu")

#: (B, N, d): images, positions, features.
SHAPES = QUICK_SHAPES if QUICK else FULL_SHAPES

_BASE = Case("dse_components", SHAPES[0], dtype=DTYPE, device=DEVICE, threads=THREADS)


def _regularizer() -> tuple[Case, ...]:
    """Clustered features at every shape; unstructured ones, the slowest to cluster, at two."""
    mixture = [replace(_BASE, shape=shape, mode=mode) for shape in SHAPES for mode in MODES]
    random = [replace(_BASE, shape=shape, kind="random") for shape in SHAPES[:2]]
    return (*mixture, *random)


def _operations() -> tuple[Case, ...]:
    """The parts of DSE for two shapes, and k-means in the images of the first."""
    parts = [case for shape in SHAPES[:2] for case in operation_cases(_BASE, shape)]
    local = replace(_BASE, operation="kmeans", mode="forward", shape=SHAPES[0], clusters=3)
    return (local, *parts)


def _one_of_each() -> list[Case]:
    shape = QUICK_SHAPES[0] if QUICK else (16, 196, 384)
    own = [replace(_BASE, shape=shape), *operation_cases(_BASE, shape)]
    return [case for case in own if case.mode == OPERATIONS[case.operation].modes[0]]


def _threads() -> tuple[Case, ...]:
    """One case an operation with one thread and with all."""
    counts = sorted({1, THREADS}) if THREADS > 1 else ()
    return tuple(
        replace(case, part="threads", threads=count) for case in _one_of_each() for count in counts
    )


REGULARIZER_CASES = _regularizer()
OPERATION_CASES = _operations()
SCALING_CASES = tuple(
    case for cases in scaling_cases(_BASE, quick=QUICK).values() for case in cases
)
THREADS_CASES = _threads()
COMPILED_CASES = tuple(replace(case, part="compiled") for case in _one_of_each())
