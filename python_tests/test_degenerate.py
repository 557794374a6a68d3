"""Bad input is refused by name; degenerate input is finite; non-finite input is loud."""

from __future__ import annotations

import oracle
import pytest
import torch
from features import clustered, generator, normal, random_labels
from parity import DTYPES, SCORE, assert_components, assert_gradient, library, reference
from torch import Tensor

import dse_ext

REFUSED = (ValueError, RuntimeError)


def ids(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def labels(*shape: int, k: int = 3) -> Tensor:
    return torch.randint(k, shape, generator=generator(0))


# --- Bad input: (overrides of a good call, what the message must name, what was given) ----------

BAD_COMPONENTS = {
    "z of rank 2": ({"z": normal(4, 6)}, "z", r"4, 6"),
    "z of rank 4": ({"z": normal(4, 6, 5, 5)}, "z", r"4, 6, 5, 5"),
    "no images": ({"z": normal(0, 6, 5)}, "z", r"0, 6, 5"),
    "no positions": ({"z": normal(4, 0, 5)}, "z", r"4, 0, 5"),
    "no features": ({"z": normal(4, 6, 0)}, "z", r"4, 6, 0"),
    "z of integers": ({"z": torch.ones(4, 6, 5, dtype=torch.int64)}, "z", r"(?i)int64|long"),
    "z of bool": ({"z": torch.ones(4, 6, 5, dtype=torch.bool)}, "z", r"(?i)bool"),
    "z complex": ({"z": torch.ones(4, 6, 5, dtype=torch.complex64)}, "z", r"(?i)complex"),
    "unknown variant": (
        {"variant": "authors"},
        "variant",
        r"authors.*regularizer|regularizer.*authors",
    ),
    "no local clusters": ({"local_clusters": 0}, "local_clusters", r"0"),
    "negative local clusters": ({"local_clusters": -2}, "local_clusters", r"-2"),
    "no global clusters": ({"global_clusters": 0}, "global_clusters", r"0"),
    "empty groups": ({"group_images": 0}, "group_images", r"0"),
    "negative groups": ({"group_images": -1}, "group_images", r"-1"),
    "no iterations": ({"max_kmeans_iters": 0}, "max_kmeans_iters", r"0"),
    "zero tolerance": ({"tol": 0.0}, "tol", r"0"),
    "negative tolerance": ({"tol": -1.0}, "tol", r"-1"),
    "tolerance not a number": ({"tol": float("nan")}, "tol", r"(?i)nan"),
    "local labels of another shape": ({"local_labels": labels(4, 5)}, "local_labels", r"4, 5"),
    "local labels of rank 1": ({"local_labels": labels(24)}, "local_labels", r"24"),
    "local labels too large": ({"local_labels": torch.full((4, 6), 3)}, "local_labels", r"3"),
    "local labels negative": ({"local_labels": torch.full((4, 6), -1)}, "local_labels", r"-1"),
    "local labels not integers": (
        {"local_labels": normal(4, 6)},
        "local_labels",
        r"(?i)float64|double|int64|long",
    ),
    "global labels of another shape": ({"global_labels": labels(3, 6)}, "global_labels", r"3, 6"),
    "global labels too large": ({"global_labels": torch.full((4, 6), 24)}, "global_labels", r"24"),
    "global labels negative": ({"global_labels": torch.full((4, 6), -7)}, "global_labels", r"-7"),
    "global labels not integers": (
        {"global_labels": normal(4, 6)},
        "global_labels",
        r"(?i)float64|double|int64|long",
    ),
    "centroids of rank 2": (
        {"global_labels": labels(4, 6), "global_centroids": normal(24, 5)},
        "global_centroids",
        r"24, 5",
    ),
    "centroids of too many groups": (
        {"global_labels": labels(4, 6), "global_centroids": normal(2, 24, 5)},
        "global_centroids",
        r"2, 24, 5",
    ),
    "centroids of other features": (
        {"global_labels": labels(4, 6), "global_centroids": normal(1, 24, 4)},
        "global_centroids",
        r"1, 24, 4",
    ),
    "fewer centroids than labels": (
        {"global_labels": torch.full((4, 6), 5), "global_centroids": normal(1, 5, 5)},
        "global_",
        r"5",
    ),
    "centroids of integers": (
        {
            "global_labels": labels(4, 6),
            "global_centroids": torch.ones(1, 24, 5, dtype=torch.int64),
        },
        "global_centroids",
        r"(?i)int64|long|float",
    ),
}


@pytest.mark.parametrize("case", list(BAD_COMPONENTS))
def test_dse_components_refuses(case: str, device: torch.device) -> None:
    overrides, name, given = BAD_COMPONENTS[case]
    options: dict[str, object] = {"z": normal(4, 6, 5), **overrides}
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with pytest.raises(REFUSED, match=rf"(?s)\b{name}") as caught:
        dse_ext.dse_components(**options)
    caught.match(rf"(?s){given}")


BAD_KMEANS = {
    "x of rank 2": ({"x": normal(6, 5)}, "x", r"6, 5"),
    "no rows": ({"x": normal(2, 0, 5)}, "x", r"2, 0, 5"),
    "no groups": ({"x": normal(0, 6, 5)}, "x", r"0, 6, 5"),
    "no features": ({"x": normal(2, 6, 0)}, "x", r"2, 6, 0"),
    "integers": ({"x": torch.ones(2, 6, 5, dtype=torch.int32)}, "x", r"(?i)int"),
    "no clusters": ({"k": 0}, "k", r"0"),
    "negative clusters": ({"k": -3}, "k", r"-3"),
    "no iterations": ({"max_iters": 0}, "max_iters", r"0"),
    "zero tolerance": ({"tol": 0.0}, "tol", r"0"),
}


@pytest.mark.parametrize("case", list(BAD_KMEANS))
def test_kmeans_refuses(case: str, device: torch.device) -> None:
    overrides, name, given = BAD_KMEANS[case]
    options: dict[str, object] = {"x": normal(2, 6, 5), "k": 3, **overrides}
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with pytest.raises(REFUSED, match=rf"(?s)\b{name}\b") as caught:
        dse_ext.kmeans(**options)
    caught.match(rf"(?s){given}")


BAD_NORMS = {
    "x of rank 2": ({"x": normal(6, 5)}, "x", r"6, 5"),
    "no rows": ({"x": normal(2, 0, 5), "labels": labels(2, 0)}, "x", r"2, 0, 5"),
    "integers": ({"x": torch.ones(2, 6, 5, dtype=torch.int64)}, "x", r"(?i)int|long"),
    "labels of another shape": ({"labels": labels(2, 5)}, "labels", r"2, 5"),
    "labels too large": ({"labels": torch.full((2, 6), 3)}, "labels", r"3"),
    "labels negative": ({"labels": torch.full((2, 6), -1)}, "labels", r"-1"),
    "labels not integers": ({"labels": normal(2, 6)}, "labels", r"(?i)float|double|int64|long"),
    "no clusters": ({"k": 0}, "k", r"0"),
}


@pytest.mark.parametrize("case", list(BAD_NORMS))
def test_cluster_nuclear_norms_refuses(case: str, device: torch.device) -> None:
    overrides, name, given = BAD_NORMS[case]
    options: dict[str, object] = {"x": normal(2, 6, 5), "labels": labels(2, 6), "k": 3, **overrides}
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with pytest.raises(REFUSED, match=rf"(?s)\b{name}\b") as caught:
        dse_ext.cluster_nuclear_norms(**options)
    caught.match(rf"(?s){given}")


@pytest.mark.parametrize(
    ("x", "given"),
    [
        (normal(5), r"5"),
        (normal(0, 5), r"0, 5"),
        (normal(5, 0), r"5, 0"),
        (normal(0, 4, 5), r"0, 4, 5"),
        (torch.ones(4, 5, dtype=torch.int64), r"(?i)int64|long"),
    ],
    ids=["rank 1", "no rows", "no features", "no matrices", "integers"],
)
def test_effective_rank_refuses(x: Tensor, given: str, device: torch.device) -> None:
    with pytest.raises(REFUSED, match=r"(?s)\bx\b") as caught:
        dse_ext.effective_rank(x.to(device))
    caught.match(rf"(?s){given}")


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, dtype=torch.int64), torch.zeros(1)], ids=["two", "float"]
)
def test_the_op_refuses_a_bad_seed(wrong: Tensor, device: torch.device) -> None:
    with pytest.raises(REFUSED, match="seed"):
        torch.ops.dse_ext.dse_components(normal(4, 6, 5).to(device), wrong.to(device))
    with pytest.raises(REFUSED, match="seed"):
        torch.ops.dse_ext.kmeans(normal(4, 6, 5).to(device), 3, wrong.to(device))


