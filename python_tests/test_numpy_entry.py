"""The NumPy entry points of dse_ext._C: what the operators give, and clear refusals."""

from __future__ import annotations

import gc
import sys
import weakref

import numpy as np
import pytest
import torch

from dse_ext import _C

ops = torch.ops.dse_ext
DTYPES = (np.float64, np.float32, np.float16)
NAMES = (
    "m_inter", "m_intra_image", "m_intra_batch", "m_dim", "avg_norm",
    "local_labels", "global_labels", "global_centroids",
)  # fmt: skip


def features(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def labels(*shape: int, k: int, dtype: type = np.int64) -> np.ndarray:
    return np.random.default_rng(1).integers(k, size=shape).astype(dtype)


def seed(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def assert_same(arrays: object, tensors: object) -> None:
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())
        assert array.dtype == tensor.numpy().dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["regularizer", "evaluation", "paper"])
def test_components_are_the_operator_s(variant: str, dtype: type) -> None:
    z = features(5, 14, 6, dtype=dtype)
    found = _C.dse_components(
        z, variant=variant, local_clusters=2, global_clusters=5, group_images=3, normalize=False,
        max_kmeans_iters=4, tol=1e-3, seed=11,
    )  # fmt: skip
    expected = ops.dse_components(
        torch.from_numpy(z), seed(11), variant, 2, 5, 3, False, 4, 1e-3, save_for_backward=False
    )
    assert tuple(found) == NAMES
    assert_same(found.values(), expected[:8])


def test_components_are_numpy_scalars_and_arrays() -> None:
    found = _C.dse_components(features(3, 9, 4, dtype=np.float32))
    for name in NAMES[:5]:
        assert type(found[name]) is np.float32
    for name in NAMES[5:]:
        assert type(found[name]) is np.ndarray


def test_defaults_are_the_operator_s() -> None:
    z = features(4, 10, 6)
    expected = ops.dse_components(torch.from_numpy(z), seed(0), save_for_backward=False)
    assert_same(_C.dse_components(z).values(), expected[:8])
    x = features(2, 30, 3)
    assert_same(_C.kmeans(x, 3), ops.kmeans(torch.from_numpy(x), 3, seed(0)))


def test_the_seed_decides() -> None:
    z = features(8, 40, 6)
    one, same, other = (_C.dse_components(z, seed=s)["global_labels"] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_given_labels_and_centroids_replace_the_k_means(integer: type) -> None:
    z = features(4, 10, 6)
    given = {
        "local_labels": labels(4, 10, k=3, dtype=integer),
        "global_labels": labels(4, 10, k=7, dtype=integer),
        "global_centroids": features(2, 7, 6),  # bring their own number of clusters
    }
    found = _C.dse_components(z, global_clusters=6, **given)
    expected = ops.dse_components(
        torch.from_numpy(z), seed(0), global_clusters=6, save_for_backward=False,
        **{name: torch.from_numpy(array.astype(np.int64) if "labels" in name else array)
           for name, array in given.items()},
    )  # fmt: skip
    assert_same(found.values(), expected[:8])
    np.testing.assert_array_equal(found["local_labels"], given["local_labels"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kmeans_is_the_operator_s(dtype: type) -> None:
    x = features(3, 40, 5, dtype=dtype)
    expected = ops.kmeans(torch.from_numpy(x), 4, seed(9), 6, 1e-3)
    assert_same(_C.kmeans(x, 4, max_iters=6, tol=1e-3, seed=9), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cluster_nuclear_norms_are_the_operator_s(dtype: type) -> None:
    x, clusters = features(3, 20, 5, dtype=dtype), labels(3, 20, k=4)
    expected = ops.cluster_nuclear_norms(torch.from_numpy(x), torch.from_numpy(clusters), 4, False)
    assert_same([_C.cluster_nuclear_norms(x, clusters, 4)], expected[:1])


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(12, 5), (3, 12, 5), (2, 3, 6, 9)])
def test_effective_rank_is_the_operator_s(shape: tuple[int, ...], center: bool) -> None:
    x = features(*shape)
    expected = ops.effective_rank(torch.from_numpy(x), center, False)
    assert_same([_C.effective_rank(x, center=center)], expected[:1])


VIEWS = {
    "transposed": lambda x: x.transpose(1, 0, 2),
    "every second feature": lambda x: x[..., ::2],
    "reversed": lambda x: x[:, ::-1],
    "one image repeated": lambda x: np.broadcast_to(x[:1], x.shape),
    "channels first": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 1)), 1, -1),
    "field of records": lambda x: records(x)["x"],
    "unaligned": lambda x: unaligned(x),
    "read-only": lambda x: read_only(x),
}


