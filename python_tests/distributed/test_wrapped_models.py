"""DistributedDataParallel and FSDP2 train on the global DSE, whatever the wrapper does."""

from __future__ import annotations

import copy

import features
import parity
import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dse_ext
from dse_ext.hooks import DenseFeatures

OPTIONS = {"local_clusters": 2, "global_clusters": 4, "group_images": 2}


def backbone() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2,
        num_classes=5,
    )  # fmt: skip
    return model.double()


def images() -> Tensor:
    return features.normal(4, 3, 32, 32)


def one_process(clusters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss of the whole batch."""
    model = backbone()
    with DenseFeatures(model) as dense:
        loss = model(images()).square().mean()
        components = dse_ext.dse_components(dense.take(), **OPTIONS, **clusters)
    (loss - 0.1 * components.score()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def two_ranks(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """One backward pass on this rank's half; returns everybody's clusters."""
    regularizer = dse_ext.DSERegularizer(0.1, process_group="world", **OPTIONS)
    with DenseFeatures(model) as dense:
        loss = model(images()[2 * rank : 2 * rank + 2]).square().mean()
        (loss + regularizer(dense.take())).backward()
    last = regularizer.last
    assert last is not None
    clusters = {}
    for name in ("local_labels", "global_labels", "global_centroids"):
        parts = [torch.empty_like(getattr(last, name)) for _ in range(2)]
        dist.all_gather(parts, getattr(last, name).contiguous())
        clusters[name] = torch.cat(parts)
    return clusters


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    scale = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (ours[name] - gradient).norm() / scale
        assert error <= 1e-9, f"{name}: {error:.3g}"


def test_distributed_data_parallel(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(backbone())
    clusters = two_ranks(model, rank)
    ours = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    assert_same_gradients(ours, one_process(clusters))


def test_fully_shard(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = backbone()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    clusters = two_ranks(model, rank)
    ours = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            ours[name] = parameter.grad.full_tensor()
    assert_same_gradients(ours, one_process(clusters))


def test_the_local_regularizer_is_the_mean_over_ranks(rank: int) -> None:
    """Without a process group each rank has a DSE of its own, and DDP averages their gradients."""
    model = nn.parallel.DistributedDataParallel(backbone())
    regularizer = dse_ext.DSERegularizer(0.1, **OPTIONS, generator=torch.Generator().manual_seed(0))
    half = images()[2 * rank : 2 * rank + 2]
    with DenseFeatures(model) as dense:
        (0 * model(half).sum() + regularizer(dense.take())).backward()

    expected = backbone()
    with DenseFeatures(expected) as dense:
        for r in range(2):
            regularizer.generator = torch.Generator().manual_seed(0)
            part = images()[2 * r : 2 * r + 2]
            ((0 * expected(part).sum() + regularizer(dense.take())) / 2).backward()
    for ours, theirs in zip(model.module.parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            assert parity.relative_error(ours.grad, theirs.grad) <= 1e-9 or ours.grad.norm() == 0


def test_training_steps_keep_ranks_equal(rank: int) -> None:
    """A few steps of fp32 training: parameters stay the same on both ranks, bit for bit."""
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(backbone()).float())
    dense = DenseFeatures(model)
    regularizer = dse_ext.DSERegularizer(0.1, process_group="world", **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scores = []
    for _ in range(4):
        loss = model(images()[2 * rank : 2 * rank + 2].float()).square().mean()
        (loss + regularizer(dense.take())).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert regularizer.last is not None
        scores.append(float(regularizer.last.score()))
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = mine.clone()
    dist.broadcast(theirs, src=0)
    assert torch.equal(mine, theirs)
    shared = torch.tensor(scores)
    dist.broadcast(shared, src=0)
    assert scores == pytest.approx(shared.tolist(), rel=1e-6)
