"""The CUDA operators' own sources, run on the CPU (emulation.h), against the CPU operators.

The library registers ``torch.ops.dse_ext_emulated.*`` for CPU tensors: kernels and host code are
those of the GPU, only launches are emulated. Shapes are small, and chosen so that every path is
taken: the image kernel and the kernels for clusters of any size, matrices on either side, effective
ranks by one block, by the library and by shifted inverses, groups that are cut short.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import oracle
import parity
import pytest
import torch
from emulated import build_operators
from features import nearly_collapsed, rank_collapsed
from torch import Tensor

import dse_ext  # noqa: F401  (registers the CPU operators)

VARIANTS = ("regularizer", "evaluation", "paper")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The operators' namespace."""
    return build_operators(tmp_path_factory.mktemp("emulated_operators"))


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def labels(*shape: int, k: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, k, shape, generator=generator)


def assert_close(ours: Tensor, expected: Tensor, limit: float) -> None:
    """Compare where the expected is finite; elsewhere both are the same NaN or infinity."""
    finite = expected.isfinite()
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours[~finite], expected[~finite], equal_nan=True, rtol=0, atol=0)
    if finite.any():
        assert ours[finite].isfinite().all()
        error = parity.relative_error(ours[finite], expected[finite])
        assert error <= limit, f"relative error {error:.3g} above {limit}"


