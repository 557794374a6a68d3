"""Offsets and sizes beyond 2**31 elements.

Strides of gigabytes over pages of which only the touched exist, and expanded tensors, which need
no memory for their elements.
"""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from features import clustered, generator, normal, random_labels
from torch import Tensor

import dse_ext

HUGE = 2**31 + 7
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.12 on; Linux's value

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reserves memory as Linux does")


def sparse(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``values`` with these strides, in memory that is not there until it is touched."""
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    size = extent * values.element_size()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    view = torch.frombuffer(pages, dtype=values.dtype, count=extent)
    view = view.as_strided(values.shape, strides)
    view.copy_(values)
    return view


def same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_strides_beyond_int32(axis: int, dtype: torch.dtype) -> None:
    shape = [4, 5, 6]
    shape[axis] = 3  # reserves at most 2 * 2**31 elements
    z = clustered(*shape).to(dtype)
    strides = [0, 0, 0]
    step = 1
    for i in (i for i in (2, 1, 0) if i != axis):
        strides[i] = step
        step *= shape[i]
    strides[axis] = HUGE
    far = sparse(z, tuple(strides))
    assert far.storage_offset() + max(far.stride()) > 2**31
    labels = random_labels(shape[0], shape[1], 2)
    results = []
    for features in (z, far):
        x = features.detach().requires_grad_()
        for variant in ("regularizer", "evaluation", "paper"):
            c = dse_ext.dse_components(
                x, variant=variant, global_clusters=4, generator=generator(0)
            )
            (g,) = torch.autograd.grad(c.score(), x)
            results.append((*c.detach(), g))
        values = dse_ext.effective_rank(x).sum() + dse_ext.cluster_nuclear_norms(x, labels, 2).sum()
        results.append((values.detach(), *torch.autograd.grad(values, x)))
        results.append(tuple(dse_ext.kmeans(x.detach(), 3, generator=generator(1))))
    half = len(results) // 2
    for near, distant in zip(results[:half], results[half:], strict=True):
        same(distant, near)


def test_labels_and_centroids_with_strides_beyond_int32() -> None:
    z = clustered(3, 5, 6).float()
    labels = random_labels(3, 5, 2)
    centroids = normal(1, 2, 6).float()
    options = {"global_clusters": 2, "local_clusters": 2, "group_images": 3}
    near = dse_ext.dse_components(
        z, local_labels=labels, global_labels=labels, global_centroids=centroids, **options
    )
    far = dse_ext.dse_components(
        z,
        local_labels=sparse(labels, (2**30 + 7, 1)),
        global_labels=sparse(labels, (1, 2**29 + 3)),
        global_centroids=sparse(centroids, (1, HUGE, 1)),
        **options,
    )
    same(tuple(far), tuple(near))


def test_more_than_2_to_the_31_elements_in_clusters() -> None:
    groups, n, d = 2**17 + 1, 4, 4096
    x = normal(1, n, d).bfloat16().expand(groups, n, d)
    assert x.numel() > 2**31
    labels = torch.tensor([[0, 1, 0, 0]])
    norms = dse_ext.cluster_nuclear_norms(x, labels.expand(groups, n), 2)
    expected = dse_ext.cluster_nuclear_norms(x[:1], labels, 2)
    assert torch.equal(norms, expected.expand(groups, 2))
