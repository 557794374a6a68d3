"""Values and gradients of the components, against an SVD in float64 of the same rounded input."""

from __future__ import annotations

import itertools
from collections import Counter

import oracle
import pytest
import scipy.stats
import torch
from features import (
    CLOUDS,
    COLLAPSED,
    clustered,
    generator,
    normal,
    random,
    random_labels,
    resnet_features,
    vit_features,
)
from parity import (
    DTYPES,
    MIXED,
    SCORE,
    assert_components,
    assert_gradient,
    library,
    reference,
    tolerance,
)
from torch import Tensor

import dse_ext

# (B, N, d): clusters smaller than d; clusters larger than d; fewer rows in all than d.
SHAPES = [(9, 16, 24), (10, 49, 6), (2, 7, 40)]
# The evaluation variant permutes positions at random: its M_dim has tests of its own below.
UNPERMUTED = {"regularizer": (), "paper": (), "evaluation": ("m_dim",)}


def without(coefficients: tuple[float, ...], skip: tuple[str, ...]) -> tuple[float, ...]:
    return tuple(
        0.0 if name in skip else c for name, c in zip(oracle.COMPONENTS, coefficients, strict=True)
    )


def check_kmeans_path(
    z: Tensor,
    variant: str,
    normalize: bool,
    collapsed: bool = False,
    coefficients: tuple[tuple[float, ...], ...] = (SCORE, MIXED),
) -> None:
    """Let the library find the clusters, then hold the oracle to the same ones."""
    skip, limits = UNPERMUTED[variant], tolerance(z.dtype, collapsed)
    for coefficient in (without(c, skip) for c in coefficients):
        ours, c = library(
            z, coefficient, variant=variant, normalize=normalize, generator=generator(1)
        )
        expected = reference(
            z,
            coefficient,
            c.local_labels.cpu(),
            c.global_labels.cpu(),
            c.global_centroids.cpu(),
            variant=variant,
            normalize=normalize,
        )
        assert_components(ours, expected, limits.component, skip)
        free = ~oracle.tied_rows(
            z.cpu(), c.global_labels.cpu(), c.global_centroids.cpu(), 8, normalize
        )
        assert free.double().mean() > 0.9
        assert_gradient(ours.gradient.cpu()[free], expected.gradient[free], limits.gradient)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("cloud", list(CLOUDS))
def test_parity_with_the_library_s_own_clusters(
    cloud: str, dtype: torch.dtype, variant: str, normalize: bool, device: torch.device
) -> None:
    z = CLOUDS[cloud](*SHAPES[0]).to(device, dtype)
    check_kmeans_path(z, variant, normalize, cloud in COLLAPSED)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES[1:], ids=["rows>d", "all_rows<d"])
@pytest.mark.parametrize("cloud", ["random", "clustered", "nearly_collapsed"])
def test_parity_on_either_side_of_the_gram_matrix(
    cloud: str, shape: tuple[int, int, int], dtype: torch.dtype, variant: str, device: torch.device
) -> None:
    z = CLOUDS[cloud](*shape).to(device, dtype)
    check_kmeans_path(z, variant, True, cloud in COLLAPSED, (SCORE,))


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("model", [vit_features, resnet_features], ids=["vit", "resnet"])
def test_parity_on_a_backbone_s_features_of_photographs(
    model, dtype: torch.dtype, variant: str, device: torch.device
) -> None:
    check_kmeans_path(model().to(device, dtype), variant, True, False, (SCORE,))