@dataclass
class Case:
    z: Tensor
    k: int = 3
    global_clusters: int = 6
    group: int | None = None
    normalize: bool = True
    given: dict[str, Tensor] = field(default_factory=dict)

    @property
    def images_of_a_group(self) -> int:
        return self.group or max(self.global_clusters // self.k, 1)

    def components(self, ops: Any, variant: str, save: bool = True, **more: Any) -> Any:
        return ops.dse_components(
            self.z, torch.tensor([5]), variant, self.k, self.global_clusters, self.group,
            self.normalize, 20, 1e-4, **{**self.given, **more}, save_for_backward=save,
        )  # fmt: skip

    def gradient(self, ops: Any, variant: str, output: Any, coefficients: Tensor) -> Tensor:
        local = self.k if "local_labels" in self.given else min(self.k, self.z.shape[1])
        result: Tensor = ops.dse_components_backward(
            coefficients.to(output[0].dtype), self.z, *output[5:], variant, local,
            self.images_of_a_group, self.normalize,
        )  # fmt: skip
        return result


def check(emulated: Any, case: Case, variant: str) -> None:
    limits = parity.tolerance(case.z.dtype)
    ours = case.components(emulated, variant)
    expected = case.components(torch.ops.dse_ext, variant)
    for a, b in zip(ours[5:7], expected[5:7], strict=True):
        assert torch.equal(a, b), f"{(a != b).sum()} labels differ"
    for a, b in zip((*ours[:5], ours[7]), (*expected[:5], expected[7]), strict=True):
        assert_close(a, b, limits.component)
    for coefficients in (torch.tensor(parity.MIXED), *torch.eye(5)):
        a = case.gradient(emulated, variant, ours, coefficients)
        b = case.gradient(torch.ops.dse_ext, variant, expected, coefficients)
        assert_close(a, b, limits.gradient)
    # The same values where nothing is saved.
    bare = case.components(emulated, variant, save=False)
    for a, b in zip(bare[:5], ours[:5], strict=True):
        assert_close(a, b, limits.component)
    assert all(saved.numel() == 0 for saved in bare[8:])


def with_nan(z: Tensor) -> Tensor:
    z[1, 2, 3] = float("nan")
    return z


CASES = {
    "groups cut short": Case(random(5, 12, 20)),
    "few features": Case(random(9, 10, 6), global_clusters=4),
    "one position": Case(random(3, 1, 7), group=2),
    "one row": Case(random(1, 1, 7)),
    "two features, one position": Case(random(7, 1, 2), group=3),
    "large images": Case(random(2, 260, 5), global_clusters=5),
    "not normalized": Case(random(5, 8, 12), normalize=False),
    "equal rows": Case(torch.ones(3, 4, 4, dtype=torch.float64)),
    "zeros": Case(torch.zeros(3, 4, 4)),
    "strided": Case(random(9, 4, 6).permute(1, 2, 0)),
    "NaN": Case(with_nan(random(4, 6, 9))),
    "NaN in large images": Case(with_nan(random(2, 260, 5))),
    "given labels": Case(
        random(4, 6, 9), 4, 5, 3,
        given={"local_labels": labels(4, 6, k=4), "global_labels": labels(4, 6, k=5)},
    ),
    "more clusters than positions": Case(
        random(4, 6, 9), 9, 5, 3, given={"local_labels": labels(4, 6, k=9)}
    ),
    "given centroids": Case(
        random(4, 6, 9), 2, 5, 2, given={"global_centroids": random(2, 5, 9, seed=2)}
    ),
    "given centroids, last group padded": Case(
        random(3, 2, 9), 2, 4, 2,
        given={"global_centroids": torch.cat([random(1, 4, 9), torch.zeros(1, 4, 9)]).double()},
    ),
    "NaN, given labels": Case(
        with_nan(random(4, 6, 9)), 4, 5, 3,
        given={"local_labels": labels(4, 6, k=4), "global_labels": labels(4, 6, k=5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", list(CASES))
def test_components_and_gradient(emulated: Any, name: str, variant: str) -> None:
    check(emulated, CASES[name], variant)


def against_the_oracle(
    emulated: Any, case: Case, limits: parity.Tolerance, variant: str = "regularizer"
) -> None:
    ours = case.components(emulated, variant)
    wide = case.z.double().requires_grad_()
    expected = oracle.dse_components(
        wide, ours[5], ours[6], ours[7].double(), variant=variant,
        group_images=case.images_of_a_group, normalize=case.normalize,
    )  # fmt: skip
    for component, a, b in zip(oracle.COMPONENTS, ours[:5], expected, strict=True):
        error = parity.relative_error(a, b)
        assert error <= limits.component, f"{component}: {error:.3g}"
    gradient = case.gradient(emulated, variant, ours, torch.tensor(parity.MIXED))
    (wanted,) = torch.autograd.grad(parity.weighted(tuple(expected), parity.MIXED), wide)
    free = ~oracle.tied_rows(case.z, ours[6], ours[7], case.images_of_a_group, case.normalize)
    error = parity.relative_error(gradient[free], wanted[free])
    assert error <= limits.gradient, f"gradient: {error:.3g}"


# Shapes at the ends of what is supported: one feature, more than a thousand, many clusters, as many
# positions as two kernels divide between them; and clouds that are hard to tell apart.
EXTENTS = {
    "one feature": Case(random(3, 7, 1)),
    "1100 features": Case(random(2, 6, 1100)),
    "1100 features, more rows": Case(random(1, 300, 1100), group=1),
    "64 clusters": Case(random(2, 80, 9), 64, 64, 1),
    "256 positions": Case(random(2, 256, 3), global_clusters=4),
    "300 positions": Case(random(1, 300, 70)),
    "nearly collapsed": Case(nearly_collapsed(4, 20, 12)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, case in EXTENTS.items()
        for dtype in parity.DTYPES
        # The largest takes as long as all others together.
        if dtype == torch.float64 or case.z.numel() < 100_000
    ],
)
def test_extents_against_the_oracle(emulated: Any, name: str, dtype: torch.dtype) -> None:
    case = EXTENTS[name]
    case = Case(case.z.to(dtype), case.k, case.global_clusters, case.group)
    against_the_oracle(
        emulated, case, parity.tolerance(dtype, collapsed=name == "nearly collapsed")
    )


# Spectra that a Gram matrix does not resolve: exactly rank two, and beside it the rounding of the
# dtype. Clusters with matrices on either side, in the image kernel and outside of it; the effective
# rank in one block, by the library and by shifted inverses.
COLLAPSED = {
    "few features": rank_collapsed(4, 20, 12),
    "few rows": rank_collapsed(3, 12, 50),
    "large images": rank_collapsed(1, 300, 9),
    "a side above 128": rank_collapsed(6, 30, 140),
    "fewer rows than features, a side above 128": rank_collapsed(5, 30, 170),
}


@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("name", list(COLLAPSED))
def test_components_of_a_collapsed_rank(emulated: Any, name: str, dtype: torch.dtype) -> None:
    case = Case(COLLAPSED[name].to(dtype))
    against_the_oracle(emulated, case, parity.tolerance(dtype, collapsed=True))
    # The same values where nothing is saved.
    bare = case.components(emulated, "regularizer", save=False)
    for a, b in zip(bare[:5], case.components(emulated, "regularizer")[:5], strict=True):
        assert_close(a, b, parity.tolerance(dtype).component)


@pytest.mark.parametrize("variant", ["evaluation", "paper"])
def test_other_variants_of_a_collapsed_rank(emulated: Any, variant: str) -> None:
    # Matrices of a rank of their own at every position, in one block each; all rows not normalized.
    for normalize, dtype in ((True, torch.float64), (False, torch.float32)):
        z = rank_collapsed(14, 5, 9).to(dtype)
        check(emulated, Case(z, normalize=normalize), variant)


def with_tail(*shape: int) -> Tensor:
    """Matrices with two large singular values, and others from 1e-7 of the largest one down."""
    generator = torch.Generator().manual_seed(3)
    u, _, vh = torch.linalg.svd(
        torch.randn(shape, dtype=torch.float64, generator=generator), full_matrices=False
    )
    tail = 1e-7 * torch.logspace(0, -0.5, min(shape[-2:]) - 2, dtype=torch.float64)
    return (u * torch.cat([torch.tensor([1.0, 0.5], dtype=torch.float64), tail])) @ vh


# Matrices on either side, few and many, of sides up to 128 and above.
STEEP = [(3, 40, 12), (3, 12, 40), (10, 30, 9), (1, 300, 140), (1, 140, 200)]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", STEEP)
def test_effective_rank_of_a_steep_spectrum(
    emulated: Any, shape: tuple[int, int, int], center: bool
) -> None:
    x = with_tail(*shape)
    limits = parity.tolerance(torch.float64)
    wide = x.clone().requires_grad_()
    expected = torch.stack([oracle.effective_rank(own, center) for own in wide])
    grad = random(shape[0], seed=4)
    (wanted,) = torch.autograd.grad((expected * grad).sum(), wide)
    ranks, saved, form = emulated.effective_rank(x, center)
    gradient = emulated.effective_rank_backward(grad, x, saved, form, center)
    assert_close(ranks, expected.detach(), limits.component)
    assert_close(emulated.effective_rank(x, center, False)[0], ranks, 1e-12)
    assert_close(gradient, wanted, limits.gradient)


@pytest.mark.parametrize("shape", STEEP)
def test_nuclear_norms_of_a_steep_spectrum(emulated: Any, shape: tuple[int, int, int]) -> None:
    x, one = with_tail(*shape), torch.zeros(shape[:2], dtype=torch.int64)
    limits = parity.tolerance(torch.float64)
    wide = x.clone().requires_grad_()
    expected = oracle.cluster_nuclear_norms(wide, one, 1)
    grad = random(shape[0], 1, seed=4)
    (wanted,) = torch.autograd.grad((expected * grad).sum(), wide)
    norms, saved, form = emulated.cluster_nuclear_norms(x, one, 1)
    gradient = emulated.cluster_nuclear_norms_backward(grad, x, one, saved, form)
    assert_close(norms, expected.detach(), limits.component)
    assert_close(emulated.cluster_nuclear_norms(x, one, 1, False)[0], norms, 1e-12)
    assert_close(gradient, wanted, limits.gradient)


@pytest.mark.parametrize("dtype", parity.DTYPES)
def test_components_of_each_dtype(emulated: Any, dtype: torch.dtype) -> None:
    check(emulated, Case(random(5, 12, 20, dtype=dtype)), "regularizer")
    # A side above 128: the library's decomposition for float64, shifted inverses for the others.
    check(emulated, Case(random(6, 30, 140, dtype=dtype), global_clusters=12), "regularizer")


@pytest.mark.parametrize(
    ("shape", "dtype", "variant"),
    [
        ((2, 70, 150), torch.float64, "regularizer"),
        ((2, 70, 150), torch.float32, "paper"),
        ((140, 2, 150), torch.float32, "evaluation"),
        ((140, 2, 135), torch.float64, "evaluation"),
        ((20, 3, 10), torch.float32, "evaluation"),
    ],
)
def test_sides_of_the_effective_rank(
    emulated: Any, shape: tuple[int, int, int], dtype: torch.dtype, variant: str
) -> None:
    check(emulated, Case(random(*shape, dtype=dtype)), variant)


def test_labels_out_of_range_are_refused(emulated: Any) -> None:
    bad = torch.zeros(4, 6, dtype=torch.int64)
    bad[2, 1] = 3
    case = Case(random(4, 6, 9), given={"local_labels": bad})
    with pytest.raises(RuntimeError, match=r"local_labels must lie in \[0, 3\), got 3 at \(2, 1\)"):
        case.components(emulated, "regularizer")
    with pytest.raises(RuntimeError, match=r"labels must lie in \[0, 2\), got 3 at \(2, 1\)"):
        emulated.cluster_nuclear_norms(random(4, 6, 9), bad, 2)


@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize(
    ("shape", "k"), [((3, 40, 7), 5), ((2, 5, 6), 8), ((2, 1, 4), 2), ((1, 200, 3), 4)]
)
def test_kmeans(emulated: Any, shape: tuple[int, int, int], k: int, dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    if shape[0] > 2:
        x[1, 3, 2] = float("inf")
    ours = emulated.kmeans(x, k, torch.tensor([3]))
    expected = torch.ops.dse_ext.kmeans(x, k, torch.tensor([3]))
    assert torch.equal(ours[1], expected[1])
    limit = parity.tolerance(dtype).component
    assert_close(ours[0], expected[0], limit)
    # With a row a cluster nothing is left but rounding.
    assert_close(ours[2] + 1e-3, expected[2] + 1e-3, limit)


@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("shape", [(3, 20, 7), (3, 9, 30), (2, 1, 4), (2, 100, 90)])
def test_cluster_nuclear_norms(
    emulated: Any, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, k = random(*shape, dtype=dtype), 4 if shape[1] < 100 else 1
    if shape[0] > 2:
        x[1, 3, 2] = float("nan")
    own = labels(*shape[:2], k=k)
    limits = parity.tolerance(dtype)
    grad = random(shape[0], k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    results = []
    for ops in (emulated, torch.ops.dse_ext):
        norms, saved, form = ops.cluster_nuclear_norms(x, own, k)
        bare = ops.cluster_nuclear_norms(x, own, k, False)[0]
        gradient = ops.cluster_nuclear_norms_backward(grad, x, own, saved, form)
        results.append((norms, bare, gradient))
    for a, b, limit in zip(
        *results, (limits.component, limits.component, limits.gradient), strict=True
    ):
        assert_close(a, b, limit)


@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    "shape", [(20, 7), (3, 9, 30), (2, 2, 1, 4), (10, 12, 5), (150, 135), (2, 135, 160)]
)
def test_effective_rank(
    emulated: Any, shape: tuple[int, ...], center: bool, dtype: torch.dtype
) -> None:
    if max(shape) > 100 and dtype in HALF:
        pytest.skip("as in float32, and slow")
    x = random(*shape, dtype=dtype)
    if shape[0] == 10:
        x[1, 3, 2] = float("nan")
    limits = parity.tolerance(dtype)
    grad = random(*shape[:-2], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    results = []
    for ops in (emulated, torch.ops.dse_ext):
        ranks, saved, form = ops.effective_rank(x, center)
        bare = ops.effective_rank(x, center, False)[0]
        gradient = ops.effective_rank_backward(grad, x, saved, form, center)
        results.append((ranks, bare, gradient))
    for a, b, limit in zip(
        *results, (limits.component, limits.component, limits.gradient), strict=True
    ):
        assert_close(a, b, limit)
