"""How the operators behave on a GPU: no waiting for the device, graphs, streams, devices, bits."""

from __future__ import annotations

import pytest
import torch
from features import CLOUDS, clustered, random
from torch import Tensor

import dse_ext

VARIANTS = ("regularizer", "evaluation", "paper")


def step(reg: dse_ext.DSERegularizer, z: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    loss = reg(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 49, 96), (4, 300, 64), (3, 16, 200)])
def test_a_training_step_never_waits_for_the_device(
    shape: tuple[int, int, int], dtype: torch.dtype, gpu: torch.device
) -> None:
    z = random(*shape).to(gpu, dtype)
    reg = dse_ext.DSERegularizer()
    step(reg, z)  # what is done once: module loading, limits of the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, gradient = step(reg, z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_captured_step_draws_fresh_seeds_at_each_replay(
    dtype: torch.dtype, variant: str, gpu: torch.device
) -> None:
    z = random(12, 40, 48).to(gpu, dtype).requires_grad_()

    def components() -> tuple[Tensor, ...]:
        c = dse_ext.dse_components(z, variant=variant)
        (gradient,) = torch.autograd.grad(c.score(), z)
        return (*(x.detach() for x in c), gradient)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            components()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = components()

    replays = []
    for _ in range(4):
        graph.replay()
        replays.append([x.clone() for x in captured])
    torch.cuda.synchronize()
    labels = [r[6] for r in replays]
    assert any(not torch.equal(labels[0], other) for other in labels[1:])
    # What a replay computed is what the same labels give outside of a graph.
    for values in replays:
        if variant == "evaluation":  # its M_dim permutes positions: not a function of the labels
            continue
        c = dse_ext.dse_components(
            z.detach(),
            variant=variant,
            local_labels=values[5],
            global_labels=values[6],
            global_centroids=values[7],
        )
        for ours, expected in zip(values[:5], c[:5], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_seed_same_bits(dtype: torch.dtype, gpu: torch.device) -> None:
    z = clustered(24, 49, 64).to(gpu, dtype)
    results = []
    for _ in range(3):
        reg = dse_ext.DSERegularizer(generator=torch.Generator(gpu).manual_seed(3))
        results.append(step(reg, z))
        # Another allocation history: uninitialized memory would show.
        torch.full((1 << 20,), float("nan"), device=gpu)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_the_current_stream_is_used(gpu: torch.device) -> None:
    z = random(16, 49, 96).to(gpu)
    generator = torch.Generator(gpu).manual_seed(3)
    expected = step(dse_ext.DSERegularizer(generator=generator), z)
    side = torch.cuda.Stream()
    late = torch.empty_like(z)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # on the default stream it would read what is not there yet
        late.copy_(z)
        generator = torch.Generator(gpu).manual_seed(3)
        loss, gradient = step(dse_ext.DSERegularizer(generator=generator), late)
    side.synchronize()
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_any_device_index() -> None:
    z = random(6, 49, 32).to("cuda:1")
    before = torch.cuda.current_device()
    loss, gradient = step(dse_ext.DSERegularizer(), z)
    assert torch.cuda.current_device() == before
    assert loss.device == gradient.device == z.device
    with pytest.raises((ValueError, RuntimeError), match="device"):
        dse_ext.cluster_nuclear_norms(z, torch.zeros(6, 49, dtype=torch.int64, device="cuda:0"), 2)


def test_tensors_of_two_devices_are_refused(gpu: torch.device) -> None:
    z = random(4, 9, 8).to(gpu)
    labels = torch.zeros(4, 9, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match=r"local_labels.*device"):
        dse_ext.dse_components(z, local_labels=labels)
    with pytest.raises((ValueError, RuntimeError), match=r"labels.*device"):
        dse_ext.cluster_nuclear_norms(z, labels, 2)


@pytest.mark.parametrize("cloud", list(CLOUDS))
@pytest.mark.parametrize("shape", [(9, 30, 24), (2, 300, 20)])
def test_float64_labels_are_those_of_the_cpu(
    cloud: str, shape: tuple[int, int, int], gpu: torch.device
) -> None:
    if cloud == "rank_collapsed":
        pytest.skip("coinciding centroids are numbered by rounding")
    z = CLOUDS[cloud](*shape)
    seeds = [torch.tensor([11]), torch.tensor([11], device=gpu)]
    here, there = (torch.ops.dse_ext.dse_components(z.to(seed.device), seed) for seed in seeds)
    assert torch.equal(here[5], there[5].cpu())
    assert torch.equal(here[6], there[6].cpu())
    for a, b in zip(here[:5], there[:5], strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=0)


def test_autocast_and_a_grad_scaler(gpu: torch.device) -> None:
    layer = torch.nn.Linear(64, 48, device=gpu)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cuda")
    reg = dse_ext.DSERegularizer(weight=1e-2)
    images = random(8, 49, 64).float().to(gpu)

    def train(x: Tensor) -> bool:
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = reg(layer(x))
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return not torch.equal(before, layer.weight)

    assert train(images)
    images[2, 3, 4] = float("nan")
    assert not train(images)
    assert layer.weight.isfinite().all()


def test_compiled_step(gpu: torch.device) -> None:
    reg = dse_ext.DSERegularizer()
    layer = torch.nn.Linear(32, 48, device=gpu)

    @torch.compile(fullgraph=True)
    def loss_of(x: Tensor) -> Tensor:
        return reg(layer(x)) + layer(x).square().mean()

    loss = loss_of(random(8, 49, 32).float().to(gpu))
    loss.backward()
    assert loss.isfinite()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, gpu: torch.device) -> None:
    z = random(5, 9, 12).to(gpu, dtype).requires_grad_()
    seed = torch.tensor([5], device=gpu)
    labels = torch.randint(0, 3, (5, 9), device=gpu)
    ops = torch.ops.dse_ext
    torch.library.opcheck(ops.dse_components, (z, seed))
    torch.library.opcheck(ops.kmeans, (z.detach(), 3, seed))
    torch.library.opcheck(ops.cluster_nuclear_norms, (z, labels, 3))
    torch.library.opcheck(ops.effective_rank, (z,))
