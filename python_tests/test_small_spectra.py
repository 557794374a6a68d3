"""Effective ranks and nuclear norms of a few rows whose singular values lie far apart."""

from __future__ import annotations

import pytest
import torch
from features import normal
from parity import assert_gradient, tolerance
from torch import Tensor

import dse_ext


def rank_gradient(x: Tensor, center: bool) -> Tensor:
    """The gradient of the effective rank by a decomposition in float64."""
    x = x.double()
    if center:
        x = x - x.mean(dim=0)
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    sigma = torch.where(sigma > 1e-12 * sigma[0], sigma, 0)
    p = sigma / sigma.sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    weight = torch.where(p > 0, -(entropy.exp() / sigma.sum()) * (p.log() + entropy), 0)
    return (u * weight) @ vh


@pytest.mark.parametrize("center", [False, True], ids=["uncentred", "centred"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_effective_rank_of_a_line_and_its_rounding(
    dtype: torch.dtype, center: bool, device: torch.device
) -> None:
    """Rows on a line have singular values of rounding; centred ones a null vector too."""
    for seed in range(60):
        rows, dim = 2 + seed % 6, 3 + 5 * (seed % 7)
        x = (normal(rows, 1, seed=seed) @ normal(1, dim, seed=seed + 100)).to(dtype).to(device)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(dse_ext.effective_rank(x, center=center), x)
        expected = rank_gradient(x.detach().cpu(), center)
        assert_gradient(gradient, expected, tolerance(dtype).gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_gradient_of_equal_singular_values_vanishes(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Where the effective rank has its maximum, and nearly so just beside it."""
    x = torch.linalg.qr(normal(40, 40))[0].to(device, dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(dse_ext.effective_rank(x), x)
    assert gradient.norm() <= 1e3 * torch.finfo(dtype).eps
    beside = (
        x.detach() * torch.linspace(1, 1 + 1e-3, 40, device=device, dtype=dtype)[:, None]
    ).requires_grad_()
    (gradient,) = torch.autograd.grad(dse_ext.effective_rank(beside), beside)
    expected = rank_gradient(beside.detach().cpu(), False)
    assert_gradient(gradient, expected, tolerance(dtype).gradient)
