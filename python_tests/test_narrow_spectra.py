"""Float32 spectra against the same operators in float64, on the same rounded rows.

Clusters, and the effective rank's large matrices, are decomposed in float32 where their spectra
allow it. Each of these tests is on a spectrum that does, on one that does not, or on both in one
call.
"""

from __future__ import annotations

import pytest
import torch
from features import generator, normal, orthogonal
from parity import FLAT_GRADIENT, assert_gradient, relative_error, tolerance
from torch import Tensor

import dse_ext

# Rows and features of a cluster. Up to a side of 160, eight matrices run at once; above, one at a
# time. The Gram matrix is of the rows where there are no more rows than features.
SMALL = ((60, 96), (120, 48), (97, 96), (160, 160))
LARGE = ((161, 300), (400, 176), (200, 200), (180, 192))
DECAYS = (0.0, 0.5, 1.0, 1.5, 3.0)


def power_law(n: int, d: int, decay: float, seed: int = 0) -> Tensor:
    """(n, d): deviations j^-decay along the axes of a random rotation, and an offset."""
    sigma = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    offset = normal(d, seed=seed + 1) * 2 * sigma.norm() / d**0.5
    return (normal(n, d, seed=seed + 2) * sigma) @ orthogonal(d, seed=seed + 3) + offset


def limits(dtype: torch.dtype, decay: float) -> tuple[float, float]:
    """Of the value, and of the gradient: the promise, and a tighter bar for slow decays."""
    promise = tolerance(torch.float32)
    gradient = FLAT_GRADIENT if decay <= 1 else promise.gradient
    # bfloat16: its values are float32, its gradient is rounded once.
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return promise.component, gradient + rounding