def records(x: np.ndarray) -> np.ndarray:
    """Nine bytes apart: strides that are no multiple of the item size."""
    array = np.zeros(x.shape, dtype=[("x", x.dtype), ("flag", np.uint8)])
    array["x"] = x
    return array


def unaligned(x: np.ndarray) -> np.ndarray:
    buffer = np.zeros(x.nbytes + 1, dtype=np.uint8)[1:]
    view = buffer.view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("view", VIEWS)
def test_any_layout_gives_what_its_copy_gives(view: str) -> None:
    array = VIEWS[view](features(4, 12, 6))
    copy = np.ascontiguousarray(array)
    for found, expected in zip(
        _C.dse_components(array, seed=2).values(),
        _C.dse_components(copy, seed=2).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(array, copy)


def test_an_array_is_shared_while_needed_and_let_go() -> None:
    x = features(2, 20, 4)
    references = sys.getrefcount(x)
    _C.effective_rank(x)
    _C.dse_components(x)
    assert sys.getrefcount(x) == references


def test_a_result_outlives_the_call_and_is_let_go() -> None:
    centroids = _C.kmeans(features(2, 20, 4), 3)[0]
    kept = centroids.copy()
    gc.collect()
    torch.randn(10_000)  # would reuse memory that had been freed
    np.testing.assert_array_equal(centroids, kept)
    watch = weakref.ref(centroids)
    del centroids
    gc.collect()
    assert watch() is None


def test_features_that_are_not_finite_give_nan() -> None:
    z = features(3, 9, 4)
    z[1, 2, 3] = np.inf
    found = _C.dse_components(z)
    assert all(np.isnan(found[name]) for name in NAMES[:5])


Z = features(4, 10, 6)
REFUSALS = {
    "rank": (lambda: _C.dse_components(Z[0]), r"array must have shape .* got \(10, 6\)"),
    "empty axis": (lambda: _C.dse_components(Z[:0]), r"array must have no empty axis, got shape"),
    "integers": (lambda: _C.dse_components(Z.astype(np.int64)), "float64, float32 or float16"),
    "complex": (lambda: _C.dse_components(Z.astype(complex)), "dtype .* got complex128"),
    "byte order": (lambda: _C.dse_components(Z.astype(">f8")), "machine's byte order, got >f8"),
    "variant": (lambda: _C.dse_components(Z, variant="x"), "variant must be 'regularizer'.*'x'"),
    "local k": (lambda: _C.dse_components(Z, local_clusters=0), "local_clusters must be >= 1"),
    "global k": (lambda: _C.dse_components(Z, global_clusters=-1), "global_clusters must be >= 1"),
    "group": (lambda: _C.dse_components(Z, group_images=0), "group_images must be >= 1, got 0"),
    "iterations": (lambda: _C.dse_components(Z, max_kmeans_iters=0), "max_kmeans_iters must be"),
    "tolerance": (lambda: _C.dse_components(Z, tol=0.0), "tol must be > 0, got 0"),
    "label": (
        lambda: _C.dse_components(Z, local_labels=np.full((4, 10), 3)),
        r"local_labels must lie in \[0, 3\), got 3 at \(0, 0\)",
    ),
    "negative label": (
        lambda: _C.dse_components(Z, global_labels=np.full((4, 10), -1)),
        r"global_labels must lie in \[0, 24\), got -1",
    ),
    "label shape": (
        lambda: _C.dse_components(Z, local_labels=np.zeros((4, 9), int)),
        r"local_labels must have shape \(4, 10\), got \(4, 9\)",
    ),
    "label dtype": (
        lambda: _C.dse_components(Z, local_labels=np.zeros((4, 10))),
        "local_labels must have an integer dtype, got float64",
    ),
    "centroid shape": (
        lambda: _C.dse_components(Z, global_centroids=Z),
        r"global_centroids must have shape \(1, k, 6\) with k >= 1, got \(4, 10, 6\)",
    ),
    "k": (lambda: _C.kmeans(Z, 0), "k must be >= 1, got 0"),
    "k-means iterations": (lambda: _C.kmeans(Z, 2, max_iters=0), "max_iters must be >= 1"),
    "norms' labels": (
        lambda: _C.cluster_nuclear_norms(Z, np.full((4, 10), 2), 2),
        r"labels must lie in \[0, 2\), got 2",
    ),
    "vector": (lambda: _C.effective_rank(Z[0, 0]), r"array must have shape \(\.\.\., rows"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_named(case: str) -> None:
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [[[[1.0]]], torch.ones(1, 1, 1), None])
def test_only_arrays_are_taken(value: object) -> None:
    with pytest.raises(TypeError, match=r"array must be a numpy\.ndarray, got \w+"):
        _C.dse_components(value)
