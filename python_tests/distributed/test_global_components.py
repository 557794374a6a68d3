"""Two ranks give what one process gives on the concatenated batch."""

from __future__ import annotations

import features
import parity
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dse_ext
from dse_ext.distributed import global_dse_components, resolve_group

LOCAL, GLOBAL, GROUP = 3, 6, 2


def labels(b: int, n: int) -> dict[str, Tensor]:
    return {
        "local_labels": features.random_labels(b, n, LOCAL, seed=1),
        "global_labels": features.random_labels(b, n, GLOBAL, seed=2),
    }


def share(rank: int, sizes: tuple[int, ...]) -> slice:
    begin = sum(sizes[:rank])
    return slice(begin, begin + sizes[rank])


def check(
    rank: int,
    z: Tensor,
    sizes: tuple[int, ...],
    component_limit: float,
    gradient_limit: float,
    normalize: bool = True,
) -> None:
    """Compares a rank's part with the whole batch, for a mixture of the five components."""
    given = labels(*z.shape[:2])
    options = {
        "local_clusters": LOCAL,
        "global_clusters": GLOBAL,
        "group_images": GROUP,
        "normalize": normalize,
    }
    expected, _ = parity.library(z, parity.MIXED, **options, **given)
    mine = share(rank, sizes)
    part = z[mine].clone().requires_grad_()
    ours = global_dse_components(
        part, "world", **options, **{name: value[mine] for name, value in given.items()}
    )
    parity.weighted(tuple(ours[:5]), parity.MIXED).backward()
    assert part.grad is not None
    assert part.grad.dtype == part.dtype
    assert ours.m_dim.dtype == expected.components[3].dtype
    parity.assert_components(
        parity.Result(tuple(c.detach() for c in ours[:5]), part.grad), expected, component_limit
    )
    # A rank's gradient is len(sizes) times its rows' share of the global one: for DDP's mean. The
    # error is measured against the whole gradient, of which a rank may hold a small part.
    whole = expected.gradient.double()
    error = (part.grad.double() / len(sizes) - whole[mine]).norm() / whole.norm()
    assert error <= gradient_limit, f"gradient error {error:.3g}"


@pytest.mark.parametrize("cloud", sorted(features.CLOUDS))
@pytest.mark.parametrize("normalize", [True, False])
def test_float64(rank: int, cloud: str, normalize: bool) -> None:
    z = features.CLOUDS[cloud](8, 9, 16)
    # The gradient's own condition: σ below 1e-13 of the largest in the collapsed clouds.
    check(rank, z, (4, 4), 1e-9, 1e-7 if cloud in features.COLLAPSED else 1e-9, normalize)


@pytest.mark.parametrize("sizes", [(2, 6), (6, 3), (4, 1)], ids=str)
def test_batches_of_unequal_size(rank: int, sizes: tuple[int, int]) -> None:
    check(rank, features.clustered(sum(sizes), 7, 12), sizes, 1e-9, 1e-9)


