"""k-means: the quality of its clusters, its sampling, and what it promises about its outputs."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest
import scipy.stats
import torch
from features import generator, normal
from parity import DTYPES
from torch import Tensor

import dse_ext


def ids(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def blobs(n: int, d: int, kinds: int, seed: int = 0, spread: float = 0.5) -> Tensor:
    centers = 3 * normal(kinds, d, seed=seed)
    assigned = torch.randint(kinds, (n,), generator=generator(seed + 1))
    return centers[assigned] + spread * normal(n, d, seed=seed + 2)


def distances(x: Tensor, centroids: Tensor) -> Tensor:
    difference = x.cpu().double()[:, :, None] - centroids.cpu().double()[:, None]
    return torch.linalg.vector_norm(difference, dim=-1)


def inertia_of(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    own = distances(x, centroids).gather(2, labels.cpu()[..., None])[..., 0]
    return (own**2).sum(dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(3, 50, 6), (2, 17, 40), (1, 200, 3)])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_labels_name_the_nearest_centroid_and_inertia_adds_up(
    k: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.stack([blobs(*shape[1:], 5, seed=s) for s in range(shape[0])]).to(device, dtype)
    centroids, labels, inertia = dse_ext.kmeans(x, k, generator=generator(0))
    assert centroids.shape == (shape[0], k, shape[2])
    assert labels.shape == shape[:2]
    assert inertia.shape == shape[:1]
    assert labels.dtype == torch.int64
    to_each = distances(x, centroids)
    own = to_each.gather(2, labels.cpu()[..., None])[..., 0]
    slack = 1e-9 if dtype == torch.float64 else 1e-4
    assert bool((own <= to_each.min(dim=2).values * (1 + slack) + slack).all())
    expected = inertia_of(x, centroids, labels)
    torch.testing.assert_close(inertia.cpu().double(), expected, rtol=10 * slack, atol=10 * slack)


@pytest.mark.parametrize("outlier", [0.0, 1e3], ids=lambda o: f"outlier{o:g}")
@pytest.mark.parametrize("k", [12, 24, 90])
def test_rows_without_clusters_get_the_nearest_of_many_centroids(
    k: int, outlier: float, device: torch.device
) -> None:
    """Rows at about the same distance from all centroids, some of them twice. Beside an outlier
    they are far from the origin of the coordinates, so that a product does not tell them apart."""
    x = normal(2, 400, 30, seed=3).float()
    x[:, 300:] = x[:, :100]
    x[:, 0] += outlier
    x = x.to(device)
    centroids, labels, _ = dse_ext.kmeans(x, k, generator=generator(0))
    to_each = distances(x, centroids)
    own = to_each.gather(2, labels.cpu()[..., None])[..., 0]
    assert bool((own <= to_each.min(dim=2).values * (1 + 1e-4)).all())
    assert torch.equal(labels[:, 301:], labels[:, 1:100])


def test_after_convergence_centroids_are_the_means_of_their_rows(device: torch.device) -> None:
    x = torch.stack([blobs(60, 4, 3, seed=s) for s in range(4)]).to(device)
    centroids, labels, _ = dse_ext.kmeans(x, 3, max_iters=200, tol=1e-12, generator=generator(0))
    for rows, assigned, c in zip(x, labels, centroids, strict=True):
        for cluster in assigned.unique():
            torch.testing.assert_close(rows[assigned == cluster].mean(dim=0), c[cluster])


def test_more_iterations_never_raise_the_inertia(device: torch.device) -> None:
    x = torch.stack([blobs(120, 5, 9, seed=s, spread=1.5) for s in range(6)]).to(device)
    after = [
        dse_ext.kmeans(x, 8, max_iters=i, tol=1e-12, generator=generator(0))[2]
        for i in (1, 2, 4, 8, 16, 32)
    ]
    for fewer, more in itertools.pairwise(after):
        assert bool((more <= fewer * (1 + 1e-9)).all())
    assert bool((after[-1] < 0.99 * after[0]).any()), "the iterations did nothing"


def test_a_large_tolerance_stops_early(device: torch.device) -> None:
    x = torch.stack([blobs(120, 5, 9, seed=s, spread=1.5) for s in range(6)]).to(device)
    once = dse_ext.kmeans(x, 8, max_iters=1, tol=1e-12, generator=generator(0))
    stopped = dse_ext.kmeans(x, 8, max_iters=50, tol=1e9, generator=generator(0))
    converged = dse_ext.kmeans(x, 8, max_iters=50, tol=1e-12, generator=generator(0))
    assert torch.equal(once[0], stopped[0])
    assert not torch.equal(converged[0], stopped[0])


def test_inertia_is_as_low_as_scikit_learn_s_from_one_start(device: torch.device) -> None:
    from sklearn.cluster import KMeans, kmeans_plusplus

    ratios = []
    for data in range(3):
        x = blobs(300, 6, 8, seed=10 * data, spread=1.0)
        starts = x.expand(30, -1, -1).to(device)
        ours = dse_ext.kmeans(starts, 8, max_iters=100, tol=1e-6, generator=generator(data))[2]
        theirs = []
        for seed in range(30):
            init, _ = kmeans_plusplus(x.numpy(), 8, random_state=seed, n_local_trials=1)
            fitted = KMeans(8, init=init, n_init=1, max_iter=100).fit(x.numpy())
            theirs.append(fitted.inertia_)
        ratios.append(ours.mean().item() / np.mean(theirs))
    assert np.mean(ratios) < 1.05, ratios


def test_separated_blobs_are_found_exactly(device: torch.device) -> None:
    centers = 100 * torch.eye(4, dtype=torch.float64)
    kinds = torch.arange(4).repeat(15)
    x = (centers[kinds] + 0.1 * normal(60, 4))[None].to(device)
    for seed in range(10):
        labels = dse_ext.kmeans(x, 4, generator=generator(seed))[1][0].cpu()
        found = {tuple(labels[kinds == kind].unique().tolist()) for kind in range(4)}
        assert sorted(found) == [(0,), (1,), (2,), (3,)]


# --- Initialization ----------------------------------------------------------------------------


def lloyd_once(x: np.ndarray, first: int, second: int) -> tuple[int, ...]:
    """One iteration from two rows as centres, written plainly; the partition as sorted labels."""
    centers = x[[first, second]]
    labels = np.linalg.norm(x[:, None] - centers, axis=2).argmin(axis=1)
    centers = np.stack([x[labels == c].mean(axis=0) for c in (0, 1)])
    labels = np.linalg.norm(x[:, None] - centers, axis=2).argmin(axis=1)
    return tuple(labels if labels[0] == 0 else 1 - labels)


def partition_odds(x: np.ndarray, power: float) -> dict[tuple[int, ...], float]:
    """Odds of each partition if the second centre is drawn by distance ** power."""
    odds: dict[tuple[int, ...], float] = defaultdict(float)
    for first in range(len(x)):
        weight = np.linalg.norm(x - x[first], axis=1) ** power
        weight[first] = 0
        for second in np.flatnonzero(weight):
            share = weight[second] / weight.sum() / len(x)
            odds[lloyd_once(x, first, second)] += share
    return odds


def test_second_centre_is_sampled_by_squared_distance(device: torch.device) -> None:
    x = np.array([[0.0, 0.0], [1.1, 0.2], [0.3, 2.3], [4.1, 0.7], [2.0, 3.1]])
    draws = 20000
    batch = torch.from_numpy(x).expand(draws, -1, -1).to(device)
    labels = dse_ext.kmeans(batch, 2, max_iters=1, generator=generator(7))[1].cpu().numpy()
    labels = np.where(labels[:, :1] == 0, labels, 1 - labels)
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    for row in labels:
        counts[tuple(row)] += 1
    pvalues = {}
    for power in (0, 1, 2, 3):
        odds = partition_odds(x, power)
        assert set(counts) <= set(odds)
        observed = [counts[p] for p in odds]
        pvalues[power] = scipy.stats.chisquare(observed, [draws * o for o in odds.values()]).pvalue
    assert pvalues[2] > 1e-3, pvalues
    # The same counts must rule out the other powers, or this test could not fail.
    assert max(pvalues[0], pvalues[1], pvalues[3]) < 1e-6, pvalues


def test_first_centre_is_sampled_uniformly(device: torch.device) -> None:
    # Four rows at equal distances, k = 2, one iteration: the rows that are neither centre join
    # the first one on a tie, so the pair alone in its cluster is the second centre, and by
    # symmetry each row is it as often.
    x = torch.eye(4, dtype=torch.float64).expand(4000, -1, -1).to(device)
    labels = dse_ext.kmeans(x, 2, max_iters=1, generator=generator(3))[1].cpu()
    sizes = torch.stack([(labels == c).sum(dim=1) for c in (0, 1)], dim=1)
    assert bool((sizes.min(dim=1).values == 1).all())
    alone = (labels == sizes.argmin(dim=1, keepdim=True)).int().argmax(dim=1)
    counts = torch.bincount(alone, minlength=4).tolist()
    assert scipy.stats.chisquare(counts).pvalue > 1e-3, counts


def test_problems_of_a_batch_are_sampled_independently(device: torch.device) -> None:
    x = blobs(40, 3, 12, spread=1.0).expand(50, -1, -1).to(device)
    inertia = dse_ext.kmeans(x, 6, max_iters=1, generator=generator(0))[2]
    assert len(inertia.unique()) > 25


# --- Edges -------------------------------------------------------------------------------------


def test_one_cluster_is_the_mean(device: torch.device) -> None:
    x = normal(2, 30, 4).to(device)
    centroids, labels, inertia = dse_ext.kmeans(x, 1)
    torch.testing.assert_close(centroids[:, 0], x.mean(dim=1))
    assert int(labels.abs().sum()) == 0
    torch.testing.assert_close(inertia, ((x - x.mean(dim=1, keepdim=True)) ** 2).sum(dim=(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=ids)
def test_as_many_clusters_as_distinct_rows_gives_each_row_its_own(
    dtype: torch.dtype, device: torch.device
) -> None:
    x = normal(5, 9, 4).to(device, dtype)
    _, labels, inertia = dse_ext.kmeans(x, 9, generator=generator(0))
    assert all(sorted(row.tolist()) == list(range(9)) for row in labels.cpu())
    assert float(inertia.max()) < 1e-8


def test_k_is_capped_by_the_number_of_rows(device: torch.device) -> None:
    x = normal(2, 5, 3).to(device)
    centroids, labels, _ = dse_ext.kmeans(x, 24, generator=generator(0))
    assert centroids.shape == (2, 5, 3)
    assert int(labels.max()) <= 4


def test_duplicate_rows_share_a_cluster(device: torch.device) -> None:
    x = normal(1, 6, 4).repeat(1, 5, 1).to(device)
    labels = dse_ext.kmeans(x, 4, generator=generator(0))[1].reshape(5, 6)
    assert bool((labels == labels[:1]).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_fewer_distinct_rows_than_clusters(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([[0.0, 1.0], [5.0, 5.0]]).repeat(6, 1)[None].to(device, dtype)
    centroids, labels, inertia = dse_ext.kmeans(x, 5, generator=generator(0))
    assert bool(centroids.isfinite().all())
    assert float(inertia) == pytest.approx(0, abs=1e-6)
    assert len(labels.unique()) >= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_equal_rows(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.full((2, 8, 3), 0.7, dtype=dtype, device=device)
    centroids, labels, inertia = dse_ext.kmeans(x, 3, generator=generator(0))
    expected = x[:, :3].to(centroids.dtype)
    torch.testing.assert_close(centroids, expected, rtol=1e-6, atol=0)
    assert bool(((labels >= 0) & (labels < 3)).all())
    assert bool((inertia.abs() < 1e-8).all())


# From 1.8 % of the starts that k-means++ draws here, Lloyd's iteration empties a cluster.
EMPTYING = np.array([[-1.8, -1.5], [-0.3, 1.7], [-2.8, -2.4], [1.6, -2.2], [1.0, 0.3], [-0.3, 0.4]])


def lloyd(x: np.ndarray, start: tuple[int, ...]) -> tuple[frozenset[frozenset[int]], bool]:
    """The final partition from rows as centres, and whether a cluster was empty on the way."""
    centers, emptied = x[list(start)], False
    for _ in range(50):
        to_each = np.linalg.norm(x[:, None] - centers, axis=2)
        labels, own = to_each.argmin(axis=1), to_each.min(axis=1)
        for c in range(len(centers)):
            if (labels == c).any():
                centers[c] = x[labels == c].mean(axis=0)
            else:
                centers[c], emptied = x[own.argmax()], True
    return partition(np.linalg.norm(x[:, None] - centers, axis=2).argmin(axis=1)), emptied


def partition(labels: np.ndarray) -> frozenset[frozenset[int]]:
    return frozenset(frozenset(np.flatnonzero(labels == c).tolist()) for c in np.unique(labels))


def test_an_empty_cluster_takes_the_row_farthest_from_its_centroid(device: torch.device) -> None:
    runs = [lloyd(EMPTYING, start) for start in itertools.permutations(range(6), 3)]
    assert any(emptied for _, emptied in runs)
    x = torch.from_numpy(EMPTYING).expand(4000, -1, -1).to(device)
    labels = dse_ext.kmeans(x, 3, max_iters=50, tol=1e-9, generator=generator(0))[1].cpu().numpy()
    found = {partition(row) for row in labels}
    assert all(len(p) == 3 for p in found)
    assert found <= {p for p, _ in runs}


# --- Randomness --------------------------------------------------------------------------------


def test_the_same_generator_seed_gives_the_same_bits(device: torch.device) -> None:
    x = blobs(200, 8, 20, spread=2.0)[None].float().to(device)
    first = dse_ext.kmeans(x, 12, generator=generator(4))
    again = dse_ext.kmeans(x, 12, generator=generator(4))
    other = dse_ext.kmeans(x, 12, generator=generator(5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_a_generator_moves_on_from_call_to_call(device: torch.device) -> None:
    x = blobs(200, 8, 20, spread=2.0)[None].float().to(device)
    g = generator(4)
    first, second = dse_ext.kmeans(x, 12, generator=g), dse_ext.kmeans(x, 12, generator=g)
    assert not torch.equal(first[1], second[1])


def test_without_a_generator_torch_manual_seed_decides(device: torch.device) -> None:
    x = blobs(200, 8, 20, spread=2.0)[None].float().to(device)
    labels = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        labels.append(dse_ext.kmeans(x, 12)[1])
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_the_input_is_left_alone_and_needs_no_gradient(device: torch.device) -> None:
    x = blobs(50, 4, 3)[None].to(device).requires_grad_()
    before = x.detach().clone()
    centroids, _, inertia = dse_ext.kmeans(x, 3)
    assert torch.equal(x.detach(), before)
    assert not centroids.requires_grad
    assert not inertia.requires_grad
