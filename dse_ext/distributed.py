"""DSE of a batch that is spread over the ranks of a process group.

Clusters stay local: k-means runs on each rank's images. What is global is reduced over the ranks:
the means over images, groups and clusters, the spread ``avg_norm`` and the second moment of all
rows, so that ``m_dim`` is the effective rank of the global batch.

All communication is in the forward pass. The backward pass needs none, because the gradient with
respect to a rank's rows is known in closed form from what was reduced (docs/integrations.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dse_ext.functional import DSEComponents, dse_components

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["global_dse_components"]

_EPS = torch.finfo(torch.float64).eps
_NORMALIZE_EPS = 1e-12  # of F.normalize
_BLOCK_ROWS = 4096
# Eigenvalue ratios of a float64 Gram matrix below which the matrix itself is decomposed: as the
# operator on one process does, docs/definitions.md.
_STEEP_FLOAT64, _STEEP = 1e-6, 1e-9


# Collectives and checks that read values: a compiled step is cut here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def global_dse_components(
    z: Tensor,
    process_group: ProcessGroup | str,
    local_clusters: int = 3,
    global_clusters: int = 24,
    group_images: int | None = None,
    normalize: bool = True,
    max_kmeans_iters: int = 20,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
    local_labels: Tensor | None = None,
    global_labels: Tensor | None = None,
    global_centroids: Tensor | None = None,
) -> DSEComponents:
    """Computes the components of DSE of the batch that all ranks hold together.

    Every rank calls it with its own images and gets the same components: those of one process on
    the batches of all ranks, concatenated in the order of ranks, with the same labels. They are
    equal up to rounding where the batch of every rank but the last is a multiple of
    ``group_images`` (then the groups are the same ones); otherwise groups end at the ranks'
    borders. Batches need not be of one size.

    **Gradients.** The gradient with respect to a rank's ``z`` is the gradient of the global
    component with respect to these rows *times the number of ranks*. ``DistributedDataParallel``
    and FSDP divide the sum over ranks by that number, so that what reaches the optimizer is the
    gradient of the global DSE. (It is also what ``torch.distributed.nn.functional`` would give.)
    Every rank has to backpropagate the same weight of the components.

    Args:
        z:
            Features of shape ``(B, N, d)``, as :func:`dse_ext.dse_components` takes them; d must be
            the same on all ranks.
        process_group:
            The ranks that share the batch; ``"world"`` is the default group of
            ``torch.distributed``, looked up now.
        local_clusters:
            Further arguments as of :func:`dse_ext.dse_components` with ``variant="regularizer"``.
        global_clusters: See there.
        group_images: See there.
        normalize: See there.
        max_kmeans_iters: See there.
        tol: See there.
        generator: See there; give each rank a seed of its own.
        local_labels: See there; of this rank's images.
        global_labels: See there; of this rank's images.
        global_centroids: See there; of this rank's groups.

    Returns:
        The components of the global batch, with the labels and centroids of this rank.

    Raises:
        RuntimeError: If ``torch.distributed`` is not initialized, if this process is not in the
            group, if the ranks' d differ, or if another rank failed: all ranks raise, and the
            error names the rank and its reason.
        ValueError: If an argument is not accepted.

    Examples:
        >>> import torch, torch.distributed as dist  # On every rank, started by torchrun:
        >>> dist.init_process_group("gloo")  # doctest: +SKIP
        >>> components = global_dse_components(torch.randn(8, 49, 32), "world")  # doctest: +SKIP
    """
    group = resolve_group(process_group)
    local: _Local | None = None
    failure: Exception | None = None
    try:
        _require_reachable(z, group)
        # Its m_dim is that of the rank alone, which nobody needs: the price of one fused operator.
        components = dse_components(
            z, "regularizer", local_clusters, global_clusters, group_images, normalize,
            max_kmeans_iters, tol, generator, local_labels, global_labels, global_centroids,
        )  # fmt: skip
        if group_images is None:
            group_images = max(global_clusters // local_clusters, 1)
        counts = _counts(components, local_clusters, group_images)
        local = _measure(z.detach(), components, counts, normalize)
    except Exception as error:  # told to the other ranks first, which would wait for this one
        failure = error
    _agree(group, local, failure)
    assert local is not None  # or the line above has raised
    return _reduce(z, local, group)


def resolve_group(process_group: ProcessGroup | str) -> ProcessGroup:
    """The group that is meant, checked.

    Args:
        process_group:
            A group, or ``"world"``.

    Raises:
        ValueError: If it is neither.
        RuntimeError: If there is no such group, or this process is not in it.
    """
    import torch.distributed as dist

    if isinstance(process_group, str) and process_group != "world":
        raise ValueError(
            f"process_group must be a ProcessGroup, 'world' or None, got {process_group!r}."
        )
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "process_group needs torch.distributed: call torch.distributed.init_process_group() "
            "in processes started by torchrun, or leave process_group None."
        )
    group: Any = dist.group.WORLD if process_group == "world" else process_group
    if not isinstance(group, dist.ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise RuntimeError("process_group must contain this process, which it does not.")
        raise ValueError(
            "process_group must be a ProcessGroup, 'world' or None, "
            f"got {type(process_group).__name__}."
        )
    return group


class _Local(NamedTuple):
    """What a rank knows before it has heard of the others."""

    components: DSEComponents
    norms: Tensor  # (B, N) float64, lengths of the rows, at least 1e-12
    sums: Tensor  # (d,) float64, sum of the rows
    moment: Tensor  # (d, d) float64, XᵀX
    counts: Tensor  # (3,) float64: groups in m_inter, images and clusters in m_intra
    normalize: bool


def _measure(z: Tensor, components: DSEComponents, counts: Tensor, normalize: bool) -> _Local:
    norms = torch.ones(z.shape[:2], dtype=torch.float64, device=z.device)
    sums = torch.zeros(z.shape[2], dtype=torch.float64, device=z.device)
    moment = torch.zeros(z.shape[2], z.shape[2], dtype=torch.float64, device=z.device)
    for images in _blocks(z.shape):
        if normalize:
            lengths = torch.linalg.vector_norm(z[images], dim=2, dtype=torch.float64)
            norms[images] = lengths.clamp(min=_NORMALIZE_EPS)
        x = _rows(z, norms, images)
        sums += x.sum(dim=0)
        moment.addmm_(x.mT, x)
    return _Local(components, norms, sums, moment, counts, normalize)


def _counts(components: DSEComponents, local_clusters: int, group_images: int) -> Tensor:
    """Numbers of terms in the three means of this rank: groups, images and clusters."""
    images, _ = components.local_labels.shape
    groups, centroids, _ = components.global_centroids.shape
    local_sizes = _sizes(components.local_labels, images, local_clusters)
    group_of = torch.arange(images, device=local_sizes.device) // min(group_images, images)
    # The labels of a group's images, numbered through: as if the group were one image.
    labels = components.global_labels + (group_of * centroids)[:, None]
    global_sizes = _sizes(labels.reshape(1, -1), 1, groups * centroids)
    exist = components.global_centroids.isfinite().all(dim=2).sum(dim=1)
    terms = [(exist > 1).sum(), (local_sizes > 1).any(dim=1).sum(), (global_sizes > 1).sum()]
    return torch.stack(terms).to(torch.float64)


def _sizes(labels: Tensor, sets: int, width: int) -> Tensor:
    """Number of rows of every cluster of every set."""
    return labels.new_zeros(sets, width).scatter_add_(1, labels, torch.ones_like(labels))


def _require_reachable(z: Any, group: ProcessGroup) -> None:
    """A tensor that the group's backend cannot send would fail within a collective."""
    import torch.distributed as dist

    if isinstance(z, Tensor) and dist.get_backend(group) == "nccl" and z.device.type != "cuda":
        raise ValueError(f"z must be on a CUDA device for an NCCL process_group, got {z.device}.")


