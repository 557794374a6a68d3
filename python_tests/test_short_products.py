"""16-bit products on the CPU: their accuracy where they are hard, and the choice between them.

``DSE_EXT_INT16`` is read once a process, so every setting runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from features import normal, orthogonal
from parity import FLAT_GRADIENT, SHORT_PRODUCTS, relative_error
from torch import Tensor

import dse_ext

TESTS = Path(__file__).resolve().parent


def run(arguments: list[str], setting: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "DSE_EXT_INT16": setting},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )


# --- features -----------------------------------------------------------------------------------


def flat(b: int, n: int, d: int) -> Tensor:
    return normal(b, n, d, seed=1)


def offset(b: int, n: int, d: int) -> Tensor:
    """One direction outweighs all others: inner products are as large as steps allow for."""
    return normal(b, n, d, seed=2) + 3.0 * normal(d, seed=3)


def outlier_features(b: int, n: int, d: int) -> Tensor:
    """Two features are 30 times as large as the others, and two 30 times as small."""
    x = normal(b, n, d, seed=4)
    x[..., [0, d // 2]] *= 30.0
    x[..., [1, d - 1]] /= 30.0
    return x


def outlier_rows(b: int, n: int, d: int) -> Tensor:
    """Every ninth row has a single large feature."""
    x = normal(b, n, d, seed=5)
    x.view(-1, d)[::9, 7] += 40.0 * d**0.5
    return x


def decaying(b: int, n: int, d: int) -> Tensor:
    """Along the axes of a rotation, unlike the features."""
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    return (normal(b, n, d, seed=6) * spectrum) @ orthogonal(d, seed=7)


def dead_feature(b: int, n: int, d: int) -> Tensor:
    x = normal(b, n, d, seed=8)
    x[..., 3] = 0.0
    return x


CLOUDS = {
    f.__name__: f for f in (flat, offset, outlier_features, outlier_rows, decaying, dead_feature)
}
# (B, N, d), clusters an image: odd numbers of rows, positions and features; sides that are no
# multiples of panels; more features than one block of depth; clusters of more rows than features,
# of fewer, and of as many; of more than one chunk of tiles, and a part of one.
CASES = {
    "odd": ((3, 301, 193), 1),
    "panels": ((4, 500, 392), 1),
    "deep": ((5, 500, 1000), 1),
    "tall": ((2, 700, 176), 2),
    "square": ((2, 576, 192), 3),
    "chunks": ((3, 300, 330), 1),
}


def gradients(z: Tensor, labels: Tensor, k: int) -> list[tuple[float, float]]:
    """Relative error of the value and of the gradient: of the rank, then of the radii."""
    found = []
    for x in (z.clone().requires_grad_(), z.double().requires_grad_()):
        parts = dse_ext.dse_components(
            x, local_clusters=k, global_clusters=k, local_labels=labels, global_labels=labels
        )
        values = (parts.m_dim, parts.m_intra_image + parts.m_intra_batch)
        found.append([(v, *torch.autograd.grad(v, x, retain_graph=True)) for v in values])
    return [
        (relative_error(ours[0], theirs[0]), relative_error(ours[1], theirs[1]))
        for ours, theirs in zip(*found, strict=True)
    ]


def measure(cases: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Errors of these cases, as `main` prints them."""
    errors = {}
    for case in cases:
        shape, k = CASES[case]
        labels = (torch.arange(shape[1]) % k).expand(shape[:2])
        for name, cloud in CLOUDS.items():
            errors[f"{case} {name}"] = gradients(cloud(*shape).float(), labels, k)
    return errors


# Tiles are slow where they are not the processor's: not with the largest case.
SETTINGS = {
    "vectors": list(CASES),
    "tiles": ["odd", "tall", "square", "chunks"],
    "never": list(CASES),
}
LIMITS = {"vectors": 6e-4, "tiles": 6e-4, "never": 3e-4}
Errors = dict[str, dict[str, list[tuple[float, float]]]]


@pytest.fixture(scope="module")
def errors() -> Errors:
    found = {}
    for setting, cases in SETTINGS.items():
        result = run([__file__, *cases], setting)
        assert result.returncode == 0, result.stderr
        found[setting] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("cloud", list(CLOUDS))
@pytest.mark.parametrize("case", list(CASES))
def test_accuracy(case: str, cloud: str, errors: Errors) -> None:
    for setting, cases in SETTINGS.items():
        if case not in cases:
            continue
        for value, gradient in errors[setting][f"{case} {cloud}"]:
            assert value <= 1e-6, setting
            assert gradient <= LIMITS[setting], setting


