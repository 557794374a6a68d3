"""The regularizer in the training steps that people really run: AMP, checkpointing, compile."""

from __future__ import annotations

import copy

import features
import pytest
import timm
import torch
from torch import Tensor, nn

import dse_ext
from dse_ext.hooks import DenseFeatures

OPTIONS = {"local_clusters": 2, "global_clusters": 4, "group_images": 2}


def backbone(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, embed_dim=32, num_heads=2,
        num_classes=0,
    )  # fmt: skip


def images() -> Tensor:
    return features.normal(4, 3, 32, 32).float()


def regularizer(weight: float = 1.0) -> dse_ext.DSERegularizer:
    return dse_ext.DSERegularizer(weight, generator=torch.Generator().manual_seed(0), **OPTIONS)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(model: nn.Module, dense: DenseFeatures, autocast: torch.dtype | None = None) -> Tensor:
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = model(images()).float().square().mean()
        loss = loss + regularizer()(dense.take())
    loss.backward()
    return loss.detach()


def test_bfloat16_autocast() -> None:
    """bfloat16 features, a float32 loss, and nearly the same gradient."""
    results = []
    for autocast in (None, torch.bfloat16):
        model = backbone()
        with DenseFeatures(model, -1) as dense:
            loss = step(model, dense, autocast)
        results.append((loss, gradients(model)))
        assert loss.dtype == torch.float32
    (full, g_full), (half, g_half) = results
    assert half == pytest.approx(full.item(), rel=2e-2)
    cosine = nn.functional.cosine_similarity(g_full, g_half, dim=0)
    # bfloat16 has 8 bits: this is the network's rounding, not the operator's (test_precision.py).
    assert cosine > 0.98


def test_the_operator_is_outside_of_autocast() -> None:
    z = features.clustered(4, 9, 16).to(torch.bfloat16)
    outside = regularizer()(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = regularizer()(z)
    assert torch.equal(inside, outside)
    assert inside.dtype == torch.float32


class Scaled(nn.Module):
    """float16 features, as a half-precision backbone gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(features.normal(16, 16).float())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).half()


def test_float16_and_a_grad_scaler() -> None:
    """A step with NaN features has NaN gradients: it is skipped, and the scale is halved."""
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    clean = features.clustered(4, 9, 16).float()
    broken = clean.clone()
    broken[1, 2, 3] = torch.inf
    moved, scales, finite = [], [], []
    for x in (clean, broken, clean):
        before = model.weight.detach().clone()
        scaler.scale(regularizer(0.001)(model(x))).backward()
        assert model.weight.grad is not None
        finite.append(bool(model.weight.grad.isfinite().all()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not torch.equal(before, model.weight))
        scales.append(scaler.get_scale())
    assert finite == [True, False, True]
    assert moved == [True, False, True]
    assert scales == [1024.0, 512.0, 512.0]
    assert model.weight.isfinite().all()


def test_a_grad_scaler_s_gradient_is_the_gradient() -> None:
    z = features.clustered(4, 9, 16).half()
    grads = []
    for scale in (1.0, 1024.0):
        leaf = z.clone().requires_grad_()
        (scale * regularizer(0.1)(leaf)).backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float16
        grads.append(leaf.grad.double() / scale)
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    # Without the scale, float16 gradients of this size are subnormal: that is what it is for.
    assert error < 2e-2


@pytest.mark.parametrize("layer", [None, -1, 0])
def test_activation_checkpointing(layer: int | None) -> None:
    results = []
    for checkpointing in (False, True):
        model = backbone().double().train()
        model.set_grad_checkpointing(checkpointing)
        with DenseFeatures(model, layer) as dense:
            loss = model(images().double()).square().mean() + regularizer()(dense.take())
            loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_checkpointing_the_regularizer_itself() -> None:
    """Recomputed from the same seed: torch keeps the state of its default generator."""
    from torch.utils.checkpoint import checkpoint

    z = features.clustered(4, 9, 16)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        term = dse_ext.DSERegularizer(**OPTIONS)
        leaf = z.clone().requires_grad_()
        value = checkpoint(term, leaf, use_reentrant=False) if checkpointing else term(leaf)
        value.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_compile_of_a_whole_step() -> None:
    """Forward, hook, regularizer and loss are one graph."""
    model = backbone(depth=1).double()
    dense = DenseFeatures(model)
    term = dse_ext.DSERegularizer(**OPTIONS)
    x = images().double()

    def objective(images: Tensor) -> Tensor:
        loss = model(images).square().mean()
        assert dense.last is not None
        return loss + term(dense.last)

    torch.manual_seed(0)
    expected = objective(x)
    expected.backward()
    plain = gradients(model)
    model.zero_grad()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    value = compiled(x)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(model), plain, rtol=1e-8, atol=1e-12)
    # And it trains.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(5):
        torch.manual_seed(0)
        value = compiled(x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


@pytest.mark.slow
def test_compile_by_inductor() -> None:
    z = features.clustered(4, 9, 16).float()
    weight = features.normal(16, 16).float().requires_grad_()
    term = dse_ext.DSERegularizer(**OPTIONS)

    def objective(z: Tensor) -> Tensor:
        x = torch.tanh(z @ weight)
        return x.square().mean() + term(x)

    values = []
    for function in (objective, torch.compile(objective, fullgraph=True)):
        torch.manual_seed(0)
        value = function(z)
        (gradient,) = torch.autograd.grad(value, weight)
        values.append((value.detach(), gradient))
    # Inductor draws its own random numbers: other seeds of k-means, nearly the same clusters.
    assert values[1][0] == pytest.approx(values[0][0].item(), rel=0.05)
    assert nn.functional.cosine_similarity(values[0][1].flatten(), values[1][1].flatten(), 0) > 0.9


def test_gradient_accumulation() -> None:
    """Micro-batches add up their own DSE: the mean of the micro-batches' gradients."""
    model = backbone().double()
    reference = copy.deepcopy(model)
    batches = images().double().split(2)

    dense, term = DenseFeatures(model), regularizer()
    for batch in batches:
        loss = model(batch).square().mean() + term(dense.take())
        (loss / len(batches)).backward()

    dense, term = DenseFeatures(reference), regularizer()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        total = total + (reference(batch).square().mean() + term(dense.take())) / len(batches)
    total.backward()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-10, atol=1e-14)
