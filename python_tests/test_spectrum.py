"""RankMe, α-ReQ and LiDAR against plain NumPy transcriptions of their definitions."""

from __future__ import annotations

import features
import numpy as np
import pytest
import torch

from dse_ext import alpha_req, effective_rank, lidar, rankme
from dse_ext.spectrum import _singular_values

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def numpy_rankme(z: np.ndarray, eps: float = 1e-7) -> float:
    sigma = np.linalg.svd(z, compute_uv=False)
    p = sigma / np.abs(sigma).sum() + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def numpy_alpha_req(z: np.ndarray, first: int = 1, last: int | None = None) -> float:
    eigenvalues = np.linalg.eigvalsh(np.cov(z, rowvar=False))[::-1]
    last = np.linalg.matrix_rank(z - z[0]) if last is None else last
    k = np.arange(first, last + 1)
    slope, _ = np.polyfit(np.log(k), np.log(eigenvalues[first - 1 : last]), deg=1)
    return float(-slope)


def numpy_lidar(views: np.ndarray, delta: float = 1e-4, eps: float = 1e-7) -> float:
    d = views.shape[2]
    means = [sample.mean(axis=0) for sample in views]
    mean = np.mean(means, axis=0)
    sigma_b = np.mean([np.outer(m - mean, m - mean) for m in means], axis=0)
    spread = [np.outer(v - m, v - m) for s, m in zip(views, means, strict=True) for v in s]
    sigma_w = np.mean(spread, axis=0) + delta * np.eye(d)
    values, vectors = np.linalg.eigh(sigma_w)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ sigma_b @ root).clip(min=0)
    p = eigenvalues / eigenvalues.sum() + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def views_of(n: int, q: int, d: int, seed: int = 0) -> torch.Tensor:
    samples = features.normal(n, 1, d, seed=seed)
    return samples + 0.5 * features.normal(n, q, d, seed=seed + 1)