def test_a_tensor_is_asked_for_by_name() -> None:
    with pytest.raises((TypeError, *REFUSED)):
        dse_ext.dse_components([[1.0, 2.0]])


# --- Non-finite features -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_one_non_finite_feature_makes_everything_nan(
    dtype: torch.dtype, variant: str, normalize: bool, value: float, device: torch.device
) -> None:
    z = clustered(9, 16, 6)
    z[8, 3, 2] = value
    z = z.to(device, dtype).requires_grad_()
    c = dse_ext.dse_components(z, variant=variant, normalize=normalize)
    assert bool(torch.stack(c[:5]).isnan().all()), torch.stack(c[:5])
    assert 0 <= int(c.local_labels.min()) <= int(c.local_labels.max()) < 3
    assert 0 <= int(c.global_labels.min()) <= int(c.global_labels.max()) < 24
    (gradient,) = torch.autograd.grad(c.score(), z)
    assert bool(gradient.isnan().all())


def test_non_finite_with_given_clusters_is_nan(device: torch.device) -> None:
    z = clustered(4, 9, 5)
    z[0, 0, 0] = float("nan")
    z = z.to(device).requires_grad_()
    given = random_labels(4, 9, 3).to(device)
    c = dse_ext.dse_components(z, local_labels=given, global_labels=given)
    assert bool(torch.stack(c[:5]).isnan().all())
    (gradient,) = torch.autograd.grad(c.m_dim, z)
    assert bool(gradient.isnan().all())


