"""The DSE components, written from their definitions and from nothing else.

Everything here is float64, one loop per image and per cluster, one SVD per matrix. It is slow on
purpose: a reader should be able to check each line against the definition that it implements.
The library is compared with this module; this module is compared with hand-computed cases and
with ``lightly`` in ``test_oracle.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

VARIANTS = ("regularizer", "evaluation", "paper")
EXACT = "donot_use_mm_for_euclid_dist"  # torch.cdist's name for differences, then squares
COMPONENTS = ("m_inter", "m_intra_image", "m_intra_batch", "m_dim", "avg_norm")


class Components(NamedTuple):
    """The five numbers, each a 0-dim float64 tensor that is differentiable with respect to z."""

    m_inter: Tensor
    m_intra_image: Tensor
    m_intra_batch: Tensor
    m_dim: Tensor
    avg_norm: Tensor

    def score(self, dim_weight: float = 1.0) -> Tensor:
        """M_inter + dim_weight * M_dim - (M_intra_image + M_intra_batch) / 2."""
        intra = (self.m_intra_image + self.m_intra_batch) / 2
        return self.m_inter + dim_weight * self.m_dim - intra


def singular_values(x: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """Nonzero singular values of one matrix, differentiable also where the rank is deficient.

    ``d sigma_i / dX = u_i v_i^T``, so ``sigma_i = <u_i v_i^T, X>`` with the vectors held constant
    has the right value and the right first derivative. Values at the level of rounding are left
    out: their vectors are arbitrary, and without them the nuclear norm's derivative is its
    subgradient of smallest norm, the one that a pseudo-inverse gives. ``magnitude`` is the norm
    of what ``x`` is a small difference of: the rounding of that is larger than ``x``'s own.
    """
    u, s, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    if s.numel() == 0:
        return s
    eps = torch.finfo(s.dtype).eps
    floor = max(x.shape) * eps * s[0]
    if magnitude is not None:
        floor = torch.maximum(floor, 8 * eps * magnitude.detach())
    keep = s > floor
    return torch.einsum("ni,nd,id->i", u[:, keep], x, vh[keep])


def effective_rank(x: Tensor, center: bool = False) -> Tensor:
    """exp of the entropy of the singular values, of one (n, d) matrix; 0 for a matrix of zeros."""
    magnitude = torch.linalg.matrix_norm(x)
    if center:
        x = x - x.mean(dim=0, keepdim=True)
    s = singular_values(x, magnitude)
    if s.numel() == 0:
        return x.sum() * 0
    p = s / s.sum()
    return torch.exp(-(p * p.log()).sum())


def centered_nuclear_norm(rows: Tensor) -> Tensor:
    """Sum of the singular values of the rows minus their mean."""
    magnitude = torch.linalg.matrix_norm(rows)
    return singular_values(rows - rows.mean(dim=0, keepdim=True), magnitude).sum()


def cluster_nuclear_norms(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """(G, n, d), (G, n) -> (G, k); 0 for a cluster of fewer than two rows."""
    result = []
    for rows, assigned in zip(x, labels, strict=True):
        for cluster in range(k):
            members = rows[assigned == cluster]
            result.append(centered_nuclear_norm(members) if len(members) >= 2 else x.sum() * 0)
    return torch.stack(result).reshape(x.shape[0], k)


def radius_scale(n: int, d: int, variant: str) -> float:
    """The factor s(n, d) between a centred nuclear norm and a cluster radius."""
    return 1 / (n - 1) if variant == "paper" else 1 / math.sqrt(max(n - 1, d))


def radii(rows: Tensor, labels: Tensor, variant: str) -> list[Tensor]:
    """The radius of each cluster that has at least two rows."""
    result = []
    for cluster in labels.unique():
        members = rows[labels == cluster]
        if len(members) >= 2:
            scale = radius_scale(len(members), rows.shape[1], variant)
            result.append(centered_nuclear_norm(members) * scale)
    return result


def cluster_means(rows: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Label -> mean of its rows, a constant; a label without rows has no entry."""
    return {int(c): rows[labels == c].mean(dim=0).detach() for c in labels.unique()}


def separations(rows: Tensor, labels: Tensor, centroids: dict[int, Tensor]) -> Tensor | None:
    """Each row's distance to the nearest centroid other than its own; None if there is no other."""
    names = torch.tensor(list(centroids), dtype=torch.int64)
    own = labels[:, None] == names
    if bool(own.all(dim=1).any()):
        return None
    differences = rows[:, None] - torch.stack(list(centroids.values()))
    distances = torch.linalg.vector_norm(differences, dim=2)
    return distances.masked_fill(own, torch.inf).min(dim=1).values


