"""Sizes that users have, against float64 decompositions by torch on the same GPU."""

from __future__ import annotations

import pytest
import torch
from oracle import COMPONENTS
from oracle import dse_components as oracle_components
from parity import SCORE, relative_error, tolerance, weighted
from torch import Tensor

import dse_ext
from benchmarks.cases import make_features
from benchmarks.gpu import InFloat32

SHAPES = [(64, 196, 384), (16, 196, 1024), (4, 1024, 768), (2, 4096, 256)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_components_and_gradient(
    shape: tuple[int, int, int], dtype: torch.dtype, gpu: torch.device
) -> None:
    z = make_features("mixture", shape).to(gpu, dtype).requires_grad_()
    c = dse_ext.dse_components(z, generator=torch.Generator(gpu).manual_seed(0))
    (gradient,) = torch.autograd.grad(weighted(tuple(c[:5]), SCORE), z)
    wide = z.detach().double().requires_grad_()
    expected = oracle_components(wide, c.local_labels, c.global_labels, c.global_centroids.double())
    (expected_gradient,) = torch.autograd.grad(weighted(tuple(expected), SCORE), wide)
    limits = tolerance(dtype)
    for name, ours, theirs in zip(COMPONENTS, c[:5], expected, strict=True):
        assert relative_error(ours, theirs) <= limits.component, name
    assert relative_error(gradient, expected_gradient) <= limits.gradient


def _peak(z: Tensor, reg: torch.nn.Module) -> int:
    z.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    reg(z).backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_extra_memory_is_below_the_peers(shape: tuple[int, int, int], gpu: torch.device) -> None:
    peer = pytest.importorskip("lightly.loss.regularizer")
    z = make_features("mixture", shape).to(gpu, torch.bfloat16).requires_grad_()
    ours = _peak(z, dse_ext.DSERegularizer())
    theirs = _peak(z, InFloat32(peer.DSERegularizer()))
    assert ours <= theirs, f"{ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB"
