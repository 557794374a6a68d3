"""The functions of dse_ext: checked arguments in, named results out.

Definitions and variants: docs/definitions.md; paper: "Exploring Structural Degradation in Dense
Representations for Self-supervised Learning", NeurIPS 2025, https://arxiv.org/abs/2510.17299.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dse_ext import ops as _ops  # loads torch.ops.dse_ext

VARIANTS = ("regularizer", "evaluation", "paper")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

assert _ops.LIBRARIES


class DSEComponents(NamedTuple):
    """The parts of DSE, and the clusters that they were measured on.

    Attributes:
        m_inter:
            Mean distance of a row to the nearest centroid other than its own; 0-dim.
        m_intra_image:
            Mean radius of the local clusters; 0-dim.
        m_intra_batch:
            Mean radius of the global clusters; 0-dim.
        m_dim:
            Effective rank; 0-dim.
        avg_norm:
            Mean distance of a row from the mean of all rows; 0-dim.
        local_labels:
            Cluster of every position within its image, shape ``(B, N)``, int64.
        global_labels:
            Cluster of every position within its group of images, shape ``(B, N)``, int64.
        global_centroids:
            Centroids of the global clusters, shape ``(G, k, d)``; ``inf`` where a cluster has no
            centroid (a last group with fewer rows than clusters; a given label that no row has).
    """

    m_inter: Tensor
    m_intra_image: Tensor
    m_intra_batch: Tensor
    m_dim: Tensor
    avg_norm: Tensor
    local_labels: Tensor
    global_labels: Tensor
    global_centroids: Tensor

    @property
    def class_relevance(self) -> Tensor:
        """Class separability, ``m_inter - (m_intra_image + m_intra_batch) / 2``; 0-dim."""
        return self.m_inter - (self.m_intra_image + self.m_intra_batch) / 2

    def score(self, dim_weight: float = 1.0) -> Tensor:
        """DSE: ``m_inter - (m_intra_image + m_intra_batch) / 2 + dim_weight * m_dim``; 0-dim.

        Args:
            dim_weight:
                λ of the paper: 1 in training, :func:`dse_ext.dse_lambda` over the checkpoints of
                a run.
        """
        return self.class_relevance + dim_weight * self.m_dim

    def detach(self) -> DSEComponents:
        """The same values without their history."""
        return DSEComponents(*(value.detach() for value in self))


class KMeansResult(NamedTuple):
    """Result of :func:`kmeans`: ``centroids (G, k, d)``, ``labels (G, n)``, ``inertia (G,)``."""

    centroids: Tensor
    labels: Tensor
    inertia: Tensor


def _require_features(x: Tensor, name: str, axes: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor of shape {axes}, got {type(x).__name__}.")
    if x.ndim != 3:
        raise ValueError(f"{name} must have shape {axes}, got {tuple(x.shape)}.")
    _require_dtype_and_size(x, name)


def _require_dtype_and_size(x: Tensor, name: str) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}.")
    if 0 in x.shape:
        raise ValueError(f"{name} must have no empty axis, got shape {tuple(x.shape)}.")


def _require_at_least_one(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}.")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}.")


def _as_labels(
    labels: Tensor | None, name: str, shape: tuple[int, ...], like: Tensor
) -> Tensor | None:
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{name} must be an integer tensor of shape {shape}, got {given}.")
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(labels.shape)}.")
    _require_device(labels, name, like)
    return labels.to(torch.int64)


def _require_device(x: Tensor, name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the features' device ({like.device}), got {x.device}.")


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A fresh seed as a tensor on ``device``: no host synchronization, and redrawn by graphs."""
    if generator is None or generator.device == device:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    drawn = torch.randint(
        2**63 - 1, (), dtype=torch.int64, device=generator.device, generator=generator
    )
    return drawn.to(device)


