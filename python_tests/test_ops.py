"""The operators as citizens of PyTorch: opcheck, compile, export, autocast, grad modes."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from features import clustered, generator, normal, random_labels
from torch import Tensor

import dse_ext

DIFFERENTIABLE = ("dse_components", "cluster_nuclear_norms", "effective_rank")


def seed(device: torch.device) -> Tensor:
    return torch.tensor([12345], dtype=torch.int64, device=device)


# --- opcheck -----------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "evaluation", "normalize": False},
        {"variant": "paper", "local_clusters": 2, "global_clusters": 5, "group_images": 2},
        {"max_kmeans_iters": 1, "tol": 0.1, "group_images": 100},
        {"save_for_backward": False},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "defaults",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_dse_components(
    dtype: torch.dtype, options: dict[str, object], requires_grad: bool, device: torch.device
) -> None:
    z = clustered(5, 9, 6).to(device, dtype).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.dse_ext.dse_components, (z, seed(device)), options)


@pytest.mark.parametrize("with_centroids", [True, False], ids=["centroids", "means"])
def test_opcheck_dse_components_with_given_clusters(
    with_centroids: bool, device: torch.device
) -> None:
    z = clustered(5, 9, 6).float().to(device).requires_grad_()
    options: dict[str, object] = {
        "local_clusters": 2,
        "global_clusters": 4,
        "group_images": 2,
        "local_labels": random_labels(5, 9, 2).to(device),
        "global_labels": random_labels(5, 9, 4).to(device),
    }
    if with_centroids:
        options["global_centroids"] = normal(3, 4, 6).float().to(device)
    torch.library.opcheck(torch.ops.dse_ext.dse_components, (z, seed(device)), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_opcheck_kmeans(k: int, dtype: torch.dtype, device: torch.device) -> None:
    x = normal(2, 20, 5).to(device, dtype)
    torch.library.opcheck(torch.ops.dse_ext.kmeans, (x, k, seed(device)))
    torch.library.opcheck(
        torch.ops.dse_ext.kmeans, (x, k, seed(device)), {"max_iters": 2, "tol": 1.0}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 20, 5), (2, 6, 9)])
def test_opcheck_cluster_nuclear_norms(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x = normal(*shape).to(device, dtype).requires_grad_()
    labels = torch.randint(3, shape[:2], generator=generator(0)).to(device)
    torch.library.opcheck(torch.ops.dse_ext.cluster_nuclear_norms, (x, labels, 3))


@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (2, 3, 5, 6)])
def test_opcheck_effective_rank(
    shape: tuple[int, ...], dtype: torch.dtype, center: bool, device: torch.device
) -> None:
    x = (normal(*shape) + 0.3).to(device, dtype).requires_grad_()
    torch.library.opcheck(torch.ops.dse_ext.effective_rank, (x,), {"center": center})


def test_opcheck_with_strided_inputs(device: torch.device) -> None:
    x = normal(4, 5, 6, 7).float().to(device).flatten(2).transpose(1, 2).requires_grad_()
    labels = random_labels(42, 4, 3).t().to(device)
    torch.library.opcheck(torch.ops.dse_ext.dse_components, (x, seed(device)))
    torch.library.opcheck(torch.ops.dse_ext.kmeans, (x.detach(), 3, seed(device)))
    torch.library.opcheck(torch.ops.dse_ext.cluster_nuclear_norms, (x, labels, 3))
    torch.library.opcheck(torch.ops.dse_ext.effective_rank, (x,))


# --- compile and export ------------------------------------------------------------------------


def given_clusters(z: Tensor) -> Tensor:
    """A score whose clusters follow from the shape, so that two runs can be compared."""
    b, n, _ = z.shape
    position = torch.arange(n, device=z.device)
    local, shared = (position % 3).expand(b, n), (position % 7).expand(b, n)
    return dse_ext.dse_components(
        z, local_labels=local, global_labels=shared, global_clusters=7
    ).score()


def value_and_gradient(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = function(z)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_with_a_dynamic_batch(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(given_clusters, fullgraph=True, dynamic=True, backend=backend)
    for batch in (5, 9, 12):
        z = clustered(batch, 9, 6).float().to(device)
        for a, b in zip(
            value_and_gradient(compiled, z), value_and_gradient(given_clusters, z), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_compile_does_not_specialize_on_the_batch(device: torch.device) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(given_clusters, fullgraph=True, backend=counter)
    for batch in (5, 9, 12, 17, 30):
        compiled(clustered(batch, 9, 6).float().to(device))
    assert counter.frame_count <= 2, "static once, dynamic once"


def test_compile_draws_fresh_seeds_from_torch_s_generator(device: torch.device) -> None:
    torch.compiler.reset()

    def clusters(z: Tensor) -> Tensor:
        return dse_ext.dse_components(z).global_labels

    compiled = torch.compile(clusters, fullgraph=True, backend="aot_eager")
    z = clustered(9, 16, 6).float().to(device)
    torch.manual_seed(3)
    first, second = compiled(z), compiled(z)
    torch.manual_seed(3)
    again = compiled(z)
    assert torch.equal(first, again)
    assert not torch.equal(first, second), "the seed became a constant of the graph"


def test_compile_the_regularizer_in_a_training_step(device: torch.device) -> None:
    torch.compiler.reset()
    layer = torch.nn.Linear(6, 6).to(device)
    regularizer = dse_ext.DSERegularizer(weight=0.1)

    def loss(z: Tensor) -> Tensor:
        return layer(z).square().mean() + regularizer(layer(z))

    compiled = torch.compile(loss, backend="aot_eager")
    compiled(clustered(5, 9, 6).float().to(device)).backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isfinite().all())
    assert float(layer.weight.grad.norm()) > 0


def test_compile_the_spectral_functions(device: torch.device) -> None:
    torch.compiler.reset()

    def total(x: Tensor) -> Tensor:
        labels = torch.arange(x.shape[1], device=x.device).remainder(3).expand(x.shape[:2])
        norms = dse_ext.cluster_nuclear_norms(x, labels, 3)
        return norms.sum() + dse_ext.effective_rank(x, center=True).sum()

    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(2, 9, 5), (3, 12, 5)]:
        x = normal(*shape).to(device)
        for a, b in zip(value_and_gradient(compiled, x), value_and_gradient(total, x), strict=True):
            torch.testing.assert_close(a, b)


def test_export_with_a_dynamic_batch(device: torch.device) -> None:
    class Score(torch.nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return given_clusters(z)

    # From two groups on: torch.export takes a size that may be 1 for another program.
    batch = torch.export.Dim("batch", min=3, max=64)
    z = clustered(6, 9, 6).float().to(device)
    program = torch.export.export(Score(), (z,), dynamic_shapes={"z": {0: batch}})
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "dse_ext.dse_components.default" in targets, targets
    for size in (6, 11):
        z = clustered(size, 9, 6).float().to(device)
        torch.testing.assert_close(program.module()(z), given_clusters(z))


def test_export_survives_saving(tmp_path, device: torch.device) -> None:
    class Rank(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dse_ext.effective_rank(x)

    x = normal(2, 9, 6).to(device)
    torch.export.save(torch.export.export(Rank(), (x,)), tmp_path / "rank.pt2")
    loaded = torch.export.load(tmp_path / "rank.pt2").module()
    torch.testing.assert_close(loaded(x), dse_ext.effective_rank(x))


# --- transforms and modes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda z: dse_ext.dse_components(z).score(),
        lambda z: dse_ext.kmeans(z, 3)[2],
        lambda z: dse_ext.effective_rank(z),
        lambda z: dse_ext.cluster_nuclear_norms(
            z, torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device), 1
        ),
    ],
    ids=["dse_components", "kmeans", "effective_rank", "cluster_nuclear_norms"],
)
def test_vmap_works_or_says_that_it_is_unsupported(
    function: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    stack = torch.stack([clustered(4, 9, 5, seed=s) for s in range(3)]).to(device)
    try:
        mapped = torch.func.vmap(function, randomness="different")(stack)
    except RuntimeError as error:
        message = str(error).lower()
        assert "vmap" in message or "batching rule" in message, message
    else:
        looped = torch.stack([function(z) for z in stack])
        assert mapped.shape == looped.shape
        torch.testing.assert_close(mapped, looped, rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: dse_ext.dse_components(z).score(),
        lambda z: dse_ext.effective_rank(z).sum(),
        lambda z: dse_ext.cluster_nuclear_norms(
            z, torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device), 1
        ).sum(),
    ],
    ids=DIFFERENTIABLE,
)
def test_double_backward_is_refused_and_never_silently_zero(
    function: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    z = normal(4, 9, 5).to(device).requires_grad_()

    def twice() -> Tensor:
        (gradient,) = torch.autograd.grad(function(z), z, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), z)[0]

    with pytest.raises(RuntimeError, match=r"(?i)dse_ext|double backward|twice|second|once_diff"):
        twice()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_values_are_the_same(mode, device: torch.device) -> None:
    z = clustered(9, 16, 6).float().to(device)
    expected = dse_ext.dse_components(z.clone().requires_grad_(), generator=generator(0))
    with mode():
        c = dse_ext.dse_components(z, generator=generator(0))
        assert not c.score().requires_grad
        rank = dse_ext.effective_rank(z)
        norms = dse_ext.cluster_nuclear_norms(z, c.local_labels, 3)
    torch.testing.assert_close(torch.stack(c[:5]), torch.stack(expected[:5]).detach())
    assert torch.equal(c.global_labels, expected.global_labels)
    torch.testing.assert_close(rank, dse_ext.effective_rank(z.requires_grad_()).detach())
    torch.testing.assert_close(
        norms.clone(), dse_ext.cluster_nuclear_norms(z, c.local_labels.clone(), 3).detach()
    )


def test_an_input_that_needs_no_gradient_gives_none(device: torch.device) -> None:
    z = clustered(4, 9, 6).float().to(device)
    assert not dse_ext.dse_components(z).score().requires_grad
    assert not dse_ext.effective_rank(z).requires_grad


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(
    dtype: torch.dtype, autocast_dtype: torch.dtype, device: torch.device
) -> None:
    z = clustered(9, 16, 6).to(device, dtype).requires_grad_()
    expected = dse_ext.dse_components(z, generator=generator(0))
    (expected_g,) = torch.autograd.grad(expected.score(), z)
    with torch.autocast(device.type, dtype=autocast_dtype):
        c = dse_ext.dse_components(z, generator=generator(0))
        score = c.score()
        rank = dse_ext.effective_rank(z)
    (gradient,) = torch.autograd.grad(score, z)
    assert score.dtype == rank.dtype == torch.float32
    torch.testing.assert_close(torch.stack(c[:5]), torch.stack(expected[:5]), rtol=1e-6, atol=0)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_g)


def test_backward_twice_through_a_retained_graph_is_the_same(device: torch.device) -> None:
    z = clustered(9, 16, 6).to(device).requires_grad_()
    score = dse_ext.dse_components(z).score()
    (first,) = torch.autograd.grad(score, z, retain_graph=True)
    (second,) = torch.autograd.grad(score, z)
    assert torch.equal(first, second)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_backward_without_saved_matrices_recomputes_them(
    variant: str, device: torch.device
) -> None:
    z = clustered(9, 16, 6).to(device).requires_grad_()
    gradients = []
    for save in (True, False):
        outputs = torch.ops.dse_ext.dse_components(
            z, seed(device), variant, group_images=4, save_for_backward=save
        )
        assert (sum(t.numel() for t in outputs[8:]) > 0) == save
        gradients.append(torch.autograd.grad(sum(outputs[:5]), z)[0])
    torch.testing.assert_close(*gradients)


def test_other_ops_without_saved_matrices_recompute_them(device: torch.device) -> None:
    x = normal(3, 12, 5).to(device).requires_grad_()
    labels = random_labels(3, 12, 4).to(device)
    gradients = []
    for save in (True, False):
        norms = torch.ops.dse_ext.cluster_nuclear_norms(x, labels, 4, save)
        rank = torch.ops.dse_ext.effective_rank(x, True, save)
        assert (norms[1].numel() > 0) == (rank[1].numel() > 0) == save
        gradients.append(torch.autograd.grad(norms[0].sum() + rank[0].sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_changing_the_input_before_backward_is_noticed(device: torch.device) -> None:
    leaf = clustered(4, 9, 6).to(device).requires_grad_()
    z = leaf * 1
    score = dse_ext.dse_components(z).score()
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()


def test_gradients_accumulate_and_flow_on(device: torch.device) -> None:
    layer = torch.nn.Linear(6, 6).double().to(device)
    z = clustered(4, 9, 6).to(device)
    labels = random_labels(4, 9, 3).to(device)
    options = {"local_labels": labels, "global_labels": labels, "global_clusters": 3}
    for _ in range(2):
        dse_ext.dse_components(layer(z), **options).score().backward()
    assert layer.weight.grad is not None
    twice = layer.weight.grad.clone()
    layer.weight.grad = None
    dse_ext.dse_components(layer(z), **options).score().backward()
    torch.testing.assert_close(twice, 2 * layer.weight.grad)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_components_may_be_weighted_by_tensors(variant: str, device: torch.device) -> None:
    """Upstream gradients arrive as any float: here float64 into float32, and a broadcast one."""
    z = clustered(4, 9, 6).float().to(device).requires_grad_()
    c = dse_ext.dse_components(z, variant=variant)
    weights = torch.tensor([2.0, 3.0], dtype=torch.float64, device=device)
    (gradient,) = torch.autograd.grad((weights * c.m_inter).sum(), z, retain_graph=True)
    (single,) = torch.autograd.grad(c.m_inter, z)
    torch.testing.assert_close(gradient, 5 * single)
