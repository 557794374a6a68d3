"""What must not change a result: rotations, orders, row lengths, threads, repetition."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import oracle
import pytest
import torch
from features import clustered, generator, normal, orthogonal, random_labels
from hypothesis import given
from torch import Tensor

import dse_ext

K_LOCAL, K_GLOBAL, GROUP = 3, 6, 4

shapes = st.tuples(st.integers(1, 9), st.integers(2, 14), st.integers(2, 16))
seeds = st.integers(0, 2**20)
variants = st.sampled_from(oracle.VARIANTS)


def case(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, labels (also more of them than rows), and centroids of their own."""
    b, n, d = shape
    groups = len(oracle.group_slices(b, GROUP))
    return (
        clustered(b, n, d, seed=seed),
        random_labels(b, n, K_LOCAL, seed=seed + 1),
        random_labels(b, n, K_GLOBAL, seed=seed + 2),
        normal(groups, K_GLOBAL, d, seed=seed + 3),
    )


def run(
    z: Tensor, local: Tensor, shared: Tensor, centroids: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """The components (5,) and the gradient of a sum with M_dim's permutation left out."""
    z = z.clone().requires_grad_()
    c = dse_ext.dse_components(
        z,
        local_clusters=K_LOCAL,
        global_clusters=K_GLOBAL,
        group_images=GROUP,
        local_labels=local,
        global_labels=shared,
        global_centroids=centroids,
        generator=generator(0),
        **options,
    )
    (gradient,) = torch.autograd.grad(c.score(), z)
    return torch.stack(c[:5]).detach(), gradient


@given(shapes, seeds, variants, st.booleans())
def test_rotation_of_the_features_rotates_the_gradient(
    shape: tuple[int, int, int], seed: int, variant: str, normalize: bool
) -> None:
    z, local, shared, centroids = case(shape, seed)
    q = orthogonal(shape[2], seed=seed)
    options = {"variant": variant, "normalize": normalize}
    values, gradient = run(z, local, shared, centroids, **options)
    turned, turned_gradient = run(z @ q, local, shared, centroids @ q, **options)
    torch.testing.assert_close(turned, values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(turned_gradient, gradient @ q, rtol=1e-6, atol=1e-8)


@given(shapes, seeds, st.sampled_from(["regularizer", "paper"]))
def test_order_of_positions_within_an_image(
    shape: tuple[int, int, int], seed: int, variant: str
) -> None:
    z, local, shared, centroids = case(shape, seed)
    g = generator(seed)
    order = torch.stack([torch.randperm(shape[1], generator=g) for _ in range(shape[0])])
    along = order[..., None].expand_as(z)
    values, gradient = run(z, local, shared, centroids, variant=variant)
    moved, moved_gradient = run(
        z.gather(1, along),
        local.gather(1, order),
        shared.gather(1, order),
        centroids,
        variant=variant,
    )
    torch.testing.assert_close(moved, values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved_gradient, gradient.gather(1, along), rtol=1e-6, atol=1e-8)


@given(shapes, seeds)
def test_order_of_positions_moves_no_distance_of_the_evaluation_variant(
    shape: tuple[int, int, int], seed: int
) -> None:
    z, local, shared, centroids = case(shape, seed)
    flipped = [t.flip(1) for t in (z, local, shared)]
    values, _ = run(z, local, shared, centroids, variant="evaluation")
    moved, _ = run(*flipped, centroids, variant="evaluation")
    keep = [i for i, name in enumerate(oracle.COMPONENTS) if name != "m_dim"]
    torch.testing.assert_close(moved[keep], values[keep], rtol=1e-9, atol=1e-12)


@given(shapes, seeds, variants)
def test_order_of_images_within_a_group(
    shape: tuple[int, int, int], seed: int, variant: str
) -> None:
    z, local, shared, centroids = case((GROUP, *shape[1:]), seed)
    values, _ = run(z, local, shared, centroids, variant=variant)
    moved, _ = run(z.flip(0), local.flip(0), shared.flip(0), centroids, variant=variant)
    keep = [
        i for i, name in enumerate(oracle.COMPONENTS) if name != "m_dim" or variant != "evaluation"
    ]
    torch.testing.assert_close(moved[keep], values[keep], rtol=1e-9, atol=1e-12)


@given(shapes, seeds, variants)
def test_length_of_each_row_when_normalizing(
    shape: tuple[int, int, int], seed: int, variant: str
) -> None:
    z, local, shared, centroids = case(shape, seed)
    lengths = 10 ** (
        4 * torch.rand(*shape[:2], 1, dtype=torch.float64, generator=generator(seed)) - 2
    )
    values, gradient = run(z, local, shared, centroids, variant=variant)
    scaled, scaled_gradient = run(z * lengths, local, shared, centroids, variant=variant)
    torch.testing.assert_close(scaled, values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled_gradient * lengths, gradient, rtol=1e-6, atol=1e-8)
    # Without a component along the row, a step does not change its length.
    assert float((gradient * z).sum(dim=-1).abs().max()) < 1e-8


@given(shapes, seeds, variants)
def test_names_of_the_clusters(shape: tuple[int, int, int], seed: int, variant: str) -> None:
    z, local, shared, centroids = case(shape, seed)
    renamed_local = torch.randperm(K_LOCAL, generator=generator(seed))
    renamed = torch.randperm(K_GLOBAL, generator=generator(seed + 1))
    values, gradient = run(z, local, shared, centroids, variant=variant)
    moved = torch.empty_like(centroids)
    moved[:, renamed] = centroids
    other, other_gradient = run(z, renamed_local[local], renamed[shared], moved, variant=variant)
    torch.testing.assert_close(other, values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-6, atol=1e-8)


@given(shapes, seeds)
def test_gradient_of_distances_sums_to_zero_over_the_rows(
    shape: tuple[int, int, int], seed: int
) -> None:
    """Radii and avg_norm do not feel a shift of all raw features."""
    z, local, shared, _ = case(shape, seed)
    z.requires_grad_()
    c = dse_ext.dse_components(
        z,
        normalize=False,
        local_clusters=K_LOCAL,
        global_clusters=K_GLOBAL,
        group_images=GROUP,
        local_labels=local,
        global_labels=shared,
    )
    (gradient,) = torch.autograd.grad(c.m_intra_image + c.m_intra_batch + c.avg_norm, z)
    assert float(gradient.sum(dim=(0, 1)).abs().max()) < 1e-8


@given(shapes, seeds, variants)
def test_bounds(shape: tuple[int, int, int], seed: int, variant: str) -> None:
    c = dse_ext.dse_components(clustered(*shape, seed=seed), variant=variant)
    assert all(float(m) >= 0 for m in c[:5])
    b, n, d = shape
    if variant == "paper":
        assert 1 - 1e-9 <= c.m_dim.item() <= min(b * n, d) + 1e-9
    else:
        assert c.m_dim.item() <= 1 + 1e-9
    assert c.avg_norm.item() <= 1 + 1e-9  # unit rows


@given(shapes, seeds, st.booleans())
def test_effective_rank_of_a_scaled_and_turned_matrix(
    shape: tuple[int, int, int], seed: int, center: bool
) -> None:
    _, n, d = shape
    x = normal(n, d, seed=seed) + 1
    q = orthogonal(d, seed=seed)
    rank = dse_ext.effective_rank(x, center=center)
    torch.testing.assert_close(dse_ext.effective_rank(7e5 * x @ q, center=center), rank)
    assert 1 - 1e-9 <= float(rank) <= min(n - int(center), d) + 1e-9


# --- Repeatability -----------------------------------------------------------------------------


def everything(shape: tuple[int, int, int], dtype: torch.dtype, variant: str) -> list[Tensor]:
    z = clustered(*shape).to(dtype).requires_grad_()
    c = dse_ext.dse_components(z, variant=variant, generator=generator(3))
    (gradient,) = torch.autograd.grad(c.score(), z)
    norms = dse_ext.cluster_nuclear_norms(z, c.local_labels, 3)
    rank = dse_ext.effective_rank(z, center=True)
    (other,) = torch.autograd.grad(norms.sum() + rank.sum(), z)
    clusters = dse_ext.kmeans(z.detach(), 5, generator=generator(4))
    return [t.detach() for t in (*c, gradient, norms, rank, other, *clusters)]


REPEATED = [(9, 16, 24), (6, 100, 20), (2, 5, 130), (17, 49, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("shape", REPEATED)
def test_bitwise_the_same_whatever_the_number_of_threads(
    shape: tuple[int, int, int], variant: str, dtype: torch.dtype, restore_threads: None
) -> None:
    results = []
    for threads in (1, 2, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(everything(shape, dtype, variant))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_bitwise_the_same_at_a_realistic_size(restore_threads: None) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(everything((16, 196, 96), torch.float32, "regularizer"))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_properties import everything
digest = hashlib.sha256()
for tensor in everything((9, 49, 64), torch.float32, "regularizer"):
    digest.update(tensor.contiguous().numpy().tobytes())
print(torch.get_num_threads(), digest.hexdigest())
"""


def test_bitwise_the_same_in_processes_of_their_own() -> None:
    digests = {}
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment.pop("PYTEST_XDIST_WORKER", None)
        done = subprocess.run(
            [sys.executable, "-c", DIGEST, str(Path(__file__).parent)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        used, digests[threads] = done.stdout.split()
        assert used == threads
    assert digests["1"] == digests["2"]


def test_a_seed_gives_the_same_bits_again_and_another_seed_does_not() -> None:
    z = clustered(9, 49, 16).float()
    runs = [dse_ext.dse_components(z, generator=generator(s)) for s in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0].global_labels, runs[2].global_labels)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_an_image_s_clusters_do_not_depend_on_later_images(variant: str) -> None:
    """Draws are numbered by image and group, not by the order in which they are made."""
    z = clustered(16, 20, 12).float()
    whole = dse_ext.dse_components(z, variant=variant, generator=generator(1))
    first = dse_ext.dse_components(z[:8], variant=variant, generator=generator(1), normalize=True)
    assert torch.equal(whole.local_labels[:8], first.local_labels)
    assert torch.equal(whole.global_labels[:8], first.global_labels)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("variant", ["regularizer", "evaluation"])
def test_memory_does_not_grow_over_200_steps(variant: str) -> None:
    z = clustered(8, 49, 64).float().requires_grad_()
    leaked_if_kept = 200 * z.numel() * z.element_size()

    def step() -> None:
        z.grad = None
        dse_ext.dse_components(z, variant=variant).score().backward()
        dse_ext.kmeans(z.detach(), 3)
        dse_ext.effective_rank(z).sum().backward()

    for _ in range(20):
        step()
    gc.collect()
    before = resident_bytes()
    for _ in range(200):
        step()
    gc.collect()
    # One copy of z kept per step would be twenty megabytes.
    assert resident_bytes() - before < leaked_if_kept / 4