def _agree(group: ProcessGroup, local: _Local | None, failure: Exception | None) -> None:
    """Raises on every rank if any rank failed, before anybody waits for it."""
    import torch.distributed as dist

    dim = -1 if local is None else local.sums.numel()
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    status = torch.tensor([dim], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(status) for _ in range(group.size())]
    dist.all_gather(gathered, status, group=group)
    dims = torch.cat(gathered).tolist()
    if -1 in dims:
        reasons: list[Any] = [None] * group.size()
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(reasons, mine, group=group)
        if failure is not None:
            raise failure
        rank, reason = next((r, text) for r, text in enumerate(reasons) if text is not None)
        raise RuntimeError(f"rank {rank} of the process group could not compute DSE: {reason}")
    if len(set(dims)) > 1:
        raise RuntimeError(
            f"z must have the same number of features on all ranks, got {dims} on ranks 0, 1, ..."
        )


def _reduce(z: Tensor, local: _Local, group: ProcessGroup) -> DSEComponents:
    """The components of the global batch, differentiable."""
    import torch.distributed as dist

    world, dim = group.size(), z.shape[2]
    c = local.components
    # Undone: the division by the rank's own spread, with its gradient.
    means = torch.stack([c.m_inter, c.m_intra_image, c.m_intra_batch]) * c.avg_norm
    rows = z.new_full((1,), z.shape[0] * z.shape[1], dtype=torch.float64)
    message = torch.cat([local.sums, local.counts, rows, local.moment.flatten()])
    dist.all_reduce(message, group=group)
    sums, counts, total, flat = message.split([dim, 3, 1, dim * dim])
    moment = flat.view(dim, dim)
    mean = sums / total
    # Rows that differ by the rounding of the mean alone are equal.
    floor = 4 * _EPS * moment.diagonal().sum().sqrt()

    features = z.detach()
    spread = torch.zeros(1 + dim, dtype=torch.float64, device=z.device)
    for images in _blocks(z.shape):
        distances, directions = _from_mean(_rows(features, local.norms, images), mean, floor)
        spread[0] += distances.sum()
        spread[1:] += directions.sum(dim=0)
    dist.all_reduce(spread, group=group)
    spread = spread / total

    rank, kernel = _effective_rank(features, local, moment, total, group)
    avg_norm, m_dim = _Global.apply(
        z, local.norms, mean, floor, spread, rank, kernel, total, world, local.normalize
    )
    terms = _Sum.apply(means * local.counts.to(means.dtype), group)
    terms = terms / counts.clamp(min=1).to(means.dtype)
    m_inter, m_intra_image, m_intra_batch = (
        terms / torch.where(avg_norm == 0, 1, avg_norm)
    ).unbind()
    return DSEComponents(
        m_inter, m_intra_image, m_intra_batch, m_dim, avg_norm,
        c.local_labels, c.global_labels, c.global_centroids,
    )  # fmt: skip


