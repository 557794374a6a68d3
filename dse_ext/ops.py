"""Load the operators ``torch.ops.dse_ext.*`` and give them shapes (fake kernels) and gradients.

The kernels are in the native libraries; here is what torch needs besides: output shapes for
``torch.compile`` and ``torch.export``, the autograd formulas (each a call of one backward operator)
and clear refusals of what is not supported (double backward, ``torch.func.vmap``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

_HERE = Path(__file__).resolve().parent
_OLDEST_TORCH = (2, 11)
_IMAGE_KERNEL_POSITIONS = 256  # csrc/cuda/heuristics.h

LIBRARIES: dict[str, Path] = {}
"""Native libraries that were loaded: name -> path."""

INT16_CHOICES = ("auto", "never", "always", "vectors", "tiles")
"""Values of the environment variable ``DSE_EXT_INT16``, which the CPU kernels read."""

FAILURES: dict[str, str] = {}
"""Native libraries that are there but could not be loaded: name -> the loader's reason."""


def _load() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        raise ImportError(f"dse_ext needs torch >= 2.11, found torch {torch.__version__}.")
    wish = os.environ.get("DSE_EXT_INT16", "auto")
    if wish not in INT16_CHOICES:
        raise ImportError(f"DSE_EXT_INT16 is {wish!r}; accepted are {', '.join(INT16_CHOICES)}.")
    path = _HERE / "_ops.so"
    if not path.exists():
        raise ImportError(
            f"dse_ext's operators are not built: there is no {path}. "
            "Install the package (pip install .) or build it in place (make build)."
        )
    torch.ops.load_library(path)
    LIBRARIES["_ops"] = path
    # The CUDA kernels need a torch that has CUDA; without one the CPU operators are all there is. A
    # CUDA library for another major version of CUDA is no reason to lose those either.
    path = _HERE / "_cuda.so"
    if path.exists() and torch.version.cuda is not None:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            FAILURES["_cuda"] = str(error)
        else:
            LIBRARIES["_cuda"] = path


_load()


