"""The closed-form gradients against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from features import generator, normal, random_labels
from torch import Tensor

import dse_ext

B, N, D = 5, 4, 3
LOCAL, SHARED, GROUP = 2, 5, 2  # groups of 2, 2 and 1 images


def components_of(
    variant: str, normalize: bool, device: torch.device, single: bool = False
) -> Callable[[Tensor], dse_ext.DSEComponents]:
    """A deterministic function of z: clusters, centroids and permutation are fixed."""
    local, shared = random_labels(B, N, LOCAL, seed=1), random_labels(B, N, SHARED, seed=2)
    if single:
        # Clusters of one row in an image, in a group, and an image with nothing else.
        local[0] = torch.tensor([0, 1, 1, 1])
        shared[4] = torch.tensor([0, 1, 2, 3])
        shared[0, 0], shared[0, 1:], shared[1] = 4, 0, 1
    local, shared = local.to(device), shared.to(device)
    centroids = normal(3, SHARED, D, seed=3).to(device)

    def components(z: Tensor) -> dse_ext.DSEComponents:
        return dse_ext.dse_components(
            z,
            variant=variant,
            local_clusters=LOCAL,
            global_clusters=SHARED,
            group_images=GROUP,
            normalize=normalize,
            generator=generator(5),
            local_labels=local,
            global_labels=shared,
            global_centroids=centroids,
        )

    return components


def gradcheck(function: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> None:
    assert torch.autograd.gradcheck(function, x.to(device).requires_grad_(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("component", oracle.COMPONENTS)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_each_component(
    variant: str, normalize: bool, component: str, device: torch.device
) -> None:
    components = components_of(variant, normalize, device)
    gradcheck(lambda z: getattr(components(z), component), normal(B, N, D), device)


@pytest.mark.parametrize("single", [False, True], ids=["", "clusters_of_one_row"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_score_with_a_smaller_last_group(
    variant: str, normalize: bool, single: bool, device: torch.device
) -> None:
    components = components_of(variant, normalize, device, single)
    gradcheck(lambda z: components(z).score(0.7), normal(B, N, D, seed=4), device)


@pytest.mark.parametrize("shape", [(2, 3, 9), (3, 6, 1), (1, 6, 4), (5, 1, 4)])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_score_at_other_shapes(
    variant: str, shape: tuple[int, int, int], device: torch.device
) -> None:
    b, n, d = shape
    local = random_labels(b, n, 2, seed=1).to(device)
    shared = random_labels(b, n, 3, seed=2).to(device)
    centroids = normal(b, 3, d, seed=3).to(device)

    def score(z: Tensor) -> Tensor:
        return dse_ext.dse_components(
            z,
            variant=variant,
            local_clusters=2,
            global_clusters=3,
            group_images=1,
            normalize=d > 1,  # One normalized feature is a sign: no derivative to check.
            generator=generator(5),
            local_labels=local,
            global_labels=shared,
            global_centroids=centroids,
        ).score()

    gradcheck(score, normal(*shape, seed=6), device)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (2, 3, 5), (2, 2, 6, 3)])
@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
def test_effective_rank(shape: tuple[int, ...], center: bool, device: torch.device) -> None:
    gradcheck(lambda x: dse_ext.effective_rank(x, center=center), normal(*shape) + 0.5, device)


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 14, 3)], ids=["n<d", "n>d"])
def test_cluster_nuclear_norms(shape: tuple[int, int, int], device: torch.device) -> None:
    labels = torch.randint(3, shape[:2], generator=generator(1))
    labels[1] = labels[1].clamp(max=1)
    labels[0, 0], labels[0, 1:] = 2, labels[0, 1:].clamp(max=1)  # cluster 2 has one row
    labels = labels.to(device)
    gradcheck(lambda x: dse_ext.cluster_nuclear_norms(x, labels, 3), normal(*shape), device)


def test_only_some_components_used_get_a_gradient(device: torch.device) -> None:
    """Backward through one output, with no gradient arriving at the others."""
    components = components_of("regularizer", True, device)
    z = normal(B, N, D).to(device).requires_grad_()
    c = components(z)
    separate = [torch.autograd.grad(m, z, retain_graph=True)[0] for m in c[:5]]
    (together,) = torch.autograd.grad(sum(c[:5]), z)
    torch.testing.assert_close(sum(separate), together)


def test_means_as_centroids_are_constants_for_the_gradient(device: torch.device) -> None:
    local, shared = random_labels(4, 6, 2, seed=1), random_labels(4, 6, 3, seed=2)
    options = {"local_labels": local.to(device), "global_labels": shared.to(device)}
    z = normal(4, 6, 5).to(device).requires_grad_()
    c = dse_ext.dse_components(z, local_clusters=2, global_clusters=3, **options)
    (means,) = torch.autograd.grad(c.m_inter, z)
    c = dse_ext.dse_components(
        z, local_clusters=2, global_clusters=3, global_centroids=c.global_centroids, **options
    )
    (given,) = torch.autograd.grad(c.m_inter, z)
    torch.testing.assert_close(means, given)
