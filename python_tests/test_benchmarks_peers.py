"""The peers of the benchmarks compute what is benchmarked: the same loss from the same clusters."""

from __future__ import annotations

import features
import pytest
import torch
from peer import run_lightly

import dse_ext
from dse_ext.bench.batched_torch import (
    BatchedDSERegularizer,
    cluster_nuclear_norms,
    effective_rank,
    gram_singular_values,
    kmeans,
)

#: Full groups of eight images and a smaller last one; N < local_clusters; more rows than d.
SHAPES = [(19, 25, 32), (8, 20, 48), (3, 12, 16), (16, 2, 8), (1, 60, 24)]
CLOUDS = ["random", "clustered", "low_rank"]


def relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return (difference.norm() / reference.norm()).item()


def by_group(labels: torch.Tensor, size: int = 8) -> list[torch.Tensor]:
    """(B, N) labels as the full groups (G, 8 N) and the smaller last one (0 or 1, n)."""
    images, positions = labels.shape
    full = images // size * size
    rest = (images - full) * positions
    return [
        labels[:full].reshape(-1, size * positions),
        labels[full:].reshape(1 if rest else 0, rest),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_batched_pytorch_has_the_loss_and_gradient_of_ours(shape, cloud, normalize):
    z = features.CLOUDS[cloud](*shape).requires_grad_()
    batched = BatchedDSERegularizer(normalize=normalize)
    local_labels, global_labels, centroids = batched.clusters(z)
    loss = batched.loss(z, local_labels, global_labels, centroids)
    (gradient,) = torch.autograd.grad(loss, z)

    ours = dse_ext.dse_components(
        z,
        normalize=normalize,
        local_labels=local_labels,
        global_labels=torch.cat([g.reshape(-1, shape[1]) for g in global_labels]),
        global_centroids=padded(centroids, min(24, min(8, shape[0]) * shape[1])),
    )
    expected = -ours.score()
    (expected_gradient,) = torch.autograd.grad(expected, z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradient - expected_gradient, expected_gradient) < 1e-4


def padded(centroids: list[torch.Tensor], k: int) -> torch.Tensor:
    """One tensor (G, k, d), with inf where the smaller last group has fewer centroids."""
    parts = [
        torch.nn.functional.pad(c, (0, 0, 0, k - c.shape[1]), value=torch.inf)
        for c in centroids
        if len(c)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("cloud", "dtype"),
    [(cloud, torch.float64) for cloud in CLOUDS]
    # A float32 Gram matrix does not hold the small singular values of "low_rank".
    + [(cloud, torch.float32) for cloud in ("random", "clustered")],
)
def test_batched_pytorch_has_the_loss_and_gradient_of_lightly(cloud, dtype):
    pytest.importorskip("lightly")
    z = features.CLOUDS[cloud](16, 25, 32).to(dtype)
    peer = run_lightly(z)
    z.requires_grad_()
    loss = BatchedDSERegularizer().loss(
        z,
        peer.local_labels,
        by_group(peer.global_labels),
        [peer.global_centroids, peer.global_centroids[:0]],
    )
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(peer.loss.item(), rel=1e-4)
    assert relative(gradient - peer.gradient, peer.gradient) < 1e-3


@pytest.mark.parametrize(
    "rows",
    [torch.ones(4, 9, 5), torch.zeros(2, 3, 5), torch.ones(1, 1, 4), torch.eye(6).unsqueeze(0)],
)
def test_batched_pytorch_is_finite_on_degenerate_features(rows):
    assert BatchedDSERegularizer()(rows).isfinite()


def test_batched_kmeans_finds_separated_clusters():
    centers = 100 * torch.eye(4, 6)
    kinds = torch.stack([torch.arange(40) % 4, torch.arange(40) // 10])
    x = centers[kinds] + features.normal(2, 40, 6).float()
    centroids, labels = kmeans(x, 4, (20, 1e-4))
    for g in range(2):
        pairs = {(a, b) for a, b in zip(kinds[g].tolist(), labels[g].tolist(), strict=True)}
        assert len(pairs) == 4
        for kind, label in pairs:
            mean = x[g][kinds[g] == kind].mean(dim=0)
            torch.testing.assert_close(centroids[g, label], mean)


def test_batched_kmeans_labels_are_the_nearest_centroids():
    x = features.random(5, 30, 8).float()
    centroids, labels = kmeans(x, 7, (3, 1e-4))
    assert centroids.shape == (5, 7, 8)
    nearest = torch.cdist(x, centroids).min(dim=2).values
    own = torch.linalg.vector_norm(x - centroids.take_along_dim(labels[..., None], 1), dim=2)
    torch.testing.assert_close(own, nearest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("singular_values", [gram_singular_values, torch.linalg.svdvals])
def test_batched_effective_rank_is_ours(singular_values):
    x = features.clustered(1, 40, 12)[0]
    expected = dse_ext.effective_rank(x).item()
    assert effective_rank(x, singular_values).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("singular_values", [gram_singular_values, torch.linalg.svdvals])
def test_batched_nuclear_norms_are_ours(singular_values):
    x = features.clustered(3, 40, 12)
    labels = kmeans(x, 5, (10, 1e-4))[1]
    labels[1] = 2  # one large cluster, and four that are empty
    norms, counts = cluster_nuclear_norms(x, labels, 5, singular_values)
    torch.testing.assert_close(norms, dse_ext.cluster_nuclear_norms(x, labels, 5))
    assert counts[1].tolist() == [0, 0, 40, 0, 0]


def test_batched_groups_are_of_the_size_that_is_asked_for():
    z = features.clustered(7, 12, 8)
    _, global_labels, _ = BatchedDSERegularizer(global_clusters=6, group_images=3).clusters(z)
    assert [tuple(labels.shape) for labels in global_labels] == [(2, 36), (1, 12)]