class _Sum(torch.autograd.Function):
    """Sum over ranks. Every rank goes on with the same weight, so no gradient is sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        import torch.distributed as dist

        ctx.world = group.size()
        total = x.detach().to(torch.float64)
        dist.all_reduce(total, group=group)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.world, None


class _Global(torch.autograd.Function):
    """avg_norm and m_dim of all rows as functions of this rank's rows, with their closed forms."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        norms: Tensor,
        mean: Tensor,
        floor: Tensor,
        spread: Tensor,
        rank: Tensor,
        kernel: Tensor,
        total: Tensor,
        world: int,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, norms, mean, floor, spread, kernel, total)
        ctx.world, ctx.normalize = world, normalize
        real = torch.float64 if z.dtype == torch.float64 else torch.float32
        return spread[0].to(real), rank.to(real)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, norms, mean, floor, spread, kernel, total = ctx.saved_tensors
        w_norm, w_dim = (ctx.world * grad.to(torch.float64) for grad in grads)
        kernel = w_dim * kernel
        grad_z = torch.empty_like(z)
        for images in _blocks(z.shape):
            x = _rows(z, norms, images)
            _, directions = _from_mean(x, mean, floor)
            grad = torch.addmm(w_norm / total * (directions - spread[1:]), x, kernel)
            if ctx.normalize:
                lengths = norms[images].flatten()[:, None]
                # Below the clamp of F.normalize the length is a constant.
                along = torch.where(lengths > _NORMALIZE_EPS, (x * grad).sum(1, keepdim=True), 0)
                grad = (grad - x * along) / lengths
            grad_z[images] = grad.view(-1, *z.shape[1:]).to(z.dtype)
        return grad_z, *(None,) * 9


