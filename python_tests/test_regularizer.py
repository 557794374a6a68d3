"""DSERegularizer in the place of lightly's: same constructor, errors, value and gradient."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from features import CLOUDS, clustered, generator, normal
from parity import relative_error
from peer import run_lightly
from torch import Tensor

import dse_ext

lightly_regularizer = pytest.importorskip("lightly.loss.regularizer")
Peer = lightly_regularizer.DSERegularizer


# --- Constructor -------------------------------------------------------------------------------


def test_leading_arguments_are_lightly_s_in_order_with_their_defaults() -> None:
    theirs = list(inspect.signature(Peer.__init__).parameters.values())
    ours = list(inspect.signature(dse_ext.DSERegularizer.__init__).parameters.values())
    for a, b in zip(theirs, ours, strict=False):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    extra = ours[len(theirs) :]
    assert [p.name for p in extra] == ["group_images", "dim_weight", "generator", "process_group"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extra)
    assert [p.default for p in extra] == [None, 1.0, None, None]


def test_attributes_are_lightly_s() -> None:
    arguments = (0.5, False, 2, 8, 7, 1e-3)
    theirs, ours = Peer(*arguments), dse_ext.DSERegularizer(*arguments)
    names = list(inspect.signature(Peer).parameters)
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}


BAD_ARGUMENTS = [
    ("weight", -0.1),
    ("local_clusters", 0),
    ("global_clusters", -3),
    ("max_kmeans_iters", 0),
    ("tol", 0.0),
    ("tol", -1e-4),
]


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS)
def test_constructor_refuses_what_lightly_refuses(name: str, value: float) -> None:
    for module in (Peer, dse_ext.DSERegularizer):
        with pytest.raises(ValueError, match=rf"{name} must be .*got {value}"):
            module(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("group_images", 0), ("group_images", -2)])
def test_constructor_refuses_bad_arguments_of_its_own(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        dse_ext.DSERegularizer(**{name: value})


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5, 5), (0, 6, 5), (4, 0, 5), (4, 6, 0)])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_forward_refuses_what_lightly_refuses(shape: tuple[int, ...], weight: float) -> None:
    for module in (Peer(weight=weight), dse_ext.DSERegularizer(weight=weight)):
        with pytest.raises(ValueError, match=r"representations must have") as caught:
            module(torch.zeros(shape))
        assert str(list(shape)).strip("[]") in str(caught.value)


# --- Value and gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("cloud", ["random", "clustered", "low_rank"])
@pytest.mark.parametrize(
    "shape", [(9, 16, 24), (17, 25, 8), (3, 36, 48)], ids=["9x16x24", "17x25x8", "3x36x48"]
)
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_same_clusters_same_loss_and_gradient(
    weight: float, shape: tuple[int, int, int], cloud: str, normalize: bool, device: torch.device
) -> None:
    z = CLOUDS[cloud](*shape).float()
    peer = run_lightly(z, weight=weight, normalize=normalize)
    x = z.to(device).requires_grad_()
    c = dse_ext.dse_components(
        x,
        normalize=normalize,
        local_labels=peer.local_labels.to(device),
        global_labels=peer.global_labels.to(device),
        global_centroids=peer.global_centroids.to(device),
    )
    loss = -weight * c.score()
    (gradient,) = torch.autograd.grad(loss, x)
    assert relative_error(loss, peer.loss) < 1e-5
    assert relative_error(gradient, peer.gradient) < 1e-3


@pytest.mark.parametrize("clusters", [(2, 8), (4, 30), (5, 3), (1, 1)])
def test_same_loss_with_other_numbers_of_clusters(
    clusters: tuple[int, int], device: torch.device
) -> None:
    local, shared = clusters
    z = clustered(10, 16, 12).float()
    peer = run_lightly(z, local_clusters=local, global_clusters=shared)
    c = dse_ext.dse_components(
        z.to(device),
        local_clusters=local,
        global_clusters=shared,
        local_labels=peer.local_labels.to(device),
        global_labels=peer.global_labels.to(device),
        global_centroids=peer.global_centroids.to(device),
    )
    assert relative_error(-c.score(), peer.loss) < 1e-5


def test_own_clusters_give_lightly_s_loss_on_average(device: torch.device) -> None:
    """Both draw their clusters at random; over seeds the losses must agree."""
    z = normal(8, 25, 12).float()
    theirs = torch.stack([run_lightly(z, seed=s).loss for s in range(12)]).double()
    ours = torch.stack(
        [dse_ext.DSERegularizer(generator=generator(s))(z.to(device)).cpu() for s in range(48)]
    ).double()
    standard_error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt().item()
    expected = theirs.mean().item()
    assert standard_error < 0.01 * abs(expected)
    assert ours.mean().item() == pytest.approx(expected, abs=4 * standard_error)


def test_loss_is_minus_weight_times_score(device: torch.device) -> None:
    z = clustered(9, 16, 12).float().to(device)
    options = {"local_clusters": 2, "global_clusters": 6, "group_images": 4, "normalize": False}
    regularizer = dse_ext.DSERegularizer(
        weight=0.25, dim_weight=0.6, generator=generator(5), **options
    )
    loss = regularizer(z)
    c = dse_ext.dse_components(z, generator=generator(5), **options)
    assert loss.shape == ()
    torch.testing.assert_close(loss, -0.25 * c.score(0.6))


def test_weight_zero_is_zero_and_does_no_work(device: torch.device) -> None:
    z = clustered(9, 16, 12).float().to(device).requires_grad_()
    for module in (Peer(weight=0.0), dse_ext.DSERegularizer(weight=0.0)):
        loss = module(z)
        assert loss.shape == ()
        assert loss.dtype == z.dtype
        assert loss.device == z.device
        assert float(loss) == 0
        (z.sum() + loss).backward()
        assert torch.equal(z.grad, torch.ones_like(z))
        z.grad = None
    broken = torch.full((4, 6, 5), float("nan"), device=device)
    assert float(dse_ext.DSERegularizer(weight=0.0)(broken)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    z = clustered(9, 16, 12).to(device, dtype).requires_grad_()
    loss = dse_ext.DSERegularizer()(z)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert z.grad.dtype == dtype


# --- Logging -----------------------------------------------------------------------------------


def test_last_holds_the_detached_components_of_the_last_call(device: torch.device) -> None:
    regularizer = dse_ext.DSERegularizer(generator=generator(0))
    assert regularizer.last is None
    for seed in range(2):
        z = clustered(9, 16, 12, seed=seed).float().to(device).requires_grad_()
        loss = regularizer(z)
        last = regularizer.last
        assert isinstance(last, dse_ext.DSEComponents)
        assert not any(t.requires_grad for t in last)
        torch.testing.assert_close(-last.score(), loss.detach())


def test_last_does_not_keep_the_graph_alive(device: torch.device) -> None:
    import gc
    import weakref

    regularizer = dse_ext.DSERegularizer()
    z = clustered(4, 9, 6).float().to(device).requires_grad_()
    hidden = z * 2
    watch = weakref.ref(hidden)
    loss = regularizer(hidden)
    del hidden, loss
    gc.collect()
    assert watch() is None
    assert regularizer.last is not None


# --- As a module in training -------------------------------------------------------------------


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_under_autocast(dtype: torch.dtype, device: torch.device) -> None:
    model, regularizer = Encoder().to(device), dse_ext.DSERegularizer(weight=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = normal(9, 3, 5, 5).float().to(device)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast(device.type, dtype=dtype):
        dense = model(images)
        assert dense.dtype == dtype
        loss = dense.float().square().mean() + regularizer(dense)
    loss.backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)


def test_descending_the_loss_raises_the_score(device: torch.device) -> None:
    z = clustered(9, 16, 12).float().to(device).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = dse_ext.DSERegularizer(generator=generator(0))(z)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_state_dict_is_interchangeable_with_lightly_s() -> None:
    ours, theirs = dse_ext.DSERegularizer(), Peer()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.parameters()) == []


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "after_a_call"])
@pytest.mark.parametrize("with_generator", [False, True], ids=["", "with_generator"])
def test_deepcopy_and_pickle(called: bool, with_generator: bool, device: torch.device) -> None:
    z = clustered(9, 16, 12).float().to(device).requires_grad_()
    regularizer = dse_ext.DSERegularizer(
        weight=0.3, group_images=4, generator=generator(7) if with_generator else None
    )
    if called:
        regularizer(z)
    copies = [copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))]
    buffer = io.BytesIO()
    torch.save(regularizer, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    torch.manual_seed(1)
    expected = regularizer(z)
    for other in copies:
        assert (other.weight, other.group_images) == (0.3, 4)
        torch.manual_seed(1)
        assert torch.equal(other(z), expected)


def test_repr_shows_the_settings() -> None:
    text = repr(dse_ext.DSERegularizer(weight=0.25, global_clusters=12))
    assert "weight=0.25" in text
    assert "global_clusters=12" in text


def test_without_a_generator_torch_manual_seed_decides(device: torch.device) -> None:
    z = clustered(9, 49, 12).float().to(device)
    regularizer = dse_ext.DSERegularizer()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(regularizer(z))
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
