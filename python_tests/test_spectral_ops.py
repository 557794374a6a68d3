"""cluster_nuclear_norms and effective_rank, against an SVD in float64."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from features import CLOUDS, COLLAPSED, generator, normal, rank_collapsed
from parity import DTYPES, assert_gradient, relative_error, tolerance

import dse_ext

# (n, d): wide, tall, square, one row, one column.
MATRICES = [(7, 20), (30, 6), (12, 12), (1, 5), (9, 1)]


def ids(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("center", [False, True], ids=["uncentred", "centred"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", MATRICES)
def test_effective_rank_parity(
    shape: tuple[int, int], dtype: torch.dtype, center: bool, device: torch.device
) -> None:
    x = (normal(*shape) + 0.5).to(dtype)
    ours_in = x.to(device).requires_grad_()
    theirs_in = x.double().requires_grad_()
    ours = dse_ext.effective_rank(ours_in, center=center)
    theirs = oracle.effective_rank(theirs_in, center=center)
    assert ours.shape == ()
    assert relative_error(ours, theirs) <= tolerance(dtype).component
    (ours_g,) = torch.autograd.grad(ours, ours_in)
    (theirs_g,) = torch.autograd.grad(theirs, theirs_in)
    assert ours_g.dtype == dtype
    if min(shape) == 1:  # The effective rank is the constant 1 (or 0), its gradient zero.
        assert float(ours_g.double().norm()) <= tolerance(dtype).gradient
    else:
        assert_gradient(ours_g, theirs_g, tolerance(dtype).gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("cloud", list(CLOUDS))
def test_effective_rank_of_every_kind_of_cloud(
    cloud: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = CLOUDS[cloud](6, 40, 16).reshape(-1, 16).to(dtype)
    ours, theirs = dse_ext.effective_rank(x.to(device)), oracle.effective_rank(x.double())
    assert relative_error(ours, theirs) <= tolerance(dtype, cloud in COLLAPSED).component


def test_effective_rank_keeps_leading_dimensions(device: torch.device) -> None:
    x = normal(2, 3, 8, 5).to(device)
    ours = dse_ext.effective_rank(x)
    assert ours.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert relative_error(ours[i, j], oracle.effective_rank(x[i, j].cpu())) < 1e-9


@pytest.mark.parametrize("d", [64, 384])
def test_effective_rank_of_one_direction_in_float32_is_one(d: int, device: torch.device) -> None:
    # A float32 Gram matrix of this cloud spreads its rounding over all d directions.
    x = (normal(1568, 1) @ normal(1, d, seed=1)).float().to(device)
    assert dse_ext.effective_rank(x).item() == pytest.approx(1.0, abs=1e-3)


def test_effective_rank_keeps_a_long_tail(device: torch.device) -> None:
    """Singular values from 1 to 1e-5: small ones, many of them, count."""
    d = 200
    sigma = torch.logspace(0, -5, d, dtype=torch.float64)
    q, _ = torch.linalg.qr(normal(500, d))
    r, _ = torch.linalg.qr(normal(d, d, seed=1))
    x = ((q * sigma) @ r).float()
    ours = dse_ext.effective_rank(x.to(device))
    assert relative_error(ours, oracle.effective_rank(x.double())) < 1e-4


def test_effective_rank_of_zeros_is_zero(device: torch.device) -> None:
    x = torch.zeros(4, 3, device=device, requires_grad=True)
    erank = dse_ext.effective_rank(x)
    (gradient,) = torch.autograd.grad(erank, x)
    assert erank.item() == 0
    assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(3, 20, 8), (2, 40, 4), (2, 9, 30)])
def test_cluster_nuclear_norms_parity(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    g, n, _ = shape
    k = 5
    x = normal(*shape).to(dtype)
    labels = torch.randint(k, (g, n), generator=generator(1))
    labels[0] = labels[0].clamp(max=2)  # empty clusters
    labels[1] = 0
    labels[1, 4] = 3  # a cluster of one row
    ours_in, theirs_in = x.to(device).requires_grad_(), x.double().requires_grad_()
    ours = dse_ext.cluster_nuclear_norms(ours_in, labels.to(device), k)
    theirs = oracle.cluster_nuclear_norms(theirs_in, labels, k)
    assert ours.shape == (g, k)
    assert relative_error(ours, theirs) <= tolerance(dtype).component
    assert torch.equal(ours.cpu() == 0, theirs == 0)
    weights = normal(g, k, seed=2)
    (ours_g,) = torch.autograd.grad((ours.double() * weights.to(device)).sum(), ours_in)
    (theirs_g,) = torch.autograd.grad((theirs * weights).sum(), theirs_in)
    assert ours_g.dtype == dtype
    assert_gradient(ours_g, theirs_g, tolerance(dtype).gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=ids)
@pytest.mark.parametrize("d", [3, 40, 250])
def test_clusters_of_many_sizes_side_by_side(
    d: int, dtype: torch.dtype, device: torch.device
) -> None:
    """2 to 210 rows in one call: each its own eigenproblem, whatever its neighbours' sizes are."""
    sizes = torch.tensor([2, 3, 210, 5, 64, 65, 4, 100, 33, 180, 7, 17, 2, 1, 90])
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    labels = labels[torch.randperm(len(labels), generator=generator(0))][None]
    stretch = torch.logspace(0, -4, d, dtype=torch.float64)
    x = (normal(1, labels.shape[1], d) * stretch + 1).to(dtype)
    ours_in, theirs_in = x.to(device).requires_grad_(), x.double().requires_grad_()
    ours = dse_ext.cluster_nuclear_norms(ours_in, labels.to(device), len(sizes))
    theirs = oracle.cluster_nuclear_norms(theirs_in, labels, len(sizes))
    limits = tolerance(dtype)
    assert float(((ours.cpu() - theirs) / theirs.clamp_min(1e-9)).abs().max()) <= limits.component
    (ours_g,) = torch.autograd.grad(ours.sum(), ours_in)
    (theirs_g,) = torch.autograd.grad(theirs.sum(), theirs_in)
    for cluster in range(len(sizes)):
        members = labels[0] == cluster
        if sizes[cluster] >= 2:
            assert_gradient(ours_g.cpu()[0, members], theirs_g[0, members], limits.gradient)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 31, 64, 97, 150, 176, 177, 200])