def tied_rows(
    z: Tensor, global_labels: Tensor, global_centroids: Tensor, group_images: int, normalize: bool
) -> Tensor:
    """(B, N): rows whose gradient is a matter of choice.

    A row at the same distance from two centroids, or in the very place of another cluster's one,
    has no single derivative. Features rounded to few bits have such rows.
    """
    x = normalized(z.double()) if normalize else z.double()
    tied = torch.zeros(z.shape[:2], dtype=torch.bool)
    for g, members in enumerate(group_slices(len(z), group_images)):
        to_each = torch.cdist(x[members], global_centroids[g].double(), compute_mode=EXACT)
        to_each = to_each.nan_to_num(torch.inf, torch.inf).scatter(
            2, global_labels[members, :, None], torch.inf
        )
        nearest = to_each.sort(dim=2).values
        tied[members] = nearest[..., 0] < 1e-12
        if nearest.shape[2] > 1:
            tied[members] |= nearest[..., 1] - nearest[..., 0] < 1e-9 * nearest[..., 0]
    return tied


def mean_or_zero(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    """The mean of 0-dim tensors; 0 where there is no term."""
    return torch.stack(list(terms)).mean() if terms else like.sum() * 0


def group_slices(batch: int, group_images: int) -> list[slice]:
    """Consecutive groups of images; the last one may be smaller."""
    return [slice(s, min(s + group_images, batch)) for s in range(0, batch, group_images)]


def normalized(z: Tensor) -> Tensor:
    """Each row divided by max(its length, 1e-12)."""
    return z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(1e-12)


def dimensionality(x: Tensor, variant: str, permutation: Tensor | None) -> Tensor:
    """The component M_dim of (B, N, d) features.

    ``permutation`` (B, N) is used by the ``evaluation`` variant alone: matrix j holds row
    ``x[b, permutation[b, j]]`` of each image b. Left out, the positions stay as they are.
    """
    b, n, d = x.shape
    if variant == "paper":
        return effective_rank(x.reshape(b * n, d))
    if variant == "regularizer":
        return effective_rank(x.reshape(b * n, d)) / min(b * n, d)
    if permutation is None:
        permutation = torch.arange(n).expand(b, n)
    shuffled = torch.stack([image[order] for image, order in zip(x, permutation, strict=True)])
    return torch.stack([effective_rank(shuffled[:, j]) for j in range(n)]).mean() / min(b, d)


def dse_components(
    z: Tensor,
    local_labels: Tensor,
    global_labels: Tensor,
    global_centroids: Tensor | None = None,
    *,
    variant: str = "regularizer",
    group_images: int = 8,
    normalize: bool = True,
    permutation: Tensor | None = None,
) -> Components:
    """The components of features z (B, N, d) with the given clusters.

    Args:
        z: Features of any floating dtype; the arithmetic is float64 on the rounded values.
        local_labels: (B, N), the cluster of each position within its image.
        global_labels: (B, N), the cluster of each position within its group of images.
        global_centroids: (G, k, d), in the space of the (normalized) features. Left out, they are
            the means of the labelled rows. Rows that are not finite stand for no centroid.
        variant: One of ``VARIANTS``.
        group_images: Images per group.
        normalize: Whether rows are divided by their length.
        permutation: See ``dimensionality``.
    """
    x = z.double()
    if normalize:
        x = normalized(x)
    batch, _, d = x.shape
    center = x.mean(dim=(0, 1), keepdim=True)
    avg_norm = torch.linalg.vector_norm(x - center, dim=-1).mean()

    image_terms = []
    for image, labels in zip(x, local_labels, strict=True):
        image_radii = radii(image, labels, variant)
        if image_radii:
            image_terms.append(torch.stack(image_radii).mean())
    m_intra_image = mean_or_zero(image_terms, x)

    batch_radii: list[Tensor] = []
    inter_terms = []
    for g, members in enumerate(group_slices(batch, group_images)):
        rows, labels = x[members].reshape(-1, d), global_labels[members].reshape(-1)
        batch_radii += radii(rows, labels, variant)
        if global_centroids is None:
            centroids = cluster_means(rows, labels)
        else:
            given = global_centroids[g].double().detach()
            centroids = {i: c for i, c in enumerate(given) if bool(c.isfinite().all())}
        distances = separations(rows, labels, centroids)
        if distances is None:
            continue
        if variant == "paper":
            squared = distances**2
            inter_terms += [squared[labels == cluster].mean() for cluster in labels.unique()]
        else:
            inter_terms.append(distances.mean())
    m_intra_batch = mean_or_zero(batch_radii, x)
    m_inter = mean_or_zero(inter_terms, x)

    if variant != "paper" and avg_norm.item() > 0:
        m_inter = m_inter / avg_norm
        m_intra_image = m_intra_image / avg_norm
        m_intra_batch = m_intra_batch / avg_norm
    m_dim = dimensionality(x, variant, permutation)
    return Components(m_inter, m_intra_image, m_intra_batch, m_dim, avg_norm)
