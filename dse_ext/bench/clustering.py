"""`kmeans` beside batched PyTorch, scikit-learn and faiss, with the same k, iterations and stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dse_ext
from dse_ext.bench import batched_torch
from dse_ext.bench.case import DTYPES, Case
from dse_ext.bench.compiled import compiled
from dse_ext.bench.inputs import make_features
from dse_ext.bench.operation import OURS, Agreement, Contestant, Implementation, Operation
from dse_ext.bench.regularizers import wide

__all__ = ["ITERATIONS", "KMEANS", "TOLERANCE", "inertia", "rows"]

ITERATIONS = 20
"""Lloyd iterations at most."""

TOLERANCE = 1e-4
"""Frobenius norm of the centroids' shift at which k-means stops."""

_INERTIA_TOLERANCE = 0.05

Clusterer = Callable[[int], Any]
"""Clusters a case's sets of rows from a seed, and returns the centroids `(G, k, d)`."""


def rows(case: Case) -> Tensor:
    """Sets of rows `(G, n, d)` of a case."""
    sets, count, dim = case.shape
    return make_features(case.kind, (sets, count, dim)).to(case.device, DTYPES[case.dtype])


def inertia(x: Tensor, centroids: Tensor) -> Tensor:
    """Sum of squared distances of rows `(G, n, d)` to the nearest centroid `(G, k, d)`, float64."""
    distances = torch.cdist(
        x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.amin(dim=2).square().sum()


def _contestant(cluster: Clusterer) -> Contestant:
    seeds = [0]

    def reset(seed: int) -> None:
        seeds[0] = seed

    return Contestant(reset, lambda: cluster(seeds[0]))


def _ours(case: Case, x: Tensor) -> Clusterer:
    def cluster(seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        return dse_ext.kmeans(x, case.clusters, ITERATIONS, TOLERANCE, generator).centroids

    return cluster


def _batched(case: Case, x: Tensor) -> Clusterer:
    return _of_torch(batched_torch.kmeans, case, x)


def _compiled(case: Case, x: Tensor) -> Clusterer:
    return _of_torch(compiled(batched_torch.kmeans), case, x)


def _of_torch(kmeans: Callable[..., tuple[Tensor, Tensor]], case: Case, x: Tensor) -> Clusterer:
    def cluster(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return kmeans(wide(x), case.clusters, (ITERATIONS, TOLERANCE))[0]

    return cluster


def _sklearn(case: Case, x: Tensor) -> Clusterer:
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    sets = [part.numpy() for part in wide(x)]
    # It stops where the squared shift is below tol times the mean variance of a feature.
    tolerances = [TOLERANCE**2 / max(float(part.var(axis=0).mean()), 1e-30) for part in sets]
    k = min(case.clusters, case.shape[1])

    def cluster(seed: int) -> Any:
        centroids = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for part, tol in zip(sets, tolerances, strict=True):
                model = KMeans(
                    k, init="k-means++", n_init=1, max_iter=ITERATIONS, tol=tol, random_state=seed
                )
                centroids.append(model.fit(part).cluster_centers_)
        return np.stack(centroids)

    return cluster


def _faiss(case: Case, x: Tensor) -> Clusterer:
    import faiss
    import numpy as np

    sets = [part.float().numpy() for part in x]
    _, count, dim = case.shape
    options: dict[str, Any] = {
        "niter": ITERATIONS,
        "min_points_per_centroid": 1,  # no warnings about few rows
        "max_points_per_centroid": count,  # all rows, no sample of them
    }
    if hasattr(faiss, "ClusteringInitMethod_KMEANS_PLUS_PLUS"):
        options["init_method"] = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS

    def cluster(seed: int) -> Any:
        centroids: list[Any] = []
        for part in sets:
            model = faiss.Kmeans(dim, min(case.clusters, count), seed=seed + 1, **options)
            model.train(part)
            model.assign(part)
            centroids.append(model.centroids)
        return np.stack(centroids)

    return cluster


def _seeds(case: Case) -> int:
    """So many that local optima average out; small problems need more of them."""
    sets, count, _ = case.shape
    return min(max(6000 // (sets * count), 2), 40)


def _compare(make: Callable[[Case, Tensor], Clusterer], case: Case, x: Tensor) -> list[Agreement]:
    """Draws differ, so what is compared is how good the clusters are, over all sets and seeds."""
    theirs, ours = make(case, x), _ours(case, x)
    total = {"theirs": 0.0, "ours": 0.0}
    seeds = _seeds(case)
    for seed in range(seeds):
        found = torch.as_tensor(theirs(seed), device=x.device)
        total["theirs"] += inertia(x, found).item()
        total["ours"] += inertia(x, ours(seed)).item()
    difference = abs(total["theirs"] - total["ours"]) / max(total["ours"], 1e-300)
    return [Agreement(f"inertia over {seeds} seeds", difference, _INERTIA_TOLERANCE)]


def _implementation(
    title: str, make: Callable[[Case, Tensor], Clusterer], **options: Any
) -> Implementation:
    return Implementation(
        title,
        lambda case, x: _contestant(make(case, x)),
        lambda case, x: _compare(make, case, x),
        modes=("forward",),
        **options,
    )


KMEANS = Operation(
    name="kmeans",
    axes="(G, n, d): sets, rows, features",
    inputs=rows,
    implementations={
        OURS: Implementation(
            "dse-ext", lambda case, x: _contestant(_ours(case, x)), modes=("forward",)
        ),
        "batched": _implementation("batched PyTorch", _batched),
        "sklearn": _implementation(
            "scikit-learn",
            _sklearn,
            needs=("sklearn", "scikit-learn"),
            on_gpu=False,
            remark="a Python loop over the sets; each k-means++ seed is the best of several draws",
        ),
        "faiss": _implementation(
            "faiss",
            _faiss,
            needs=("faiss", "faiss-cpu"),
            on_gpu=False,
            remark="a Python loop over the sets, in float32; always all iterations, since it "
            "has no tolerance of this kind; k-means++ seeds, random ones in older versions",
        ),
        "compiled": _implementation("batched, torch.compile", _compiled, compiled=True),
    },
    modes=("forward",),
    bytes_per_value=48,
)
