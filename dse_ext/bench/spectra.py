"""`cluster_nuclear_norms` and `effective_rank` beside `torch.linalg` and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dse_ext
from dse_ext.bench import batched_torch
from dse_ext.bench.case import DTYPES, Case
from dse_ext.bench.clustering import rows
from dse_ext.bench.compiled import compiled
from dse_ext.bench.inputs import make_features
from dse_ext.bench.operation import (
    GRAM_REMARK,
    OURS,
    Agreement,
    Contestant,
    Implementation,
    Operation,
    gradient_tolerance,
    relative,
    value_tolerance,
)
from dse_ext.bench.regularizers import wide

__all__ = ["CLUSTER_NUCLEAR_NORMS", "EFFECTIVE_RANK"]

Function = Callable[[Tensor], Any]
"""Of a case's input; a tensor, or plain numbers where there is no gradient."""

Maker = Callable[[Case, Tensor], Function]
"""Makes the function for a case; the input is there to prepare what depends on it."""


def _contestant(make: Maker, case: Case, x: Tensor) -> Contestant:
    function = make(case, x)
    leaf = x.detach().clone().requires_grad_(case.mode == "training")

    def reset(seed: int) -> None:
        leaf.grad = None

    def step() -> Any:
        if case.mode == "forward":
            with torch.no_grad():
                return function(leaf)
        result = function(leaf)
        result.sum().backward()
        return result.detach()

    return Contestant(reset, step, lambda: leaf.grad)


def _compare(make: Maker, ours: Maker, gram: bool, case: Case, x: Tensor) -> list[Agreement]:
    found = []
    for maker in (make, ours):
        contestant = _contestant(maker, case, x)
        value = torch.as_tensor(contestant.step(), device=x.device)
        found.append((value, contestant.gradient()))
    (value, gradient), (our_value, our_gradient) = found
    agreements = [Agreement("values", relative(value, our_value), value_tolerance(case))]
    if gradient is not None and our_gradient is not None:
        difference = relative(gradient, our_gradient)
        agreements.append(Agreement("gradient", difference, gradient_tolerance(case, gram)))
    return agreements


def _peer(
    title: str, make: Maker, ours: Maker, *, gram: bool = False, **options: Any
) -> Implementation:
    return Implementation(
        title,
        lambda case, x: _contestant(make, case, x),
        lambda case, x: _compare(make, ours, gram, case, x),
        **options,
    )


# --- nuclear norms --------------------------------------------------------------------------------


def _labels(case: Case, x: Tensor) -> Tensor:
    """The clusters that k-means finds, always the same."""
    return dse_ext.kmeans(x, case.clusters, generator=torch.Generator().manual_seed(0)).labels


def _our_norms(case: Case, x: Tensor) -> Function:
    labels = _labels(case, x)
    return lambda leaf: dse_ext.cluster_nuclear_norms(leaf, labels, case.clusters)


def _norms_by(singular_values: Callable[[Tensor], Tensor]) -> Maker:
    def make(case: Case, x: Tensor) -> Function:
        labels, k = _labels(case, x), case.clusters
        return lambda leaf: batched_torch.cluster_nuclear_norms(
            wide(leaf), labels, k, singular_values
        )[0]

    return make


def _compiled_norms(case: Case, x: Tensor) -> Function:
    labels, k = _labels(case, x), case.clusters
    function = compiled(batched_torch.cluster_nuclear_norms)
    return lambda leaf: function(wide(leaf), labels, k)[0]


def _scipy_norms(case: Case, x: Tensor) -> Function:
    import scipy.linalg

    labels = _labels(case, x)

    def function(leaf: Tensor) -> list[list[float]]:
        norms = []
        for points, own in zip(wide(leaf), labels, strict=True):
            clusters = [points[own == c] for c in range(case.clusters)]
            norms.append(
                [
                    scipy.linalg.svdvals((c - c.mean(dim=0)).numpy(), check_finite=False).sum()
                    if len(c) > 1
                    else 0.0
                    for c in clusters
                ]
            )
        return norms

    return function


