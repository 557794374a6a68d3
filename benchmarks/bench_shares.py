"""The regularizer's share of a training step of ViT-Ti, S, B and L/16 at 224² pixels."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import DEVICE, DTYPE, QUICK, SHAPES, THREADS
from dse_ext.bench.case import Case
from dse_ext.bench.machine import available_bytes
from dse_ext.bench.share import BACKBONES, measure_share


@pytest.mark.parametrize("title", list(BACKBONES))
def test_share(benchmark: BenchmarkFixture, title: str) -> None:
    """Times the steps; the benchmark's own time is that of all of them together."""
    pytest.importorskip("timm")
    images = 2 if QUICK else BACKBONES[title].images
    needed, available = BACKBONES[title].bytes_needed(images), available_bytes(DEVICE)
    if available is not None and needed > available:
        pytest.skip(f"{needed >> 20} MiB are needed, {available >> 20} MiB are there")
    case = Case("dse_components", SHAPES[0], dtype=DTYPE, device=DEVICE, threads=THREADS)
    benchmark.group = "shares of a training step"
    benchmark.extra_info["share"] = benchmark.pedantic(  # type: ignore[no-untyped-call]
        measure_share, args=(title, case), kwargs={"images": images, "quick": QUICK}, rounds=1
    )