@pytest.mark.parametrize("cloud", list(CLOUDS))
@pytest.mark.parametrize("case", SETTINGS["tiles"])
def test_tiles_multiply_the_same_integers(case: str, cloud: str, errors: Errors) -> None:
    """Errors are those of the operands' rounding, which is the same.

    Of the rank nearly to the digit; small singular values of clusters make more of a last bit.
    """
    name = f"{case} {cloud}"
    limits = (0.02, 0.35)  # of the rank and of the radii
    for tiles, vectors, limit in zip(
        errors["tiles"][name], errors["vectors"][name], limits, strict=True
    ):
        assert tiles[1] == pytest.approx(vectors[1], rel=limit, abs=1e-6)


def test_flat_spectra_use_them(errors: Errors) -> None:
    """Of rank and of clusters, and only where they are wanted."""
    for case in ("panels", "deep"):
        (_, rank), _ = errors["vectors"][f"{case} flat"]
        (_, narrow_rank), _ = errors["never"][f"{case} flat"]
        assert narrow_rank < 3e-5 < rank
    (_, clusters) = errors["vectors"]["tall flat"][1]
    (_, narrow_clusters) = errors["never"]["tall flat"][1]
    assert narrow_clusters < 3e-5 < clusters


def hadamard(n: int) -> Tensor:
    """(n, n), orthogonal but for the factor n, of ones and minus ones."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def clusters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nuclear norm of a single cluster (1, n, d), and its gradient."""
    x = x.clone().requires_grad_()
    labels = torch.zeros(x.shape[:2], dtype=torch.long)
    value = torch.ops.dse_ext.cluster_nuclear_norms(x, labels, 1, True)[0]
    return value.detach(), *torch.autograd.grad(value.sum(), x)


@pytest.mark.parametrize("shape", [(512, 200), (200, 512)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_entries_of_one_size(shape: tuple[int, int]) -> None:
    """All would be rounded alike, and the norm be off by as much."""
    signs = hadamard(512)[:, 1:201]
    x = (signs if shape[0] == 512 else signs.T)[None] / 3.0
    expected, gradient = clusters(x)
    ours, ours_gradient = clusters(x.float())
    assert relative_error(ours, expected) <= 5e-6
    assert relative_error(ours_gradient, gradient) <= FLAT_GRADIENT


@pytest.mark.parametrize("shape", [(400, 200), (200, 400)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_centring_that_leaves_the_range_of_float32(shape: tuple[int, int]) -> None:
    x = normal(1, *shape, seed=9)
    x[..., 0] = 0.0
    x[0, 0, 0], x[0, 1, 0] = 1.75e38, -1.75e38
    expected, _ = clusters(x.float().double())
    ours, _ = clusters(x.float())
    assert relative_error(ours, expected) <= 1e-5


def test_suites_with_the_other_products() -> None:
    """The tests of spectra, in the setting that they do not run in otherwise."""
    files = ["test_narrow_spectra.py", "test_large_spectra.py", "test_precision.py"]
    setting = "never" if SHORT_PRODUCTS else "always"
    result = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files], setting
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout


def test_settings_that_are_none_are_refused() -> None:
    result = run(["-c", "import dse_ext"], "sometimes")
    assert result.returncode != 0
    message = "DSE_EXT_INT16 is 'sometimes'; accepted are auto, never, always, vectors, tiles."
    assert message in result.stderr


@pytest.mark.parametrize("setting", ["always", "never", "vectors", "tiles"])
def test_info_says_which(setting: str) -> None:
    program = "from dse_ext import info; print(info.collect()['cpu']['kernels'])"
    result = run(["-c", program], setting)
    assert ("16-bit products" in result.stdout) == (setting != "never")
    if setting in ("vectors", "tiles"):
        assert ("in tiles" in result.stdout) == (setting == "tiles")


def test_threads_do_not_change_results() -> None:
    z = flat(4, 300, 384).float()
    labels = torch.zeros(4, 300, dtype=torch.long)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x = z.clone().requires_grad_()
        parts = dse_ext.dse_components(
            x, local_clusters=1, global_clusters=1, local_labels=labels, global_labels=labels
        )
        value = parts.m_dim + parts.m_intra_image
        found.append((value.detach(), *torch.autograd.grad(value, x)))
    torch.set_num_threads(before)
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(gradient, found[0][1])


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:])))