def norms(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Nuclear norms and the gradient of their weighted sum."""
    x = x.detach().requires_grad_()
    value = torch.ops.dse_ext.cluster_nuclear_norms(x, labels, k, True)[0]
    weights = torch.linspace(1, 2, k, dtype=torch.float64, device=x.device)
    (gradient,) = torch.autograd.grad((value.double() * weights).sum(), x)
    return value.detach(), gradient


def rank(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = dse_ext.effective_rank(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def assert_clusters(x: Tensor, labels: Tensor, k: int, value: float, gradient: float) -> None:
    """Every cluster by itself, so that none hides behind its neighbours."""
    ours, ours_g = norms(x, labels, k)
    theirs, theirs_g = norms(x.double(), labels, k)
    assert float(((ours.double() - theirs) / theirs).abs().max()) <= value
    # Without a gradient there are no functions of matrices, and precision is decided anew.
    alone = torch.ops.dse_ext.cluster_nuclear_norms(x, labels, k, False)[0]
    assert float(((alone.double() - theirs) / theirs).abs().max()) <= value
    for group in range(x.shape[0]):
        for cluster in range(k):
            members = labels[group] == cluster
            assert_gradient(ours_g[group, members], theirs_g[group, members], gradient)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dead", [0, 1, 5], ids=lambda dead: f"{dead} dead")
@pytest.mark.parametrize("shape", [(170, 300), (400, 180), (190, 240)], ids=str)
def test_nuclear_norms_of_large_clusters_to_six_digits(
    shape: tuple[int, int], dead: int, decay: float, device: torch.device
) -> None:
    """Sums of square roots are traces; of more rows than features, some dead, over eigenvalues."""
    n, d = shape
    x = torch.cat([power_law(n, d, decay, seed) for seed in (0, 10)])[None].float().to(device)
    x[..., :dead] = 0
    labels = torch.arange(2, device=device).repeat_interleave(n)[None]
    assert_clusters(x, labels, 2, 1e-6, limits(torch.float32, decay)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=lambda s: f"{s[0]}x{s[1]}")
def test_nuclear_norms_of_power_laws(
    shape: tuple[int, int], decay: float, dtype: torch.dtype, device: torch.device
) -> None:
    n, d = shape
    x = torch.cat([power_law(n, d, decay, seed) for seed in (0, 10)])[None].to(device, dtype)
    labels = torch.arange(2, device=device).repeat_interleave(n)[None]
    assert_clusters(x, labels, 2, *limits(dtype, decay))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "shape", [(600, 96), (700, 176), (161, 300)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_effective_rank_of_power_laws(
    shape: tuple[int, int], decay: float, dtype: torch.dtype, device: torch.device
) -> None:
    x = power_law(*shape, decay).to(device, dtype)
    value, gradient = limits(dtype, decay)
    ours, ours_g = rank(x)
    theirs, theirs_g = rank(x.double())
    assert relative_error(ours, theirs) <= value
    assert_gradient(ours_g, theirs_g, gradient)


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("shape", [(60, 96), (120, 48), (161, 300)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_squares_out_of_the_range_of_float32(
    shape: tuple[int, int], scale: float, decay: float, device: torch.device
) -> None:
    """Sums of squares from 1e-40 to 1e64: those that float32 does not hold are float64's."""
    n, d = shape
    x = (power_law(n, d, decay) * scale).float().to(device)
    labels = torch.zeros(1, n, dtype=torch.int64, device=device)
    value, gradient = limits(torch.float32, decay)
    assert_clusters(x[None], labels, 1, value, gradient)
    ours, ours_g = rank(x)
    theirs, theirs_g = rank(x.double())
    assert relative_error(ours, theirs) <= value
    # The gradient's matrix has the size of an inverse square.
    assert_gradient(ours_g.double() * scale, theirs_g * scale, gradient)


@pytest.mark.parametrize(("scale", "decay"), [(1e-30, 1.0), (1e-25, 1.5)])
def test_gradient_of_tiny_large_clusters(scale: float, decay: float) -> None:
    """Rows are within float32's range, their squares and inverse squares are not."""
    x = (power_law(161, 300, decay) * scale)[None].float()
    labels = torch.zeros(1, 161, dtype=torch.int64)
    assert_clusters(x, labels, 1, *limits(torch.float32, decay))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_gradient_of_a_large_rank_of_unscaled_features(scale: float) -> None:
    """A side above 160, whose matrix has the size of an inverse square; up to it, it is float64."""
    z = (normal(10, 100, 192) * scale).float()
    labels = (torch.arange(100) % 2).expand(10, 100)
    options = {"local_clusters": 2, "global_clusters": 2, "normalize": False}
    gradients = []
    for x in (z, z.double()):
        x.requires_grad_()
        c = dse_ext.dse_components(x, local_labels=labels, global_labels=labels, **options)
        gradients.append(torch.autograd.grad(c.m_dim, x)[0].double() * scale)
    assert_gradient(*gradients, limits(torch.float32, 0.0)[1])


@pytest.mark.parametrize("first", [3.0, 0.0], ids=["steep ones first", "flat ones first"])
def test_a_few_clusters_unlike_the_others(first: float, device: torch.device) -> None:
    """The largest clusters are a sample: they speak for the others, but decide none's accuracy."""
    d, most, few = 64, 28, 8
    other = 3.0 - first
    # A steep first two groups of eight reject float32 for the flat ones as well; flat ones try it.
    decays = [first] * most + [other] * few
    sizes = [40 - i // 6 for i in range(most + few)]
    x = torch.cat(
        [power_law(n, d, a, 20 * i) for i, (n, a) in enumerate(zip(sizes, decays, strict=True))]
    )
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(labels), generator=generator(1))
    x, labels = x[order].float().to(device), labels[order].to(device)
    assert_clusters(x[None], labels[None], len(sizes), *limits(torch.float32, 3.0))


@pytest.mark.parametrize("dead", [0, 3])
@pytest.mark.parametrize("decay", [1.5, 3.0])
def test_large_clusters_that_begin_in_float64(
    decay: float, dead: int, device: torch.device
) -> None:
    """The sample of large ones rejects float32 for all: eigenvalues and traces in float64.

    Those of decay 3 are too steep for a Gram matrix of any precision.
    """
    d, steep = 176, 5
    sizes = [200, 196, 192, 188, 184, 180, 176, 175, 170]
    decays = [decay if i < steep else 0.5 for i in range(len(sizes))]
    x = torch.cat(
        [power_law(n, d, a, 20 * i) for i, (n, a) in enumerate(zip(sizes, decays, strict=True))]
    )
    x[:, :dead] = 0.0
    labels = torch.arange(len(sizes), device=device).repeat_interleave(
        torch.tensor(sizes, device=device)
    )[None]
    x = x[None].float().to(device)
    assert_clusters(x, labels, len(sizes), *limits(torch.float32, decay))
    values, exact = (norms(own, labels, len(sizes))[0][0, steep:] for own in (x, x.double()))
    torch.testing.assert_close(values, exact.float(), rtol=2e-7, atol=0.0)


def outliers(n: int, d: int, decay: float, count: int, length: float) -> Tensor:
    x = power_law(n, d, decay)
    x[:count] *= length
    return x[None].float()


@pytest.mark.parametrize("decay", [0.0, 1.5])
@pytest.mark.parametrize(
    "shape", [(60, 96), (161, 300), (400, 176)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("length", [10.0, 1e3, 1e5])
def test_a_first_row_far_from_the_others(
    shape: tuple[int, int], decay: float, length: float, device: torch.device
) -> None:
    """Rows are rounded to float32 relative to the first one, which may be an outlier."""
    x = outliers(*shape, decay, 1, length).to(device)
    labels = torch.zeros(x.shape[:2], dtype=torch.int64, device=device)
    assert_clusters(x, labels, 1, *limits(torch.float32, 3.0))


@pytest.mark.parametrize(
    ("shape", "decay", "length"), [((161, 300), 1.0, 100.0), ((330, 384), 0.5, 300.0)]
)
def test_a_few_rows_that_hold_the_trace(
    shape: tuple[int, int], decay: float, length: float
) -> None:
    """Four long rows among many: products err with the length of rows, not with the trace."""
    x = outliers(*shape, decay, 4, length)
    labels = torch.zeros(x.shape[:2], dtype=torch.int64)
    assert_clusters(x, labels, 1, *limits(torch.float32, 3.0))


def test_bitwise_the_same_for_one_and_two_threads(restore_threads: None) -> None:
    """Precision is chosen by sizes and spectra, also where tasks of both precisions meet."""
    shapes = [(170, 0.0), (170, 3.0), *[(40 - i % 3, 3.0 * (i % 4 == 0)) for i in range(40)]]
    x = torch.cat([power_law(n, 176, a, 20 * i) for i, (n, a) in enumerate(shapes)]).float()
    labels = torch.arange(len(shapes)).repeat_interleave(torch.tensor([n for n, _ in shapes]))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((*norms(x[None], labels[None], len(shapes)), *rank(x)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("apart", [0.0, 1.0, 30.0], ids=lambda a: f"apart{a:g}")
@pytest.mark.parametrize(
    "shape",
    [(160, 160), (256, 256), (383, 384), (386, 384), (400, 384)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
def test_clusters_of_about_as_many_rows_as_features(
    shape: tuple[int, int], apart: float, device: torch.device
) -> None:
    """Singular values from 1 / n of the typical one; apart: rows in two bundles, of a large one."""
    n, d = shape
    x = power_law(3 * n, d, 0.0)
    x += apart * (torch.arange(3 * n) % 2)[:, None] * normal(d, seed=9)
    labels = torch.arange(3, device=device).repeat_interleave(n)[None]
    promise = tolerance(torch.float32)
    assert_clusters(x[None].float().to(device), labels, 3, promise.component, 5e-4)


@pytest.mark.parametrize("thin", [1.0, 1e-2, 1e-4], ids=lambda t: f"thin{t:g}")
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "shape", [(240, 192), (400, 192), (900, 192), (1400, 704)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_rank_of_normalized_rows(
    shape: tuple[int, int], decay: float, thin: float, device: torch.device
) -> None:
    """thin: a direction that a few rows do not show: float32 products are tried in vain."""
    n, d = shape
    axes = orthogonal(d, seed=5)
    x = power_law(n, d, decay)
    x -= (1 - thin) * (x @ axes[:, :1]) @ axes[:, :1].T
    x = x.view(2, n // 2, d).float().to(device)
    labels = torch.zeros(2, n // 2, dtype=torch.long, device=device)
    found = []
    for z in (x.clone().requires_grad_(), x.double().requires_grad_()):
        parts = dse_ext.dse_components(
            z, local_clusters=1, global_clusters=1, local_labels=labels, global_labels=labels
        )
        (gradient,) = torch.autograd.grad(parts.m_dim, z)
        found.append((parts.m_dim.detach(), gradient))
    promise = tolerance(torch.float32)
    assert relative_error(found[0][0], found[1][0]) <= promise.component
    assert_gradient(found[0][1], found[1][1], FLAT_GRADIENT)
