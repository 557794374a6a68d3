"""Matrices of a side above 160, which take the blocked path, and spectra that end in rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from features import clustered, normal, random
from parity import DTYPES, MIXED, SCORE, assert_components, assert_gradient, library, reference
from parity import tolerance as tolerance_of
from torch import Tensor

import dse_ext


def decaying(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    """Features whose singular values span three orders of magnitude."""
    return normal(b, n, d, seed=seed) * torch.logspace(0, -3, d, dtype=torch.float64)


def layer_normalized(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    """Features that sum to zero, as behind a layer normalization without an affine part."""
    return F.layer_norm(clustered(b, n, d, seed), (d,))


def group_normalized(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    """Four groups of features that sum to zero each."""
    z = clustered(b, n, d, seed).reshape(b * n, d)
    return F.group_norm(z, 4).reshape(b, n, d)


CLOUDS = {
    "random": random,
    "clustered": clustered,
    "decaying": decaying,
    "layer_normalized": layer_normalized,
    "group_normalized": group_normalized,
}
ROUNDING = ("layer_normalized", "group_normalized")
# (B, N, d), clusters an image: a large matrix of the effective rank; clusters of more rows than
# features; of fewer; fewer rows in all than features.
CASES = {
    "rank": ((10, 40, 192), 3),
    "wide clusters": ((2, 700, 200), 2),
    "tall clusters": ((2, 400, 500), 2),
    "few rows": ((2, 120, 300), 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("cloud", list(CLOUDS))
def test_parity_of_large_matrices(
    cloud: str, case: str, dtype: torch.dtype, device: torch.device
) -> None:
    shape, clusters = CASES[case]
    z = CLOUDS[cloud](*shape).to(device, dtype)
    limits = tolerance_of(dtype, cloud in ROUNDING)
    options = {"normalize": cloud != "decaying"}
    labels = torch.arange(shape[1]).expand(shape[:2]) % clusters
    sampled = {
        "local_labels": labels.to(device),
        "global_labels": ((torch.arange(shape[0])[:, None] + labels) % 2).to(device),
    }
    for coefficients in (SCORE, MIXED):
        ours, c = library(
            z, coefficients, local_clusters=clusters, global_clusters=2, **sampled, **options
        )
        expected = reference(
            z,
            coefficients,
            sampled["local_labels"].cpu(),
            sampled["global_labels"].cpu(),
            c.global_centroids.cpu(),
            group_images=max(2 // clusters, 1),
            **options,
        )
        assert_components(ours, expected, limits.component)
        assert_gradient(ours.gradient, expected.gradient, limits.gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("lost", [1, 5, 40])
def test_effective_rank_with_singular_values_of_rounding(
    lost: int, dtype: torch.dtype, device: torch.device
) -> None:
    """`lost` features are sums of others but for rounding: a few, and more than a few."""
    x = normal(500, 200)
    x[:, 200 - lost :] = x[:, :lost] + x[:, lost : 2 * lost]
    x = x.to(device, dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(dse_ext.effective_rank(x), x)
    exact = x.detach().cpu().double().requires_grad_()
    u, sigma, vh = torch.linalg.svd(exact.detach(), full_matrices=False)
    # Sums that are exact in float64 leave singular values that are not of the features.
    sigma = torch.where(sigma > 500 * torch.finfo(torch.float64).eps * sigma[0], sigma, 0)
    p = sigma / sigma.sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    weight = torch.where(p > 0, -(entropy.exp() / sigma.sum()) * (p.log() + entropy), 0)
    limits = tolerance_of(dtype, collapsed=True)
    assert float(dse_ext.effective_rank(x.detach()).cpu().double()) == pytest.approx(
        float(entropy.exp()), rel=limits.component
    )
    assert_gradient(gradient, (u * weight) @ vh, limits.gradient)
