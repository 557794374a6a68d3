"""One binary, many torches: what of torch the built libraries lean on, each thing once.

``make test-abi`` runs this file under two versions of torch with the same libraries; the rest of
the suite runs under the newest alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import parity
import pytest
import torch
from torch import Tensor

import dse_ext
from dse_ext import _C

ops = torch.ops.dse_ext
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def features(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def seed(value: int = 7) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def saved_outputs(z: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(ops.dse_components(z, seed(), global_clusters=6))


def components_backward_arguments() -> tuple[object, ...]:
    z = features(5, 12, 6)
    outputs = saved_outputs(z)
    upstream = torch.ones(5, dtype=torch.float64)
    return (upstream, z, *outputs[5:], "regularizer", 3, 2, True)


def norms_backward_arguments() -> tuple[object, ...]:
    x, labels = features(2, 9, 4), torch.randint(3, (2, 9))
    norms, *saved = ops.cluster_nuclear_norms(x, labels, 3)
    return (torch.ones_like(norms), x, labels, *saved)


def rank_backward_arguments() -> tuple[object, ...]:
    x = features(3, 8, 5)
    ranks, *saved = ops.effective_rank(x)
    return (torch.ones_like(ranks), x, *saved, False)


CALLS: dict[str, Callable[[], tuple[object, ...]]] = {
    "dse_components": lambda: (features(5, 12, 6, grad=True), seed(), "regularizer", 3, 6),
    "kmeans": lambda: (features(2, 20, 4), 3, seed()),
    "cluster_nuclear_norms": lambda: (features(2, 9, 4, grad=True), torch.randint(3, (2, 9)), 3),
    "effective_rank": lambda: (features(3, 8, 5, grad=True),),
    "dse_components_backward": components_backward_arguments,
    "cluster_nuclear_norms_backward": norms_backward_arguments,
    "effective_rank_backward": rank_backward_arguments,
}


def test_every_operator_is_listed() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if "dse_ext::" in name}
    registered.discard("dse_ext::cuda_plan")  # of the CUDA library; it computes nothing
    assert registered == {f"dse_ext::{name}" for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    arguments = CALLS[name]()
    results = torch.library.opcheck(getattr(ops, name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["regularizer", "evaluation", "paper"])
def test_components_and_gradient_match_the_oracle(variant: str, dtype: torch.dtype) -> None:
    z = features(5, 16, 10, dtype=dtype)
    options = {"variant": variant, "group_images": 2}
    ours, found = parity.library(z, parity.MIXED, global_clusters=6, **options)
    limit = parity.tolerance(dtype)
    # Which positions the evaluation variant pairs is drawn inside the operator.
    skip = ("m_dim",) if variant == "evaluation" else ()
    expected = parity.reference(z, parity.MIXED, found.local_labels, found.global_labels, **options)
    parity.assert_components(ours, expected, limit.component, skip)
    if not skip:
        parity.assert_gradient(ours.gradient, expected.gradient, limit.gradient)


def test_spectral_operators_match_the_oracle() -> None:
    x, labels = features(2, 15, 6), torch.randint(4, (2, 15))
    norms = dse_ext.cluster_nuclear_norms(x, labels, 4)
    expected = oracle.cluster_nuclear_norms(x, labels, 4)
    torch.testing.assert_close(norms, expected, rtol=1e-9, atol=1e-12)
    ranks = dse_ext.effective_rank(x)
    expected = torch.stack([oracle.effective_rank(matrix) for matrix in x])
    torch.testing.assert_close(ranks, expected, rtol=1e-9, atol=0.0)


def test_kmeans_labels_name_the_nearest_centroid() -> None:
    x = features(2, 40, 5)
    centroids, labels, inertia = dse_ext.kmeans(x, 4)
    squares = torch.cdist(x, centroids).square()
    torch.testing.assert_close(labels, squares.argmin(-1))
    torch.testing.assert_close(inertia, squares.amin(-1).sum(-1))


def test_gradcheck() -> None:
    z = features(3, 8, 5, grad=True)
    found = dse_ext.dse_components(z, global_clusters=4, local_clusters=2)

    def score(z: Tensor) -> Tensor:
        clusters = {"local_labels": found.local_labels, "global_labels": found.global_labels}
        c = dse_ext.dse_components(
            z, global_clusters=4, local_clusters=2, global_centroids=found.global_centroids,
            **clusters,
        )  # fmt: skip
        return c.score()

    assert torch.autograd.gradcheck(score, (z,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str) -> None:
    z = features(4, 16, 8, dtype=torch.float32)

    def score(x: Tensor, seed: Tensor) -> Tensor:
        c = ops.dse_components(x * 2, seed, "regularizer", 3, 6)
        return c[0] + c[3] - (c[1] + c[2]) / 2

    def with_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = z.clone().requires_grad_()
        value = function(x, seed())
        return value.detach(), torch.autograd.grad(value, x)[0]

    torch._dynamo.reset()
    compiled = torch.compile(score, fullgraph=True, backend=backend)
    for ours, expected in zip(with_gradient(compiled), with_gradient(score), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_threads_do_not_change_the_bits() -> None:
    z = features(6, 30, 12, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.dse_components(z, seed())[:8])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_an_operator_s_error_reaches_python_with_its_message() -> None:
    with pytest.raises(RuntimeError, match=r"z must have shape \(B, N, d\), got \(2, 3\)"):
        ops.dse_components(features(2, 3), seed())


def test_the_python_module_loads_and_computes() -> None:
    array = np.random.default_rng(0).normal(size=(4, 12, 6)).astype(np.float32)
    found = _C.dse_components(array, global_clusters=6, seed=5)
    expected = ops.dse_components(torch.from_numpy(array), seed(5), "regularizer", 3, 6)
    for value, tensor in zip(found.values(), expected, strict=False):
        np.testing.assert_array_equal(value, tensor.numpy())
    assert _C.build_info()["torch_abi"] == "2.11"
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        _C.kmeans(array, 0)