@pytest.mark.parametrize(
    "cloud", ["fewer rows than features", "dead features", "one position", "steep"]
)
def test_spectra_that_a_gram_matrix_loses(rank: int, cloud: str) -> None:
    z = features.random(4, 5, 40)
    if cloud == "dead features":
        z = features.random(8, 9, 16)
        z[:, :, ::3] = 0
    if cloud == "one position":
        z = features.random(4, 1, 3)
    if cloud == "steep":
        z = features.random(8, 9, 16) * torch.logspace(0, -7, 16, dtype=torch.float64)
    check(rank, z, (z.shape[0] // 2,) * 2, 1e-9, 1e-7)


@pytest.mark.parametrize(
    ("dtype", "component", "gradient"),
    [(torch.float32, 1e-5, 1e-3), (torch.bfloat16, 1e-3, 1e-2), (torch.float16, 1e-3, 1e-2)],
    ids=str,
)
def test_lower_precision(rank: int, dtype: torch.dtype, component: float, gradient: float) -> None:
    z = features.clustered(8, 16, 24)
    check(rank, z.to(dtype), (4, 4), component, gradient)


def test_rows_that_are_all_equal_or_zero(rank: int) -> None:
    for z in (torch.ones(4, 5, 6, dtype=torch.float64) / 3, torch.zeros(4, 5, 6)):
        part = z[:2].clone().requires_grad_()
        ours = global_dse_components(part, "world")
        ours.score().backward()
        assert part.grad is not None
        assert part.grad.isfinite().all()
        alone = dse_ext.dse_components(z)
        torch.testing.assert_close(torch.stack(ours[:5]), torch.stack(alone[:5]))


def test_clusters_of_k_means(rank: int, world: int) -> None:
    """The regularizer on two ranks is the one of one process with the labels that they found."""
    z = features.clustered(8, 9, 16)
    part = z[share(rank, (4, 4))].clone().requires_grad_()
    regularizer = dse_ext.DSERegularizer(
        weight=0.5, local_clusters=3, global_clusters=6, group_images=2, dim_weight=0.7,
        process_group="world", generator=torch.Generator().manual_seed(rank),
    )  # fmt: skip
    loss = regularizer(part)
    loss.backward()
    last = regularizer.last
    assert last is not None
    gathered = {}
    for name in ("local_labels", "global_labels", "global_centroids"):
        parts = [torch.empty_like(getattr(last, name)) for _ in range(world)]
        dist.all_gather(parts, getattr(last, name).contiguous())
        gathered[name] = torch.cat(parts)
    whole = z.clone().requires_grad_()
    expected = dse_ext.dse_components(
        whole, local_clusters=3, global_clusters=6, group_images=2, **gathered
    )
    (-0.5 * expected.score(0.7)).backward()
    torch.testing.assert_close(loss, -0.5 * expected.score(0.7), rtol=1e-9, atol=0)
    assert part.grad is not None
    assert whole.grad is not None
    mine = whole.grad[share(rank, (4, 4))]
    assert parity.relative_error(part.grad / world, mine) <= 1e-9


def test_one_rank_is_one_process(rank: int) -> None:
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    z = features.clustered(4, 9, 16, seed=rank)
    results = []
    for group in (None, groups[rank]):
        part = z.clone().requires_grad_()
        regularizer = dse_ext.DSERegularizer(
            process_group=group, generator=torch.Generator().manual_seed(3)
        )
        value = regularizer(part)
        value.backward()
        assert part.grad is not None
        results.append((value.detach(), part.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_features_that_are_not_finite_on_one_rank_are_felt_on_all(rank: int) -> None:
    z = features.clustered(4, 9, 16, seed=rank)
    if rank == 0:
        z[1, 2, 3] = torch.nan
    z.requires_grad_()
    components = global_dse_components(z, "world")
    components.score().backward()
    assert z.grad is not None
    assert torch.stack(components[:5]).isnan().all()
    assert z.grad.isnan().all()


def test_a_rank_that_raises_keeps_nobody_waiting(rank: int) -> None:
    z = features.clustered(4, 9, 16)
    if rank == 1:
        with pytest.raises(ValueError, match=r"z must have shape \(B, N, d\), got \(4, 9\)"):
            global_dse_components(z[:, :, 0], "world")
    else:
        with pytest.raises(RuntimeError, match=r"rank 1 .* ValueError: z must have shape"):
            global_dse_components(z, "world")
    regularizer = dse_ext.DSERegularizer(process_group="world")
    if rank == 0:
        with pytest.raises(ValueError, match="no empty axis"):
            regularizer(z[:0])
    else:
        with pytest.raises(RuntimeError, match=r"rank 0 .* no empty axis"):
            regularizer(z)
    # And the next step works.
    assert regularizer(z).isfinite()


def test_ranks_have_to_agree_on_the_number_of_features(rank: int) -> None:
    with pytest.raises(RuntimeError, match=r"same number of features on all ranks, got \[8, 16\]"):
        global_dse_components(features.random(2, 4, 8 * (rank + 1)), "world")


def test_a_group_without_this_process(rank: int) -> None:
    group = dist.new_group([0])
    z = features.random(2, 4, 8)
    if rank == 0:
        assert global_dse_components(z, group).m_dim > 0
    else:
        with pytest.raises(RuntimeError, match="must contain this process"):
            resolve_group(group)


def test_names_of_groups() -> None:
    with pytest.raises(ValueError, match="'world' or None, got 'all'"):
        dse_ext.DSERegularizer(process_group="all")
    with pytest.raises(ValueError, match="got int"):
        resolve_group(3)


def test_a_compiled_step_is_cut_at_the_communication(rank: int) -> None:
    z = features.clustered(4, 9, 16, seed=rank)
    regularizer = dse_ext.DSERegularizer(process_group="world")

    def objective(x: Tensor) -> Tensor:
        return regularizer(2 * x) + x.square().mean()

    results = []
    for function in (objective, torch.compile(objective, backend="aot_eager")):
        regularizer.generator = torch.Generator().manual_seed(rank)
        part = z.clone().requires_grad_()
        value = function(part)
        value.backward()
        assert part.grad is not None
        results.append((value.detach(), part.grad))
    torch.testing.assert_close(results[0], results[1])