def _real_dtype(x: Tensor) -> torch.dtype:
    """Dtype of what is computed from ``x``: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- fake kernels: shapes and dtypes alone ------------------------------------------------------


@torch.library.register_fake("dse_ext::dse_components")
def _(
    z: Tensor,
    seed: Tensor,
    variant: str = "regularizer",
    local_clusters: int = 3,
    global_clusters: int = 24,
    group_images: int | None = None,
    normalize: bool = True,
    max_kmeans_iters: int = 20,
    tol: float = 1e-4,
    local_labels: Tensor | None = None,
    global_labels: Tensor | None = None,
    global_centroids: Tensor | None = None,
    save_for_backward: bool = True,
) -> tuple[Tensor, ...]:
    images, positions, dim = z.shape
    if group_images is None:
        group_images = max(global_clusters // local_clusters, 1)
    group = torch.sym_min(group_images, images)
    groups = (images + group - 1) // group
    k_local: int | torch.SymInt = local_clusters
    k_global: int | torch.SymInt = global_clusters
    if local_labels is None:
        k_local = torch.sym_min(local_clusters, positions)
    if global_centroids is not None:
        k_global = global_centroids.shape[1]
    elif global_labels is None:
        k_global = torch.sym_min(global_clusters, group * positions)
    rows = images * positions
    evaluation = variant == "evaluation"
    side = torch.sym_min(images if evaluation else rows, dim)
    matrices = positions if evaluation else 1
    indices = rows + images * k_local + groups * k_global + matrices + 1
    if evaluation:
        indices = indices + rows
    kept = 1 if save_for_backward else 0
    real = slots = _real_dtype(z)
    local_width: int | torch.SymInt = dim
    global_width: int | torch.SymInt = dim
    if z.device.type == "cuda":  # csrc/cuda/heuristics.h
        slots = torch.float64
        by_image = positions <= _IMAGE_KERNEL_POSITIONS and k_local <= positions
        local_width = positions if by_image else torch.sym_min(positions, dim)
        global_width = torch.sym_min(group * positions, dim)
    components = [z.new_empty((), dtype=real) for _ in range(5)]
    return (
        *components,
        z.new_empty((images, positions), dtype=torch.int64),
        z.new_empty((images, positions), dtype=torch.int64),
        z.new_empty((groups, k_global, dim), dtype=real),
        z.new_empty((kept * images, positions, local_width), dtype=slots),
        z.new_empty((kept * images, positions, global_width), dtype=slots),
        z.new_empty((kept * matrices, side, side), dtype=torch.float64),
        z.new_empty((kept * (2 * rows + 2 * dim + 5),), dtype=torch.float64),
        z.new_empty((kept * indices,), dtype=torch.int64),
    )


@torch.library.register_fake("dse_ext::dse_components_backward")
def _(grad_components: Tensor, z: Tensor, *_saved: Any) -> Tensor:
    return z.new_empty(z.shape)


@torch.library.register_fake("dse_ext::kmeans")
def _(
    x: Tensor, k: int, seed: Tensor, max_iters: int = 20, tol: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows, dim = x.shape
    real = _real_dtype(x)
    return (
        x.new_empty((groups, torch.sym_min(k, rows), dim), dtype=real),
        x.new_empty((groups, rows), dtype=torch.int64),
        x.new_empty((groups,), dtype=real),
    )


@torch.library.register_fake("dse_ext::cluster_nuclear_norms")
def _(
    x: Tensor, labels: Tensor, k: int, save_for_backward: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows, dim = x.shape
    kept = groups if save_for_backward else 0
    real = slots = _real_dtype(x)
    width: int | torch.SymInt = dim
    if x.device.type == "cuda":
        slots = torch.float64
        width = torch.sym_min(rows, dim)
    return (
        x.new_empty((groups, k), dtype=real),
        x.new_empty((kept, rows, width), dtype=slots),
        x.new_empty((kept, k), dtype=torch.int64),
    )


@torch.library.register_fake("dse_ext::cluster_nuclear_norms_backward")
def _(grad: Tensor, x: Tensor, *_saved: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("dse_ext::effective_rank")
def _(
    x: Tensor, center: bool = False, save_for_backward: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    *leading, rows, dim = x.shape
    count = 1
    for size in leading:
        count = count * size
    kept = count if save_for_backward else 0
    side = torch.sym_min(rows, dim)
    return (
        x.new_empty(leading, dtype=_real_dtype(x)),
        x.new_empty((kept, side, side), dtype=torch.float64),
        x.new_empty((kept,), dtype=torch.int64),
    )


@torch.library.register_fake("dse_ext::effective_rank_backward")
def _(grad: Tensor, x: Tensor, *_saved: Any) -> Tensor:
    return x.new_empty(x.shape)


# --- gradients ------------------------------------------------------------------------------------


def _dse_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, seed, variant, local_clusters, global_clusters, group_images, normalize = inputs[:7]
    ctx.mark_non_differentiable(*output[5:])
    ctx.set_materialize_grads(False)
    if inputs[9] is None:  # no labels given: k-means caps the number of clusters
        local_clusters = torch.sym_min(local_clusters, z.shape[1])
    ctx.options = (variant, local_clusters, global_clusters, group_images, normalize)
    ctx.saved = inputs[12]
    ctx.save_for_backward(z, seed, *output[:1], *output[5:])


def _dse_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 12
    given = [grad for grad in grads[:5] if grad is not None]
    if not given:
        return (None, *none)
    z, seed, component, local_labels, global_labels, centroids, *saved = ctx.saved_tensors
    variant, local_clusters, global_clusters, group_images, normalize = ctx.options
    upstream = torch.stack(
        [component.new_zeros(()) if grad is None else grad for grad in grads[:5]]
    )
    if group_images is None:
        group_images = max(global_clusters // local_clusters, 1)
    if not ctx.saved:
        # The forward pass kept nothing: run it again on the same labels and centroids.
        saved = torch.ops.dse_ext.dse_components(
            z, seed, variant, local_clusters, global_clusters, group_images, normalize, 1, 1.0,
            local_labels, global_labels, centroids, True,
        )[8:]  # fmt: skip
    grad_z = torch.ops.dse_ext.dse_components_backward(
        upstream, z, local_labels, global_labels, centroids, *saved, variant, local_clusters,
        group_images, normalize,
    )  # fmt: skip
    return (grad_z, *none)


def _norms_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, labels, k, saved = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.k, ctx.saved = k, saved
    ctx.save_for_backward(x, labels, *output[1:])


def _norms_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return None, None, None, None
    x, labels, *saved = ctx.saved_tensors
    if not ctx.saved:
        saved = torch.ops.dse_ext.cluster_nuclear_norms(x, labels, ctx.k, True)[1:]
    grad_x = torch.ops.dse_ext.cluster_nuclear_norms_backward(grads[0], x, labels, *saved)
    return grad_x, None, None, None


def _rank_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, center, saved = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.center, ctx.saved = center, saved
    ctx.save_for_backward(x, *output[1:])


def _rank_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return None, None, None
    x, *saved = ctx.saved_tensors
    if not ctx.saved:
        saved = torch.ops.dse_ext.effective_rank(x, ctx.center, True)[1:]
    grad_x = torch.ops.dse_ext.effective_rank_backward(grads[0], x, *saved, ctx.center)
    return grad_x, None, None


torch.library.register_autograd("dse_ext::dse_components", _dse_backward, setup_context=_dse_setup)
torch.library.register_autograd(
    "dse_ext::cluster_nuclear_norms", _norms_backward, setup_context=_norms_setup
)
torch.library.register_autograd(
    "dse_ext::effective_rank", _rank_backward, setup_context=_rank_setup
)


# --- refusals -------------------------------------------------------------------------------------


def _no_double_backward(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"dse_ext::{name} is differentiable once: its gradient has no gradient of its own "
            "(second derivatives of singular values are not implemented)."
        )

    return backward


def _no_vmap(name: str) -> Callable[..., NoReturn]:
    def rule(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise RuntimeError(
            f"torch.func.vmap over dse_ext::{name} is not supported; the operator takes a batch "
            "as its leading axis."
        )

    return rule


for _name in ("dse_components", "cluster_nuclear_norms", "effective_rank"):
    torch.library.register_autograd(f"dse_ext::{_name}_backward", _no_double_backward(_name))
for _name in ("dse_components", "kmeans", "cluster_nuclear_norms", "effective_rank"):
    torch.library.register_vmap(f"dse_ext::{_name}", _no_vmap(_name))