@pytest.mark.parametrize("component", oracle.COMPONENTS)
@pytest.mark.parametrize("variant", ["regularizer", "paper"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_gradient_of_each_component_alone(
    dtype: torch.dtype, variant: str, component: str, device: torch.device
) -> None:
    one_hot = tuple(float(name == component) for name in oracle.COMPONENTS)
    for normalize in (True, False):
        z = clustered(*SHAPES[0]).to(device, dtype)
        check_kmeans_path(z, variant, normalize, coefficients=(one_hot,))


@pytest.mark.parametrize("with_centroids", [True, False], ids=["centroids", "means"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_with_given_labels(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    variant: str,
    with_centroids: bool,
    device: torch.device,
) -> None:
    """Arbitrary labels: empty clusters, clusters of one row, a smaller last group."""
    b, n, d = shape
    z = random(b, n, d).to(device, dtype)
    k = 9
    local, shared = random_labels(b, n, 4, seed=1), random_labels(b, n, k, seed=2)
    local[0], shared[0, :2] = 2, 3
    local[1, 0], local[1, 1:] = 0, 1
    groups = len(oracle.group_slices(b, 4))
    centroids = normal(groups, k, d, seed=3).to(torch.promote_types(dtype, torch.float32))
    given = centroids if with_centroids else None
    skip, limits = UNPERMUTED[variant], tolerance(dtype)
    for coefficient in (without(SCORE, skip), without(MIXED, skip)):
        ours, c = library(
            z,
            coefficient,
            variant=variant,
            local_clusters=4,
            global_clusters=k,
            group_images=4,
            local_labels=local.to(device),
            global_labels=shared.to(device),
            global_centroids=None if given is None else given.to(device),
        )
        expected = reference(z, coefficient, local, shared, given, variant=variant, group_images=4)
        assert_components(ours, expected, limits.component, skip)
        assert_gradient(ours.gradient, expected.gradient, limits.gradient)
        assert torch.equal(c.local_labels.cpu(), local)
        assert torch.equal(c.global_labels.cpu(), shared)


def test_only_local_labels_given_leaves_the_groups_to_the_k_means(device: torch.device) -> None:
    z = clustered(9, 16, 24).to(device)
    local = random_labels(9, 16, 3, seed=1)
    ours, c = library(z, SCORE, local_labels=local.to(device))
    expected = reference(z, SCORE, local, c.global_labels.cpu(), c.global_centroids.cpu())
    assert torch.equal(c.local_labels.cpu(), local)
    assert len(c.global_labels.unique()) > 1
    assert_components(ours, expected, 1e-9)
    assert_gradient(ours.gradient, expected.gradient, 1e-7)


def test_only_global_labels_given_leaves_the_images_to_the_k_means(device: torch.device) -> None:
    z = clustered(9, 16, 24).to(device)
    shared = random_labels(9, 16, 24, seed=1)
    ours, c = library(z, SCORE, global_labels=shared.to(device))
    expected = reference(z, SCORE, c.local_labels.cpu(), shared)
    assert torch.equal(c.global_labels.cpu(), shared)
    assert len(c.local_labels.unique()) > 1
    assert_components(ours, expected, 1e-9)
    assert_gradient(ours.gradient, expected.gradient, 1e-7)


@pytest.mark.parametrize("variant", ["regularizer", "paper"])
def test_only_centroids_given_labels_each_row_by_the_nearest(
    variant: str, device: torch.device
) -> None:
    z = clustered(9, 16, 24).to(device)
    centroids = oracle.normalized(normal(2, 7, 24, seed=1))
    to_each = torch.cdist(oracle.normalized(z.cpu()), centroids[torch.arange(9) // 8])
    local = random_labels(9, 16, 3, seed=1)
    ours, c = library(
        z,
        SCORE,
        variant=variant,
        local_labels=local.to(device),
        global_centroids=centroids.to(device),
    )
    assert torch.equal(c.global_labels.cpu(), to_each.argmin(dim=2))
    expected = reference(z, SCORE, local, to_each.argmin(dim=2), centroids, variant=variant)
    assert_components(ours, expected, 1e-9)
    assert_gradient(ours.gradient, expected.gradient, 1e-7)


@pytest.mark.parametrize("k", [2, 5, 40])
def test_the_number_of_given_centroids_takes_the_place_of_global_clusters(
    k: int, device: torch.device
) -> None:
    z = random(5, 7, 6).to(device)
    labels, centroids = random_labels(5, 7, k, seed=1), normal(3, k, 6, seed=2)
    options = {"group_images": 2, "global_labels": labels.to(device)}
    ours, c = library(z, SCORE, global_centroids=centroids.to(device), **options)
    expected = reference(z, SCORE, c.local_labels.cpu(), labels, centroids, group_images=2)
    assert c.global_centroids.shape == (3, k, 6)
    assert_components(ours, expected, 1e-9)
    assert_gradient(ours.gradient, expected.gradient, 1e-7)


@pytest.mark.parametrize("absent", [float("inf"), float("nan")])
def test_a_given_centroid_that_is_not_finite_is_nobody_s_neighbour(
    absent: float, device: torch.device
) -> None:
    z = random(4, 9, 6).to(device)
    labels, centroids = random_labels(4, 9, 3, seed=1), normal(1, 5, 6, seed=2)
    centroids[0, 3, 1] = absent
    centroids[0, 4] = absent
    ours, c = library(
        z, SCORE, global_labels=labels.to(device), global_centroids=centroids.to(device)
    )
    expected = reference(z, SCORE, c.local_labels.cpu(), labels, centroids[:, :3])
    assert_components(ours, expected, 1e-9)
    assert_gradient(ours.gradient, expected.gradient, 1e-7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_dtype(dtype: torch.dtype, device: torch.device) -> None:
    z = random(4, 9, 6).to(device)
    labels = random_labels(4, 9, 3, seed=1).to(device)
    scores = [
        dse_ext.dse_components(z, local_labels=given, global_labels=given).score()
        for given in (labels, labels.to(dtype))
    ]
    assert torch.equal(*scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
def test_shapes_and_dtypes_of_the_result(dtype: torch.dtype, device: torch.device) -> None:
    z = random(10, 9, 5).to(device, dtype).requires_grad_()
    c = dse_ext.dse_components(z, global_clusters=7, group_images=4)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for name in oracle.COMPONENTS:
        component = getattr(c, name)
        assert component.shape == ()
        assert component.dtype == expected
        assert component.requires_grad
        assert component.device == z.device
    assert c.local_labels.shape == c.global_labels.shape == (10, 9)
    assert c.local_labels.dtype == c.global_labels.dtype == torch.int64
    assert c.global_centroids.shape == (3, 7, 5)
    assert not c.global_centroids.requires_grad
    assert int(c.local_labels.min()) >= 0
    assert int(c.local_labels.max()) <= 2
    assert int(c.global_labels.max()) <= 6
    assert c.score().shape == ()


def test_score_is_the_weighted_sum(device: torch.device) -> None:
    c = dse_ext.dse_components(random(4, 9, 5).to(device))
    intra = (c.m_intra_image + c.m_intra_batch) / 2
    torch.testing.assert_close(c.score(), c.m_inter + c.m_dim - intra)
    torch.testing.assert_close(c.score(dim_weight=0.3), c.m_inter + 0.3 * c.m_dim - intra)


def test_variants_differ(device: torch.device) -> None:
    z = clustered(9, 16, 24).to(device)
    scores = {
        v: dse_ext.dse_components(z, variant=v, generator=generator(1)).score().item()
        for v in oracle.VARIANTS
    }
    assert len({round(s, 6) for s in scores.values()}) == 3, scores


@pytest.mark.parametrize("clusters", [(3, 24), (2, 7), (5, 3), (4, 30)])
def test_default_group_holds_global_over_local_clusters_images(
    clusters: tuple[int, int], device: torch.device
) -> None:
    local, shared = clusters
    images = max(shared // local, 1)
    z = random(9, 12, 4).to(device)
    c = dse_ext.dse_components(z, local_clusters=local, global_clusters=shared)
    assert c.global_centroids.shape[0] == -(-9 // images)
    explicit = dse_ext.dse_components(
        z,
        local_clusters=local,
        global_clusters=shared,
        group_images=images,
        local_labels=c.local_labels,
        global_labels=c.global_labels,
        global_centroids=c.global_centroids,
    )
    torch.testing.assert_close(c.score(), explicit.score())


# --- M_dim of the evaluation variant -----------------------------------------------------------


def every_pairing(b: int, n: int) -> list[Tensor]:
    """All ways to pair positions across images: the first image's order does not matter."""
    orders = [torch.tensor(p) for p in itertools.permutations(range(n))]
    return [torch.stack(choice) for choice in itertools.product(orders[:1], *[orders] * (b - 1))]


def test_evaluation_m_dim_is_that_of_a_uniformly_random_pairing_of_positions(
    device: torch.device,
) -> None:
    z = random(3, 3, 7)
    pairings = every_pairing(3, 3)
    possible = torch.stack(
        [oracle.dimensionality(oracle.normalized(z), "evaluation", p) for p in pairings]
    )
    assert possible.sort().values.diff().min() > 1e-7, "the pairings cannot be told apart"
    counts: Counter[int] = Counter()
    draws = 1440
    on_device = z.to(device)
    labels = torch.zeros(3, 3, dtype=torch.int64, device=device)
    for seed in range(draws):
        c = dse_ext.dse_components(
            on_device,
            variant="evaluation",
            generator=generator(seed),
            local_labels=labels,
            global_labels=labels,
        )
        error, index = (possible - c.m_dim.cpu()).abs().min(dim=0)
        assert error < 1e-9, f"seed {seed}: {c.m_dim} belongs to no permutation"
        counts[int(index)] += 1
    observed = [counts[i] for i in range(len(pairings))]
    assert scipy.stats.chisquare(observed).pvalue > 1e-3, observed


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(4, 3, 9), (5, 2, 3), (4, 3, 4)])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_evaluation_m_dim_and_its_gradient(
    shape: tuple[int, int, int], dtype: torch.dtype, normalize: bool, device: torch.device
) -> None:
    z = normal(*shape).to(dtype)
    coefficients = (0.0, 0.0, 0.0, 1.0, 0.0)
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    ours, _ = library(
        z.to(device),
        coefficients,
        variant="evaluation",
        normalize=normalize,
        local_labels=labels.to(device),
        global_labels=labels.to(device),
        generator=generator(3),
    )
    x = oracle.normalized(z.double()) if normalize else z.double()
    candidates = every_pairing(*shape[:2])
    values = torch.stack([oracle.dimensionality(x, "evaluation", p) for p in candidates])
    match = candidates[int((values - ours.components[3].cpu()).abs().argmin())]
    expected = reference(
        z,
        coefficients,
        labels,
        labels,
        variant="evaluation",
        normalize=normalize,
        permutation=match,
    )
    assert_components(ours, expected, tolerance(dtype).component)
    assert_gradient(ours.gradient, expected.gradient, tolerance(dtype).gradient)


def test_evaluation_with_one_position_needs_no_permutation(device: torch.device) -> None:
    z = random(11, 1, 6)
    coefficients = (0.0, 0.0, 0.0, 1.0, 0.0)
    labels = torch.zeros(11, 1, dtype=torch.int64)
    ours, _ = library(z.to(device), coefficients, variant="evaluation")
    expected = reference(z, coefficients, labels, labels, variant="evaluation")
    assert_components(ours, expected, 1e-9, ("m_inter", "m_intra_image", "m_intra_batch"))
    assert_gradient(ours.gradient, expected.gradient, 1e-7)


def test_evaluation_m_dim_averages_over_seeds_to_the_oracle_s_average(device: torch.device) -> None:
    z = clustered(6, 16, 8)
    x = oracle.normalized(z)
    labels = torch.zeros(6, 16, dtype=torch.int64, device=device)
    options = {"variant": "evaluation", "local_labels": labels, "global_labels": labels}
    ours = torch.stack(
        [
            dse_ext.dse_components(z.to(device), generator=generator(s), **options).m_dim.cpu()
            for s in range(60)
        ]
    )
    g = generator(0)
    shuffles = [torch.stack([torch.randperm(16, generator=g) for _ in z]) for _ in range(60)]
    expected = torch.stack([oracle.dimensionality(x, "evaluation", p) for p in shuffles])
    assert len(ours.unique()) == 60, "a seed should give a permutation of its own"
    standard_error = ((ours.var() + expected.var()) / 60).sqrt()
    assert (ours.mean() - expected.mean()).abs() < 4 * standard_error