def _effective_rank(
    z: Tensor, local: _Local, moment: Tensor, total: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Effective rank of all rows ÷ min(M, d), and K with gradient X K."""
    rows, dim = total, z.shape[2]
    finite = moment.isfinite().all()
    safe = torch.where(finite, moment, torch.eye(dim, dtype=torch.float64, device=z.device))
    values, vectors = torch.linalg.eigh(safe)
    sigma = values.clamp(min=0).sqrt()
    # Fewer rows than features, and features that are 0 in all rows, hide that many zeros.
    null = torch.maximum((dim - rows).squeeze(), (moment.diagonal() == 0).sum())
    sigma = torch.where(torch.arange(dim, device=z.device) < null, 0, sigma)
    # On a GPU the test would wait for the device: there the Gram matrix has to do for what is not
    # float64.
    if z.dtype == torch.float64 or z.device.type == "cpu":
        limit = _STEEP_FLOAT64 if z.dtype == torch.float64 else _STEEP
        steep = finite & ((values[0] < limit * values[-1]) & (values[-1] > 0))
        if _any_rank(steep, group):
            sigma, vectors = _singular(z, local.norms, int(rows), group)
    length = sigma.sum()
    scale = torch.where(length > 0, length, 1)
    p = sigma / scale
    h = torch.special.entr(p).sum()
    rank = torch.where(length > 0, h.exp(), 0) / rows.clamp(max=dim).squeeze()
    positive = sigma > 0
    weights = -rank / scale * (torch.where(positive, p, 1).log() + h)
    weights = torch.where(positive, weights / torch.where(positive, sigma, 1), 0)
    kernel = (vectors * weights) @ vectors.mT
    nan = torch.where(finite, 0.0, torch.nan)
    return rank + nan, kernel + nan


def _any_rank(flag: Tensor, group: ProcessGroup) -> bool:
    """Whether the flag is set on any rank, so that all take the same branch."""
    import torch.distributed as dist

    raised = flag.to(torch.int32)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
    return bool(raised)


def _singular(z: Tensor, norms: Tensor, total: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of all rows, without a Gram matrix.

    The triangles of the ranks' rows, one over the other, have those of the whole matrix
    (tall-skinny QR, Demmel et al. 2012).
    """
    import torch.distributed as dist

    dim = z.shape[2]
    triangle = torch.zeros(dim, dim, dtype=torch.float64, device=z.device)
    for images in _blocks(z.shape):
        stacked = torch.cat([triangle, _rows(z, norms, images)])
        triangle = torch.linalg.qr(stacked, mode="r").R
    triangles = [torch.empty_like(triangle) for _ in range(group.size())]
    dist.all_gather(triangles, triangle.contiguous(), group=group)
    reduced = torch.linalg.qr(torch.cat(triangles), mode="r").R
    _, sigma, vectors = torch.linalg.svd(reduced)
    # What is left of a zero by the rounding of the decomposition.
    sigma = torch.where(sigma > max(total, dim) * _EPS * sigma[0], sigma, 0)
    return sigma, vectors.mT


def _blocks(shape: torch.Size) -> Iterator[slice]:
    """Slices of images of a few thousand rows: no copy of all features in float64."""
    step = max(_BLOCK_ROWS // shape[1], 1)
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def _rows(z: Tensor, norms: Tensor, images: slice) -> Tensor:
    """The rows of some images as DSE sees them, ``(n, d)`` float64."""
    return (z[images].to(torch.float64) / norms[images].unsqueeze(2)).flatten(0, 1)


def _from_mean(x: Tensor, mean: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of rows from the mean, and the unit vectors away from it."""
    away = x - mean
    distances = torch.linalg.vector_norm(away, dim=1)
    # Written so that NaN passes.
    equal = distances <= floor
    distances = torch.where(equal, 0, distances)
    directions = torch.where(equal[:, None], 0, away / torch.where(equal, 1, distances)[:, None])
    return distances, directions