def test_effective_rank_of_square_matrices_of_any_side(n: int, device: torch.device) -> None:
    x = normal(3, n, n).to(device)
    for matrix, rank in zip(x.cpu(), dse_ext.effective_rank(x), strict=True):
        assert relative_error(rank, oracle.effective_rank(matrix)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=ids)
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_cluster_nuclear_norms_of_tight_clusters(
    spread: float, dtype: torch.dtype, device: torch.device
) -> None:
    """A large common row must not drown what is spread around it."""
    common = normal(24)
    x = (common + spread * common.norm() * normal(2, 30, 24, seed=1) / 24**0.5).to(dtype)
    labels = torch.randint(3, (2, 30), generator=generator(2))
    ours_in, theirs_in = x.to(device).requires_grad_(), x.double().requires_grad_()
    ours = dse_ext.cluster_nuclear_norms(ours_in, labels.to(device), 3)
    theirs = oracle.cluster_nuclear_norms(theirs_in, labels, 3)
    limits = tolerance(dtype, collapsed=True)
    assert relative_error(ours, theirs) <= limits.component
    (ours_g,) = torch.autograd.grad(ours.sum(), ours_in)
    (theirs_g,) = torch.autograd.grad(theirs.sum(), theirs_in)
    assert_gradient(ours_g, theirs_g, limits.gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=ids)
@pytest.mark.parametrize("shape", [(1, 30, 12), (1, 12, 30)], ids=["tall", "wide"])
def test_nuclear_norm_gradient_at_deficient_rank_is_a_subgradient(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """<g, X> is the norm, and no singular value of g exceeds one: the subgradients' definition."""
    x = rank_collapsed(*shape).to(device, dtype).requires_grad_()
    labels = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    norm = dse_ext.cluster_nuclear_norms(x, labels, 1).sum()
    (gradient,) = torch.autograd.grad(norm, x)
    g = gradient[0].double().cpu()
    limit = 1e-6 if dtype == torch.float64 else 1e-3
    inner = (g * x.detach()[0].double().cpu()).sum().item()
    assert inner == pytest.approx(norm.item(), rel=limit)
    assert torch.linalg.matrix_norm(g, 2).item() == pytest.approx(1, abs=limit)


def test_two_rows_have_a_radius_by_hand(device: torch.device) -> None:
    x = torch.tensor([[[1.0, 2, 2], [1, 5, 6], [7, 7, 7]]], device=device)
    labels = torch.tensor([[1, 1, 0]], device=device)
    norms = dse_ext.cluster_nuclear_norms(x, labels, 3)
    torch.testing.assert_close(
        norms.cpu(), torch.tensor([[0.0, 5 / math.sqrt(2), 0.0]]), rtol=1e-6, atol=0
    )
