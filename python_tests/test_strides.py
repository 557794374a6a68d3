"""Views are read where they lie: any strides give what a contiguous copy gives, to the bit."""

from __future__ import annotations

import oracle
import pytest
import torch
from features import clustered, generator, normal, random_labels
from parity import DTYPES
from torch import Tensor

import dse_ext

SHAPE = (9, 16, 12)


def with_gap(z: Tensor) -> Tensor:
    """Every second image, position and feature of a larger tensor, from an offset on."""
    b, n, d = z.shape
    base = torch.full(
        (2 * b + 1, 2 * n + 1, 2 * d + 1), float("nan"), dtype=z.dtype, device=z.device
    )
    view = base[1::2, 1::2, 1::2]
    view.copy_(z)
    return view


VIEWS = {
    "gaps": with_gap,
    "features_first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "positions_outermost": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "conv_map_flattened": lambda z: (
        z.transpose(1, 2)
        .contiguous()
        .reshape(z.shape[0], z.shape[2], 4, -1)
        .flatten(2)
        .transpose(1, 2)
    ),
    "channels_last_conv_map_flattened": lambda z: (
        z.transpose(1, 2)
        .reshape(z.shape[0], z.shape[2], 4, -1)
        .to(memory_format=torch.channels_last)
        .flatten(2)
        .transpose(1, 2)
    ),
    "class_token_dropped": lambda z: torch.cat([z[:, :1], z], dim=1)[:, 1:],
    "flipped_twice": lambda z: z.flip(1).flip(1),
}


def all_of(c: dse_ext.DSEComponents) -> Tensor:
    return torch.stack([m.detach().double() for m in c[:5]])


def test_the_views_are_views_and_not_contiguous() -> None:
    z = clustered(*SHAPE)
    views = {name: make(z) for name, make in VIEWS.items()}
    assert all(torch.equal(view, z) for view in views.values())
    assert sum(not view.is_contiguous() for view in views.values()) >= 5


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("view", list(VIEWS))
def test_dse_components_of_a_view(
    view: str, variant: str, dtype: torch.dtype, device: torch.device
) -> None:
    z = clustered(*SHAPE).to(device, dtype)
    results = []
    for x in (z, VIEWS[view](z)):
        x = x.detach().requires_grad_()
        c = dse_ext.dse_components(x, variant=variant, generator=generator(1))
        (gradient,) = torch.autograd.grad(c.score(), x)
        results.append((all_of(c), c.local_labels, c.global_labels, c.global_centroids, gradient))
    for contiguous, strided in zip(*results, strict=True):
        assert torch.equal(contiguous, strided)


@pytest.mark.parametrize("view", list(VIEWS))
def test_other_ops_of_a_view(view: str, device: torch.device) -> None:
    z = clustered(*SHAPE).float().to(device)
    x = VIEWS[view](z)
    labels = random_labels(*SHAPE[:2], 3).to(device)
    for a, b in zip(
        dse_ext.kmeans(z, 4, generator=generator(1)),
        dse_ext.kmeans(x, 4, generator=generator(1)),
        strict=True,
    ):
        assert torch.equal(a, b)
    gradients = []
    for y in (z, x):
        y = y.detach().requires_grad_()
        rank = dse_ext.effective_rank(y, center=True)
        norms = dse_ext.cluster_nuclear_norms(y, labels, 3)
        gradients.append((rank, norms, *torch.autograd.grad(rank.sum() + norms.sum(), y)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_features_get_the_sum_of_the_gradients(dim: int, device: torch.device) -> None:
    """Stride 0: one image (or position) repeated, without a copy."""
    base = clustered(*SHAPE).to(device).narrow(dim, 0, 1).requires_grad_()
    options = {
        "local_labels": random_labels(*SHAPE[:2], 3).to(device),
        "global_labels": random_labels(*SHAPE[:2], 5, seed=1).to(device),
        "global_centroids": normal(2, 5, SHAPE[2]).to(device),
        "global_clusters": 5,
        "group_images": 8,
    }
    expanded, copied = base.expand(SHAPE), base.expand(SHAPE).contiguous()
    assert expanded.stride(dim) == 0
    a, b = (dse_ext.dse_components(z, **options) for z in (expanded, copied))
    assert torch.equal(all_of(a), all_of(b))
    (ga,) = torch.autograd.grad(a.score(), base)
    (gb,) = torch.autograd.grad(b.score(), base)
    torch.testing.assert_close(ga, gb)


def test_labels_and_centroids_of_any_strides(device: torch.device) -> None:
    z = clustered(*SHAPE).to(device).requires_grad_()
    local, shared = random_labels(*SHAPE[:2], 3), random_labels(*SHAPE[:2], 5, seed=1)
    centroids = normal(2, 5, SHAPE[2])
    options = {"global_clusters": 5, "group_images": 8}
    plain = dse_ext.dse_components(
        z,
        local_labels=local.to(device),
        global_labels=shared.to(device),
        global_centroids=centroids.to(device),
        **options,
    )
    strided = dse_ext.dse_components(
        z,
        local_labels=local.to(device).t().contiguous().t(),
        global_labels=shared.to(device).repeat_interleave(2, dim=1)[:, ::2],
        global_centroids=centroids.to(device).permute(2, 0, 1).contiguous().permute(1, 2, 0),
        **options,
    )
    assert torch.equal(all_of(plain), all_of(strided))
    (ga,) = torch.autograd.grad(plain.score(), z)
    (gb,) = torch.autograd.grad(strided.score(), z)
    assert torch.equal(ga, gb)


def test_gradients_arriving_with_any_strides(device: torch.device) -> None:
    x = clustered(6, 16, 8).to(device).requires_grad_()
    labels = random_labels(6, 16, 3).to(device)
    norms = dse_ext.cluster_nuclear_norms(x, labels, 3)
    weights = normal(3, 6).to(device)
    (strided,) = torch.autograd.grad(norms, x, weights.t(), retain_graph=True)
    (plain,) = torch.autograd.grad(norms, x, weights.t().contiguous(), retain_graph=True)
    assert torch.equal(strided, plain)
    one = torch.ones((), dtype=x.dtype, device=device)
    (expanded,) = torch.autograd.grad(norms, x, one.expand(6, 3), retain_graph=True)
    (full,) = torch.autograd.grad(norms, x, torch.ones(6, 3, dtype=x.dtype, device=device))
    assert torch.equal(expanded, full)