def dse_components(
    z: Tensor,
    variant: str = "regularizer",
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
    """Compute the components of DSE of dense features, differentiably.

    Rows are L2-normalized, clustered within each image (k-means with ``local_clusters``) and
    within groups of ``group_images`` consecutive images (``global_clusters``); then

    * ``m_intra_image``, ``m_intra_batch``: mean radius of the local and of the global clusters. The
      radius of a cluster is the nuclear norm of its centred rows, scaled by its size;
    * ``m_inter``: mean distance of a row to the nearest centroid of another global cluster;
    * ``m_dim``: effective rank (exponential of the entropy of the normalized singular values);
    * ``avg_norm``: mean distance of a row from the mean of all rows, by which the first three are
      divided (not in ``variant="paper"``).

    Labels and centroids are constants for the gradient; everything else is differentiated in
    closed form. Components are float32 (float64 for float64 features).

    Args:
        z:
            Features of shape ``(B, N, d)``: B images, N positions, d features. float64, float32,
            bfloat16 or float16, any strides. Convolutional features of shape ``(B, C, H, W)`` are
            ``flatten(2).transpose(1, 2)``.
        variant:
            ``"regularizer"`` (the authors' training code, lightly), ``"evaluation"`` (the authors'
            scoring code) or ``"paper"`` (Eq. 5).
        local_clusters:
            Clusters per image; capped by N.
        global_clusters:
            Clusters per group of images; capped by the rows of a group.
        group_images:
            Images in a group, ``max(global_clusters // local_clusters, 1)`` by default. The last
            group may be smaller.
        normalize:
            Whether to L2-normalize the features over d first (as ``F.normalize``).
        max_kmeans_iters:
            Lloyd iterations at most.
        tol:
            k-means stops when the Frobenius norm of the centroids' shift falls below this.
        generator:
            Source of the k-means++ seeds and of the permutations of ``"evaluation"``; torch's
            default generator of the features' device if None.
        local_labels:
            Labels of shape ``(B, N)`` in ``[0, local_clusters)`` that replace the k-means within
            images.
        global_labels:
            Labels of shape ``(B, N)`` in ``[0, global_clusters)`` that replace the k-means within
            groups. Without ``global_centroids`` the centroids are the means of the labelled rows.
        global_centroids:
            Centroids of shape ``(G, k, d)`` for each of the G groups; k takes the place of
            ``global_clusters``. A centroid that is not finite does not exist. Without
            ``global_labels`` every row is labelled by its nearest centroid.

    Returns:
        The components and the clusters, see :class:`DSEComponents`. NaN in all components (and in
        the gradient) if a feature is not finite. A component without a single term (no cluster of
        two rows, no second centroid) is 0.

    Raises:
        ValueError: If an argument's shape, dtype, device or value is not accepted.
        RuntimeError: If a label is out of range.

    Examples:
        >>> z = torch.randn(4, 16, 8, requires_grad=True)
        >>> components = dse_components(z, global_clusters=6)
        >>> components.score().backward()
        >>> z.grad.shape
        torch.Size([4, 16, 8])
    """
    _require_features(z, "z", "(B, N, d)")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}.")
    _require_at_least_one(
        local_clusters=local_clusters,
        global_clusters=global_clusters,
        group_images=group_images,
        max_kmeans_iters=max_kmeans_iters,
    )
    _require_positive(tol=tol)
    images, positions, dim = z.shape
    local_labels = _as_labels(local_labels, "local_labels", (images, positions), z)
    global_labels = _as_labels(global_labels, "global_labels", (images, positions), z)
    if group_images is None:
        group_images = max(global_clusters // local_clusters, 1)
    if global_centroids is not None:
        group = min(group_images, images)
        groups = (images + group - 1) // group
        given = tuple(global_centroids.shape)
        if len(given) != 3 or given[0] != groups or given[1] < 1 or given[2] != dim:
            raise ValueError(
                f"global_centroids must have shape (G, k, d) = ({groups}, k, {dim}) with k >= 1, "
                f"got {given}."
            )
        if global_centroids.dtype not in _FLOATS:
            raise ValueError(
                f"global_centroids must be a floating-point tensor, got {global_centroids.dtype}."
            )
        _require_device(global_centroids, "global_centroids", z)
        global_centroids = global_centroids.detach()
    clusters_given = local_labels is not None and (
        global_labels is not None or global_centroids is not None
    )
    if clusters_given and variant != "evaluation":
        # Nothing is random: leave the generator alone.
        seed = torch.zeros((), dtype=torch.int64, device=z.device)
    else:
        seed = _draw_seed(z.device, generator)
    outputs = torch.ops.dse_ext.dse_components(
        z, seed, variant, local_clusters, global_clusters, group_images, normalize,
        max_kmeans_iters, tol, local_labels, global_labels, global_centroids,
        torch.is_grad_enabled() and z.requires_grad,
    )  # fmt: skip
    return DSEComponents(*outputs[:8])


def kmeans(
    x: Tensor,
    k: int,
    max_iters: int = 20,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> KMeansResult:
    """Cluster each set of rows by k-means: k-means++ seeding, then Lloyd iterations.

    Args:
        x:
            Rows of shape ``(G, n, d)``: G independent sets of n rows.
        k:
            Clusters per set; capped by n.
        max_iters:
            Lloyd iterations at most.
        tol:
            Stops when the Frobenius norm of the centroids' shift falls below this.
        generator:
            Source of randomness; torch's default generator of ``x``'s device if None.

    Returns:
        ``centroids (G, k, d)``, ``labels (G, n)`` (the nearest centroid, the lower index on ties)
        and ``inertia (G,)``, the sum of squared distances. Not differentiable. NaN centroids and
        inertia for a set with a value that is not finite.

    Raises:
        ValueError: If an argument's shape, dtype or value is not accepted.

    Examples:
        >>> centroids, labels, inertia = kmeans(torch.randn(2, 50, 8), k=4)
        >>> centroids.shape, labels.shape, inertia.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 50]), torch.Size([2]))
    """
    _require_features(x, "x", "(G, n, d)")
    _require_at_least_one(k=k, max_iters=max_iters)
    _require_positive(tol=tol)
    seed = _draw_seed(x.device, generator)
    return KMeansResult(*torch.ops.dse_ext.kmeans(x.detach(), k, seed, max_iters, tol))


def cluster_nuclear_norms(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """Nuclear norm (sum of singular values) of the centred rows of every cluster.

    Args:
        x:
            Rows of shape ``(G, n, d)``.
        labels:
            Cluster of every row, shape ``(G, n)``, integers in ``[0, k)``.
        k:
            Number of clusters.

    Returns:
        Norms of shape ``(G, k)``, differentiable with respect to ``x``; 0 for a cluster of fewer
        than two rows.

    Raises:
        ValueError: If an argument's shape, dtype, device or value is not accepted.
        RuntimeError: If a label is out of range.

    Examples:
        >>> x = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]]])
        >>> cluster_nuclear_norms(x, torch.tensor([[0, 0, 1]]), k=2)
        tensor([[1.4142, 0.0000]])
    """
    _require_features(x, "x", "(G, n, d)")
    _require_at_least_one(k=k)
    checked = _as_labels(labels, "labels", (x.shape[0], x.shape[1]), x)
    save = torch.is_grad_enabled() and x.requires_grad
    norms: Tensor = torch.ops.dse_ext.cluster_nuclear_norms(x, checked, k, save)[0]
    return norms


def effective_rank(x: Tensor, center: bool = False) -> Tensor:
    """Effective rank: the exponential of the entropy of the normalized singular values.

    ``exp(-sum p log p)`` with ``p = s / sum(s)`` (Roy & Vetterli, EUSIPCO 2007).

    Args:
        x:
            Matrices of shape ``(..., n, d)``.
        center:
            Whether to subtract the mean of the rows first.

    Returns:
        Effective ranks of shape ``(...)``, differentiable, between 1 and ``min(n, d)``; 0 for a
        matrix of zeros.

    Raises:
        ValueError: If ``x``'s shape or dtype is not accepted.

    Examples:
        >>> effective_rank(torch.eye(5))
        tensor(5.)
    """
    if not isinstance(x, Tensor) or x.ndim < 2:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of shape (..., n, d), got {given}.")
    _require_dtype_and_size(x, "x")
    save = torch.is_grad_enabled() and x.requires_grad
    rank: Tensor = torch.ops.dse_ext.effective_rank(x, center, save)[0]
    return rank
