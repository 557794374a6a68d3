"""`dse_components` as users meet it: the regularizer's step, and the regularizers of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module

import dse_ext
from dse_ext.bench.batched_torch import BatchedDSERegularizer
from dse_ext.bench.case import DTYPES, Case
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

__all__ = ["DSE_COMPONENTS", "REGULARIZERS", "Regularizer", "run", "wide"]

_GROUP_IMAGES = 8


@dataclass(frozen=True)
class Regularizer:
    """A regularizer that is compared.

    Attributes:
        title: How tables name it.
        build: Imports it and returns it with default settings.
    """

    title: str
    build: Callable[[], Module]


def _lightly() -> Module:
    from lightly.loss.regularizer import DSERegularizer

    return cast(Module, DSERegularizer())


REGULARIZERS: dict[str, Regularizer] = {
    OURS: Regularizer("dse-ext", dse_ext.DSERegularizer),
    "batched": Regularizer("batched PyTorch", BatchedDSERegularizer),
    "lightly": Regularizer("lightly", _lightly),
}
"""In the order in which a round runs them."""


def wide(x: Tensor) -> Tensor:
    """Features as the peers take them, which have no half precision: converted as users do."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def run(module: Module, z: Tensor, mode: str) -> Tensor:
    """One step of what is timed; in `training` the gradient is left in `z.grad`."""
    if mode == "forward":
        with torch.no_grad():
            loss: Tensor = module(z)
            return loss
    loss = module(z)
    loss.backward()
    return loss


def _features(case: Case) -> Tensor:
    shape = cast(tuple[int, int, int], case.shape)
    return make_features(case.kind, shape).to(case.device, DTYPES[case.dtype])


def _contestant(module: Callable[[Tensor], Tensor], case: Case, z: Tensor) -> Contestant:
    leaf = z.detach().clone().requires_grad_(case.mode == "training")

    def reset(seed: int) -> None:
        torch.manual_seed(seed)
        leaf.grad = None

    return Contestant(reset, lambda: run(cast(Module, module), leaf, case.mode), lambda: leaf.grad)


def _prepare_ours(case: Case, z: Tensor) -> Contestant:
    module = dse_ext.DSERegularizer(global_clusters=case.clusters, group_images=_GROUP_IMAGES)
    return _contestant(module, case, z)


def _batched(case: Case) -> BatchedDSERegularizer:
    return BatchedDSERegularizer(global_clusters=case.clusters, group_images=_GROUP_IMAGES)


def _prepare_batched(case: Case, z: Tensor) -> Contestant:
    module = _batched(case)
    return _contestant(lambda leaf: module(wide(leaf)), case, z)


class _Compiled:
    """The batched regularizer, its clusters and its loss compiled each."""

    def __init__(self, module: BatchedDSERegularizer) -> None:
        self.clusters = compiled(module.clusters)
        self.loss = compiled(module.loss)

    def __call__(self, leaf: Tensor) -> Tensor:
        z = wide(leaf)
        return self.loss(z, *self.clusters(z))


def _prepare_compiled(case: Case, z: Tensor) -> Contestant:
    return _contestant(_Compiled(_batched(case)), case, z)


def _prepare_lightly(case: Case, z: Tensor) -> Contestant:
    module = _lightly()
    return _contestant(lambda leaf: module(wide(leaf)), case, z)


def _only_default_clusters(case: Case) -> str | None:
    if case.clusters != 24:
        return "its groups of images grow with the number of clusters"
    return None


# --- agreement: ours, given a peer's clusters, has the peer's loss and gradient -------------------


def _compare_batched(case: Case, z: Tensor) -> list[Agreement]:
    return _compare_at_clusters_of(_batched(case), case, z)


def _compare_compiled(case: Case, z: Tensor) -> list[Agreement]:
    return _compare_at_clusters_of(_Compiled(_batched(case)), case, z)


def _compare_at_clusters_of(
    peer: BatchedDSERegularizer | _Compiled, case: Case, z: Tensor
) -> list[Agreement]:
    leaf = z.detach().clone().requires_grad_(case.mode == "training")
    local_labels, global_labels, centroids = peer.clusters(wide(leaf))
    loss = peer.loss(wide(leaf), local_labels, global_labels, centroids)
    k = max(part.shape[1] for part in centroids if len(part))
    return _agreements(
        case,
        leaf,
        loss,
        gradient_tolerance(case, gram=True),
        local_labels=local_labels,
        global_labels=torch.cat([part.reshape(-1, z.shape[1]) for part in global_labels]),
        global_centroids=torch.cat([_with_rows(c, k) for c in centroids if len(c)]),
    )


def _with_rows(centroids: Tensor, k: int) -> Tensor:
    """Centroids `(G, k', d)` as `(G, k, d)`; what is not finite does not exist."""
    missing = k - centroids.shape[1]
    return torch.nn.functional.pad(centroids, (0, 0, 0, missing), value=torch.inf)


def _compare_lightly(case: Case, z: Tensor) -> list[Agreement]:
    from lightly.loss.regularizer import DSERegularizer

    calls: list[tuple[Tensor, Tensor]] = []

    # It clusters each image first and then each group, always through this method.
    class Recording(DSERegularizer):  # type: ignore[misc]
        def _kmeans(self, x: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = super()._kmeans(x, num_clusters)
            calls.append(result)
            return result

    leaf = z.detach().clone().requires_grad_(case.mode == "training")
    loss = Recording()(wide(leaf))
    images, positions, _ = z.shape
    k = max(len(c) for c, _ in calls[images:])
    return _agreements(
        case,
        leaf,
        loss,
        gradient_tolerance(case),
        local_labels=torch.stack([labels for _, labels in calls[:images]]),
        global_labels=torch.cat([labels for _, labels in calls[images:]]).reshape(
            images, positions
        ),
        global_centroids=torch.cat([_with_rows(c.unsqueeze(0), k) for c, _ in calls[images:]]),
    )


def _agreements(
    case: Case, leaf: Tensor, theirs: Tensor, tolerance: float, **clusters: Tensor
) -> list[Agreement]:
    own = leaf.detach().clone().requires_grad_(case.mode == "training")
    options: dict[str, Any] = {"global_clusters": case.clusters, "group_images": _GROUP_IMAGES}
    ours = -dse_ext.dse_components(own, **{**options, **clusters}).score()
    loss = Agreement(
        "loss at its clusters", relative(theirs.detach(), ours.detach()), value_tolerance(case)
    )
    if case.mode != "training":
        return [loss]
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    (our_gradient,) = torch.autograd.grad(ours, own)
    difference = relative(their_gradient, our_gradient)
    return [loss, Agreement("gradient at its clusters", difference, tolerance)]


DSE_COMPONENTS = Operation(
    name="dse_components",
    axes="(B, N, d)",
    inputs=_features,
    implementations={
        OURS: Implementation(REGULARIZERS[OURS].title, _prepare_ours),
        "batched": Implementation(
            REGULARIZERS["batched"].title,
            _prepare_batched,
            _compare_batched,
            remark=GRAM_REMARK,
        ),
        "lightly": Implementation(
            REGULARIZERS["lightly"].title,
            _prepare_lightly,
            _compare_lightly,
            needs=("lightly", "lightly"),
            refuses=_only_default_clusters,
        ),
        "compiled": Implementation(
            "batched, torch.compile",
            _prepare_compiled,
            _compare_compiled,
            compiled=True,
        ),
    },
    modes=("training", "forward"),
    bytes_per_value=64,
)