@pytest.mark.parametrize("cloud", ["random", "clustered", "low_rank", "nearly_collapsed"])
@pytest.mark.parametrize("shape", [(4, 20, 12), (3, 4, 30)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rankme_and_alpha_req_match_their_definitions(cloud, shape, dtype):
    z = features.CLOUDS[cloud](*shape).to(dtype)
    rows = z.double().reshape(-1, shape[-1]).numpy()
    exact = dtype == torch.float64
    assert rankme(z).item() == pytest.approx(numpy_rankme(rows), rel=1e-9 if exact else 1e-5)
    assert alpha_req(z).item() == pytest.approx(numpy_alpha_req(rows), rel=1e-7 if exact else 1e-5)


@pytest.mark.parametrize("shape", [(12, 5, 7), (4, 6, 10), (30, 2, 6)])
@pytest.mark.parametrize("delta", [1e-4, 1e-1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_lidar_matches_its_definition(shape, delta, dtype):
    views = views_of(*shape).to(dtype)
    expected = numpy_lidar(views.double().numpy(), delta)
    rel = 1e-8 if dtype == torch.float64 else 1e-5
    assert lidar(views, delta=delta).item() == pytest.approx(expected, rel=rel)


def test_dense_features_are_flattened_and_pooled_features_taken_as_they_are():
    z = features.clustered(5, 9, 8)
    assert rankme(z) == rankme(z.flatten(0, 1))
    assert alpha_req(z) == alpha_req(z.flatten(0, 1))
    assert rankme(z.mean(dim=1)).item() == pytest.approx(numpy_rankme(z.mean(dim=1).numpy()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_result_dtype_device_and_history(dtype):
    z = features.clustered(3, 8, 6).to(dtype).requires_grad_()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for value in (rankme(z), alpha_req(z), lidar(z)):
        assert value.dtype == real
        assert value.shape == ()
        assert value.device == z.device
        assert not value.requires_grad


def test_strides_do_not_matter():
    maps = features.normal(2, 6, 3, 4)  # (B, C, H, W)
    z = maps.flatten(2).transpose(1, 2)
    assert not z.is_contiguous()
    assert rankme(z) == rankme(z.contiguous())
    assert alpha_req(z) == alpha_req(z.contiguous())
    assert lidar(z) == lidar(z.contiguous())


def test_rankme_without_eps_is_the_effective_rank():
    z = features.low_rank(4, 10, 16)
    rank = effective_rank(z.flatten(0, 1)).item()
    assert rankme(z, eps=0).item() == pytest.approx(rank, rel=1e-9)


def test_rankme_of_known_spectra():
    assert rankme(torch.eye(6, dtype=torch.float64), eps=0).item() == pytest.approx(6, rel=1e-12)
    one = features.normal(20, 1) @ features.normal(1, 5, seed=1)
    assert rankme(one, eps=0).item() == pytest.approx(1, abs=1e-9)
    assert rankme(torch.zeros(4, 3)).item() == 0


def test_rankme_sees_the_scale_of_nothing():
    z = features.clustered(3, 9, 8)
    assert rankme(1e3 * z).item() == pytest.approx(rankme(z).item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_req_recovers_the_exponent(alpha):
    k = torch.arange(1, 21, dtype=torch.float64)
    axes = torch.diag(k ** (-alpha / 2)) @ features.orthogonal(20)
    z = torch.cat([axes, -axes]) + 3  # covariance k^-α up to a factor, mean 3
    assert alpha_req(z).item() == pytest.approx(alpha, abs=1e-9)
    assert alpha_req(z, fit_range=(5, 12)).item() == pytest.approx(alpha, abs=1e-9)


def test_alpha_req_fits_the_range_that_was_asked_for():
    z = features.clustered(6, 30, 10)
    rows = z.flatten(0, 1).numpy()
    for first, last in [(1, 10), (2, 5), (9, 10)]:
        expected = numpy_alpha_req(rows, first, last)
        assert alpha_req(z, fit_range=(first, last)).item() == pytest.approx(expected, rel=1e-8)


def test_alpha_req_leaves_out_eigenvalues_that_are_zero():
    k = torch.arange(1, 6, dtype=torch.float64)
    axes = torch.zeros(5, 12, dtype=torch.float64)
    axes[:, :5] = torch.diag(1 / k)
    z = torch.cat([axes, -axes])
    assert alpha_req(z).item() == pytest.approx(2, abs=1e-9)
    assert alpha_req(z, fit_range=(3, 10)).item() == pytest.approx(2, abs=1e-9)
    assert alpha_req(z, fit_range=(5, 10)).isnan()


@pytest.mark.parametrize("rows", [torch.full((40, 6), 0.1), torch.zeros(3, 4), torch.ones(1, 5)])
def test_alpha_req_of_equal_rows_is_undefined(rows):
    assert alpha_req(rows).isnan()
    on_a_line = torch.outer(torch.arange(9.0), torch.ones(4))
    assert alpha_req(on_a_line).isnan()


def test_lidar_counts_the_directions_between_samples():
    samples = torch.eye(4, 6, dtype=torch.float64).unsqueeze(1)
    views = samples + 1e-6 * features.normal(4, 5, 6)
    assert lidar(views, eps=0).item() == pytest.approx(3, abs=1e-3)  # four points span three


def test_lidar_ignores_directions_in_which_views_differ():
    between = features.normal(50, 1, 8) * torch.tensor([1.0] * 4 + [0.0] * 4)
    within = features.normal(50, 20, 8, seed=1) * torch.tensor([0.0] * 4 + [1.0] * 4)
    assert lidar(between + within).item() == pytest.approx(4, rel=0.05)


def test_lidar_does_not_depend_on_the_order_of_samples_or_views():
    views = views_of(10, 4, 6)
    shuffled = views[torch.randperm(10)][:, torch.randperm(4)]
    assert lidar(shuffled).item() == pytest.approx(lidar(views).item(), rel=1e-10)


@pytest.mark.parametrize("q", [1, 3])
def test_lidar_without_anything_between_samples_is_zero(q):
    assert lidar(torch.full((5, q, 4), 0.1)).item() == 0
    assert lidar(features.normal(1, q, 4)).item() == 0


def test_lidar_survives_features_beside_which_delta_vanishes():
    views = 1e9 * views_of(12, 5, 7)
    assert lidar(views).item() == pytest.approx(numpy_lidar(views.numpy()), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_give_nan(bad):
    z = features.random(3, 5, 4)
    z[1, 2, 3] = bad
    assert rankme(z).isnan()
    assert alpha_req(z).isnan()
    assert lidar(z).isnan()


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("center", [False, True])
def test_blocks_of_rows_have_the_spectrum_of_the_whole(d, center):
    z = features.low_rank(1, 10_000, d)[0] + 5  # three blocks
    whole = z - z.mean(dim=0) if center else z
    expected = torch.linalg.svdvals(whole)
    error = (_singular_values(z, center) - expected).abs().max()
    assert error <= 1e-12 * expected[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rankme([[1.0]]), "z must be a floating point tensor, got list"),
        (lambda: rankme(torch.ones(3, 2, dtype=torch.int64)), "z must be .* got torch.int64"),
        (lambda: rankme(torch.ones(3)), r"z must have shape \(M, d\) or \(B, N, d\), got \(3,\)"),
        (lambda: rankme(torch.ones(2, 3, 4, 5)), r"got \(2, 3, 4, 5\)"),
        (lambda: rankme(torch.ones(0, 5)), r"z must not have an empty axis, got \(0, 5\)"),
        (lambda: rankme(torch.ones(3, 2), eps=-1), "eps must be >= 0, got -1"),
        (lambda: alpha_req(torch.ones(2, 0, 4)), "empty axis"),
        (lambda: alpha_req(torch.ones(9, 5), fit_range=(0, 5)), r"fit_range .* = 5, got \(0, 5\)"),
        (lambda: alpha_req(torch.ones(9, 5), fit_range=(3, 3)), r"fit_range .* got \(3, 3\)"),
        (lambda: alpha_req(torch.ones(4, 5), fit_range=(1, 5)), r"fit_range .* = 4, got \(1, 5\)"),
        (lambda: lidar(torch.ones(3, 4)), r"views must have shape \(n, q, d\).*got \(3, 4\)"),
        (lambda: lidar(torch.ones(3, 0, 4)), "views must not have an empty axis"),
        (lambda: lidar(torch.ones(3, 2, 4), delta=0), "delta must be > 0, got 0"),
        (lambda: lidar(torch.ones(3, 2, 4), eps=float("nan")), "eps must be >= 0, got nan"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