CLUSTER_NUCLEAR_NORMS = Operation(
    name="cluster_nuclear_norms",
    axes="(G, n, d): sets, rows, features",
    inputs=rows,
    implementations={
        OURS: Implementation("dse-ext", lambda case, x: _contestant(_our_norms, case, x)),
        "svdvals": _peer("batched svdvals", _norms_by(torch.linalg.svdvals), _our_norms),
        "eigvalsh": _peer(
            "batched Gram, eigvalsh",
            _norms_by(batched_torch.gram_singular_values),
            _our_norms,
            gram=True,
            remark=GRAM_REMARK,
        ),
        "scipy": _peer(
            "scipy svdvals",
            _scipy_norms,
            _our_norms,
            needs=("scipy", "scipy"),
            modes=("forward",),
            on_gpu=False,
            remark="a Python loop over the clusters",
        ),
        "compiled": _peer(
            "Gram, eigvalsh, torch.compile", _compiled_norms, _our_norms, gram=True, compiled=True
        ),
    },
    modes=("training", "forward"),
    bytes_per_value=72,
)


# --- effective rank -------------------------------------------------------------------------------


def _matrix(case: Case) -> Tensor:
    """Features of images of 196 positions as one matrix `(M, d)`."""
    count, dim = case.shape
    images = -(-count // 196)
    shape = (images, -(-count // images), dim)
    features = make_features(case.kind, shape).flatten(0, 1)[:count]
    return features.to(case.device, DTYPES[case.dtype])


def _our_rank(case: Case, x: Tensor) -> Function:
    return dse_ext.effective_rank


def _rank_by(singular_values: Callable[[Tensor], Tensor]) -> Maker:
    return lambda case, x: lambda leaf: batched_torch.effective_rank(wide(leaf), singular_values)


def _eigh_in_float64(matrices: Tensor) -> Tensor:
    n, dim = matrices.shape[1:]
    m = matrices.double()
    gram = torch.bmm(m, m.mT) if n <= dim else torch.bmm(m.mT, m)
    sigma: Tensor = torch.linalg.eigh(gram).eigenvalues.clamp(min=1e-300).sqrt()
    return sigma


def _compiled_rank(case: Case, x: Tensor) -> Function:
    function = compiled(batched_torch.effective_rank)
    return lambda leaf: function(wide(leaf))


def _scipy_rank(case: Case, x: Tensor) -> Function:
    import numpy as np
    import scipy.linalg

    def function(leaf: Tensor) -> float:
        sigma = scipy.linalg.svdvals(wide(leaf).numpy(), check_finite=False)
        p = sigma[sigma > 0] / sigma.sum()
        return float(np.exp(-(p * np.log(p)).sum()))

    return function


EFFECTIVE_RANK = Operation(
    name="effective_rank",
    axes="(M, d): rows, features",
    inputs=_matrix,
    implementations={
        OURS: Implementation("dse-ext", lambda case, x: _contestant(_our_rank, case, x)),
        "svdvals": _peer("svdvals", _rank_by(torch.linalg.svdvals), _our_rank),
        "eigvalsh": _peer(
            "Gram, eigvalsh",
            _rank_by(batched_torch.gram_singular_values),
            _our_rank,
            gram=True,
            remark=GRAM_REMARK,
        ),
        "eigh": _peer("float64 Gram, eigh", _rank_by(_eigh_in_float64), _our_rank),
        "scipy": _peer(
            "scipy svdvals",
            _scipy_rank,
            _our_rank,
            needs=("scipy", "scipy"),
            modes=("forward",),
            on_gpu=False,
        ),
        "compiled": _peer(
            "Gram, eigvalsh, torch.compile", _compiled_rank, _our_rank, gram=True, compiled=True
        ),
    },
    modes=("training", "forward"),
    bytes_per_value=72,
)