@pytest.mark.parametrize("where", ["all", "one_image"])
def test_entirely_non_finite_images_do_not_hang(where: str, device: torch.device) -> None:
    z = clustered(9, 16, 6).float()
    z[slice(None) if where == "all" else slice(2, 3)] = float("nan")
    z = z.to(device).requires_grad_()
    c = dse_ext.dse_components(z)
    c.score().backward()
    assert bool(c.score().isnan())
    assert bool(z.grad.isnan().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_in_the_other_ops(value: float, device: torch.device) -> None:
    x = normal(3, 9, 4)
    x[1, 2, 0] = value
    x = x.to(device).requires_grad_()
    given = labels(3, 9).to(device)
    rank = dse_ext.effective_rank(x)
    assert bool(rank[1].isnan())
    assert bool(rank[[0, 2]].isfinite().all())
    norms = dse_ext.cluster_nuclear_norms(x, given, 3)
    assert bool(norms[1, given[1, 2]].isnan())
    assert bool(norms[[0, 2]].isfinite().all())
    (gradient,) = torch.autograd.grad(rank.sum() + norms.sum(), x)
    assert bool(gradient[1].isnan().any())
    centroids, found, inertia = dse_ext.kmeans(x.detach(), 3)
    assert bool(inertia[1].isnan())
    assert bool(inertia[[0, 2]].isfinite().all())
    assert bool(((found >= 0) & (found < 3)).all())
    assert bool(centroids[[0, 2]].isfinite().all())


def test_a_grad_scaler_skips_the_step(device: torch.device) -> None:
    layer = torch.nn.Linear(6, 6).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    regularizer = dse_ext.DSERegularizer()
    before = layer.weight.detach().clone()
    for poison in (float("inf"), 0.0):
        z = clustered(4, 9, 6).float().to(device)
        z[0, 0, 0] += poison
        optimizer.zero_grad()
        scaler.scale(regularizer(layer(z))).backward()
        scaler.step(optimizer)
        scaler.update()
        if poison:
            assert torch.equal(layer.weight, before)
            assert scaler.get_scale() == 4.0
    assert not torch.equal(layer.weight, before)
    assert bool(layer.weight.isfinite().all())


# --- Degenerate but legal ----------------------------------------------------------------------


def outlier(b: int, n: int, d: int) -> Tensor:
    z = torch.zeros(b, n, d, dtype=torch.float64)
    z[..., 0] = 1
    z[-1, -1] = 1000
    return z


def some_zero_rows(b: int, n: int, d: int) -> Tensor:
    z = normal(b, n, d)
    z[0], z[1, ::2] = 0, 0
    return z


def two_rows(b: int, n: int, d: int) -> Tensor:
    z = torch.ones(b, n, d, dtype=torch.float64)
    z[:, ::2, 0] = -2
    return z


DEGENERATE = {
    "all rows equal": torch.full((9, 6, 5), 0.3, dtype=torch.float64),
    "all equal, uneven row": normal(5).expand(9, 6, 5),
    "all rows parallel": normal(9, 6, 1).abs() * normal(5),
    "all zero": torch.zeros(9, 6, 5, dtype=torch.float64),
    "some rows zero": some_zero_rows(9, 6, 5),
    "two distinct rows": two_rows(9, 6, 5),
    "one outlier": outlier(9, 6, 5),
    "one constant feature": normal(9, 6, 5) * torch.tensor([1.0, 1, 1, 1, 0]),
    "fewer positions than clusters": normal(9, 2, 5),
    "one position": normal(9, 1, 5),
    "one image": normal(1, 6, 5),
    "one row": normal(1, 1, 5),
    "two rows": normal(1, 2, 5),
    "one feature": normal(9, 6, 1),
    "one number": normal(1, 1, 1),
    "a last group of one image": normal(9, 30, 5),
    "positions equal within an image": normal(9, 1, 5).expand(9, 6, 5),
    "images equal": normal(1, 6, 5).expand(9, 6, 5),
}


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", list(DEGENERATE))
def test_degenerate_input_is_finite(
    case: str, dtype: torch.dtype, variant: str, normalize: bool, device: torch.device
) -> None:
    z = DEGENERATE[case].to(device, dtype).clone().requires_grad_()
    c = dse_ext.dse_components(z, variant=variant, normalize=normalize, generator=generator(0))
    values = torch.stack(c[:5])
    assert bool(values.isfinite().all()), values
    assert bool((values >= 0).all()), values
    if variant != "paper":
        assert c.m_dim.item() <= 1 + 1e-6
    for component in c[:5]:
        (gradient,) = torch.autograd.grad(component, z, retain_graph=True)
        assert bool(gradient.isfinite().all())
    (gradient,) = torch.autograd.grad(c.score(), z)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", ["all rows equal", "all equal, uneven row", "all zero"])
def test_equal_rows_have_no_distances(
    case: str, dtype: torch.dtype, variant: str, device: torch.device
) -> None:
    c = dse_ext.dse_components(DEGENERATE[case].to(device, dtype).contiguous(), variant=variant)
    assert c.avg_norm.item() == pytest.approx(0, abs=1e-12)
    for name in ("m_inter", "m_intra_image", "m_intra_batch"):
        assert float(getattr(c, name)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_components_without_terms_are_zero(variant: str, device: torch.device) -> None:
    one_position = dse_ext.dse_components(normal(9, 1, 5).to(device), variant=variant)
    assert float(one_position.m_intra_image) == 0
    assert float(one_position.m_inter) > 0
    one_row = dse_ext.dse_components(normal(1, 1, 5).to(device), variant=variant)
    assert float(one_row.m_inter) == 0
    assert float(one_row.m_intra_batch) == 0
    one_cluster = dse_ext.dse_components(
        normal(4, 9, 5).to(device), variant=variant, local_clusters=1, global_clusters=1
    )
    assert float(one_cluster.m_inter) == 0
    assert float(one_cluster.m_intra_batch) > 0


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize(
    "case",
    [
        "some rows zero",
        "fewer positions than clusters",
        "one position",
        "one image",
        "one feature",
        "a last group of one image",
        "positions equal within an image",
    ],
)
def test_degenerate_shapes_have_the_oracle_s_values(
    case: str, variant: str, device: torch.device
) -> None:
    z = DEGENERATE[case].clone()
    coefficients = (1.0, -0.5, -0.5, 0.0, 0.0)  # M_dim of `evaluation` permutes at random
    ours, c = library(z.to(device), coefficients, variant=variant, generator=generator(1))
    expected = reference(
        z,
        coefficients,
        c.local_labels.cpu(),
        c.global_labels.cpu(),
        c.global_centroids.cpu(),
        variant=variant,
    )
    assert_components(ours, expected, 1e-9, ("m_dim",) if variant == "evaluation" else ())
    tied = oracle.tied_rows(z, c.global_labels.cpu(), c.global_centroids.cpu(), 8, True)
    if case not in ("some rows zero", "positions equal within an image", "one feature"):
        assert not bool(tied.any())
        assert_gradient(ours.gradient, expected.gradient, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("exponent", [-120, -60, -30, 30, 60, 120])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_scale_by_a_power_of_two_changes_no_ratio(
    normalize: bool, exponent: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Every component but avg_norm of the regularizer variant is free of units."""
    if normalize and exponent < -30:
        pytest.skip("rows shorter than 1e-12 are not normalized, as in F.normalize")
    z = clustered(4, 9, 6).to(device, dtype)
    scaled = (z.double() * 2.0**exponent).to(dtype)
    given = random_labels(4, 9, 3).to(device)
    options = {
        "normalize": normalize,
        "local_labels": given,
        "global_labels": given,
        "global_clusters": 3,
    }
    plain, plain_c = library(z, SCORE, **options)
    ours, ours_c = library(scaled, SCORE, **options)
    for a, b in zip(plain.components[:4], ours.components[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    unit = 1.0 if normalize else 2.0**exponent
    assert ours_c.avg_norm.item() == pytest.approx(plain_c.avg_norm.item() * unit, rel=1e-5)
    expected = plain.gradient.double() / 2.0**exponent
    if dtype == torch.float64 or (dtype == torch.float32 and abs(exponent) < 120):
        assert_gradient(ours.gradient, expected, 1e-5)
    elif dtype == torch.float32:
        # 2 ** 120 is at the end of float32's range: finite and right, or not finite at all.
        error = (ours.gradient.cpu().double() - expected.cpu()).norm() / expected.norm().cpu()
        assert not bool(error > 1e-5)


def test_rows_too_short_to_normalize_behave_like_f_normalize(device: torch.device) -> None:
    z = clustered(4, 9, 6)
    z[0] *= 1e-14
    given = random_labels(4, 9, 3)
    normalized = torch.nn.functional.normalize(z, dim=-1)
    ours, _ = library(
        z.to(device), SCORE, local_labels=given.to(device), global_labels=given.to(device)
    )
    expected, _ = library(
        normalized.to(device),
        SCORE,
        normalize=False,
        local_labels=given.to(device),
        global_labels=given.to(device),
    )
    assert_components(ours, expected, 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_largest_finite_features_are_not_mistaken_for_infinite(
    dtype: torch.dtype, device: torch.device
) -> None:
    largest = torch.finfo(dtype).max if dtype != torch.float64 else 1e150
    z = (normal(4, 9, 6).clamp(-3, 3) / 3.1 * largest).to(device, dtype).requires_grad_()
    c = dse_ext.dse_components(z)
    assert bool(torch.stack(c[:5]).isfinite().all())
    (gradient,) = torch.autograd.grad(c.score(), z)
    assert bool(gradient.isfinite().all())


# --- Clusters handed back in -------------------------------------------------------------------


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("shape", [(9, 16, 6), (9, 2, 6), (1, 4, 3), (17, 1, 5)])
def test_the_clusters_of_a_call_given_to_the_next_call_reproduce_it(
    shape: tuple[int, int, int], variant: str, device: torch.device
) -> None:
    """Also where the last group has fewer rows than there are clusters."""
    z = clustered(*shape).to(device).requires_grad_()
    first = dse_ext.dse_components(z, variant=variant, generator=generator(2))
    second = dse_ext.dse_components(
        z,
        variant=variant,
        generator=generator(2),
        local_labels=first.local_labels,
        global_labels=first.global_labels,
        global_centroids=first.global_centroids,
    )
    torch.testing.assert_close(torch.stack(second[:5]), torch.stack(first[:5]))
    (a,) = torch.autograd.grad(first.score(), z)
    (b,) = torch.autograd.grad(second.score(), z)
    torch.testing.assert_close(a, b)
