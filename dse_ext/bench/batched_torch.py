"""DSE and its parts in batched PyTorch: the peer that a careful user would write.

The regularizer has no Python loop over images, groups or clusters, no custom kernel and no
hand-written gradient: every step is a batched PyTorch operation and autograd does the rest. What is
tuned:

- k-means++ updates the distance to the nearest centroid with the newest centroid only, and Lloyd
  iterations assign by one batched product and move the centroids by a product with the one-hot
  labels. Problems that have converged stop moving; the loop ends when all have.
- Nuclear norms come from the eigenvalues of the smaller Gram matrix, not from an SVD. Clusters
  are sorted by size and padded in buckets of similar size, because padding every cluster to the
  largest one costs more than batching wins (eigendecompositions are cubic in the size).
- The effective rank comes from the eigenvalues of the second moment.

Gram matrices halve the digits: in float32 its gradient is off by percents where the rank of the
features has collapsed. Elsewhere, and given labels in place of the k-means, it computes what
`lightly.loss.regularizer.DSERegularizer` computes; `python_tests/test_benchmarks_peers.py` holds
it to that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module


class BatchedDSERegularizer(Module):
    """DSE regularizer for features of shape `(B, N, d)`, as −weight · DSE.

    Attributes:
        weight: Weight of the regularization term.
        normalize: If True, L2-normalize the features first.
        local_clusters: Number of clusters in each image.
        global_clusters: Number of clusters in each group of images.
        max_kmeans_iters: Maximum number of Lloyd iterations.
        tol: Centroid shift at which k-means stops.
        group_images: Images in a group, `max(global_clusters // local_clusters, 1)` if None.
    """

    def __init__(
        self,
        weight: float = 1.0,
        normalize: bool = True,
        local_clusters: int = 3,
        global_clusters: int = 24,
        max_kmeans_iters: int = 20,
        tol: float = 1e-4,
        group_images: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.normalize = normalize
        self.local_clusters = local_clusters
        self.global_clusters = global_clusters
        self.max_kmeans_iters = max_kmeans_iters
        self.tol = tol
        self.group_images = group_images or max(global_clusters // local_clusters, 1)

    def forward(self, z: Tensor) -> Tensor:
        """The loss of features of shape `(B, N, d)`, a 0-dim tensor."""
        return self.loss(z, *self.clusters(z))

    @torch.no_grad()
    def clusters(self, z: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """K-means labels and centroids, as `loss` takes them."""
        x = F.normalize(z, dim=-1) if self.normalize else z
        stop = self.max_kmeans_iters, self.tol
        parts = [kmeans(group, self.global_clusters, stop) for group in self._groups(x)]
        local_labels = kmeans(x, self.local_clusters, stop)[1]
        return local_labels, [labels for _, labels in parts], [c for c, _ in parts]

    def loss(
        self, z: Tensor, local_labels: Tensor, global_labels: list[Tensor], centroids: list[Tensor]
    ) -> Tensor:
        """The loss for given clusters.

        Args:
            z: Features `(B, N, d)`.
            local_labels: `(B, N)`.
            global_labels: Labels of the full groups, `(G, g * N)`, and of the smaller last group,
                `(0 or 1, n)`.
            centroids: Centroids of the same, `(G, k, d)` and `(0 or 1, k', d)`.
        """
        x = F.normalize(z, dim=-1) if self.normalize else z
        avg_norm = torch.linalg.vector_norm(x - x.mean(dim=(0, 1)), dim=-1).mean() + 1e-12

        norms, counts = cluster_nuclear_norms(x, local_labels, self.local_clusters)
        norms = norms * _radius_scale(counts, x)
        valid = counts > 1
        per_image = norms.sum(dim=1) / valid.sum(dim=1).clamp(min=1)
        images = valid.any(dim=1).sum().clamp(min=1)
        m_intra_image = per_image.sum() / images

        total, clusters, inter = x.new_zeros(()), 0, []
        for group, labels, c in zip(self._groups(x), global_labels, centroids, strict=True):
            if group.shape[0] == 0:
                continue
            norms, counts = cluster_nuclear_norms(group, labels, c.shape[1])
            total = total + (norms * _radius_scale(counts, x)).sum()
            clusters += int((counts > 1).sum())
            if c.shape[1] > 1:
                inter.append(distance_to_nearest_other(group, labels, c).mean(dim=1))
        m_intra_batch = total / max(clusters, 1)
        m_inter = torch.cat(inter).mean() if inter else x.new_zeros(())

        m_dim = effective_rank(x.reshape(-1, x.shape[-1])) / min(x[..., 0].numel(), x.shape[-1])
        dse = (m_inter - (m_intra_image + m_intra_batch) / 2) / avg_norm + m_dim
        loss: Tensor = -self.weight * dse
        return loss

    def _groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The full groups `(G, g * N, d)` and the smaller last one `(0 or 1, n, d)`."""
        images, positions, dim = x.shape
        size = self.group_images
        full = images // size * size
        rows = (images - full) * positions
        return (
            x[:full].reshape(-1, size * positions, dim),
            x[full:].reshape(1 if rows else 0, rows, dim),
        )


@torch.no_grad()
def kmeans(x: Tensor, k: int, stop: tuple[int, float]) -> tuple[Tensor, Tensor]:
    """K-means of a batch of problems.

    Args:
        x: `(G, n, d)`.
        k: Number of clusters, capped by n.
        stop: Maximum number of Lloyd iterations and the centroid shift at which a problem stops.

    Returns:
        Centroids `(G, k, d)` and labels `(G, n)`.
    """
    problems, n, _ = x.shape
    k = min(k, n)
    if problems == 0:
        return x[:, :k], torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    centroids = _kmeans_plus_plus(x, k)
    max_iters, tol = stop
    active = torch.ones(problems, 1, 1, dtype=torch.bool, device=x.device)
    for _ in range(max_iters):
        one_hot = F.one_hot(_nearest(x, centroids), k).to(x.dtype)
        counts = one_hot.sum(dim=1).unsqueeze(-1)
        means = torch.bmm(one_hot.mT, x) / counts.clamp(min=1)
        spare = torch.randint(n, (problems, k), device=x.device)
        means = torch.where(counts > 0, means, _gather_rows(x, spare))
        shift = torch.linalg.vector_norm(means - centroids, dim=(1, 2), keepdim=True)
        centroids = torch.where(active, means, centroids)
        active = active & (shift >= tol)
        if not active.any():
            break
    return centroids, _nearest(x, centroids)


def _kmeans_plus_plus(x: Tensor, k: int) -> Tensor:
    problems, n, _ = x.shape
    chosen = _gather_rows(x, torch.randint(n, (problems, 1), device=x.device))
    centroids = [chosen]
    squares = x.square().sum(dim=-1)
    nearest = torch.full_like(squares, float("inf"))
    for _ in range(k - 1):
        dots = torch.bmm(x, chosen.mT).squeeze(-1)
        distance = (squares - 2 * dots + chosen.square().sum(dim=-1)).clamp(min=0)
        nearest = torch.minimum(nearest, distance)
        # Where every row is a centroid already, any row will do.
        odds = torch.where(nearest.amax(dim=1, keepdim=True) > 0, nearest, 1)
        chosen = _gather_rows(x, torch.multinomial(odds, 1))
        centroids.append(chosen)
    return torch.cat(centroids, dim=1)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    offset = centroids.square().sum(dim=-1).unsqueeze(1)
    return torch.baddbmm(offset, x, centroids.mT, alpha=-2).argmin(dim=-1)


def distance_to_nearest_other(x: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Distance of every row `(G, n, d)` to the nearest centroid that is not its own, `(G, n)`."""
    with torch.no_grad():
        offset = centroids.square().sum(dim=-1).unsqueeze(1)
        score = torch.baddbmm(offset, x, centroids.mT, alpha=-2)
        score.scatter_(2, labels.unsqueeze(-1), float("inf"))
        other = _gather_rows(centroids, score.argmin(dim=-1))
    distance: Tensor = torch.linalg.vector_norm(x - other, dim=-1)
    return distance


def _radius_scale(counts: Tensor, x: Tensor) -> Tensor:
    """1 / √max(n_c − 1, d) of clusters of `counts` rows."""
    return (counts - 1).clamp(min=x.shape[-1]).to(x.dtype).rsqrt()


def gram_singular_values(blocks: Tensor) -> Tensor:
    """Singular values of matrices `(m, n, d)` from the eigenvalues of the smaller Gram matrix."""
    n, dim = blocks.shape[1:]
    gram = torch.bmm(blocks, blocks.mT) if n <= dim else torch.bmm(blocks.mT, blocks)
    return _square_roots(torch.linalg.eigvalsh(gram))


def cluster_nuclear_norms(
    x: Tensor,
    labels: Tensor,
    k: int,
    singular_values: Callable[[Tensor], Tensor] = gram_singular_values,
) -> tuple[Tensor, Tensor]:
    """Nuclear norms of the centred clusters of a batch of problems.

    Args:
        x: `(G, n, d)`.
        labels: `(G, n)`, in [0, k).
        k: Number of clusters.
        singular_values: Of matrices `(m, n, d)`, such as `torch.linalg.svdvals`.

    Returns:
        ‖H X_c‖_*, `(G, k)`, 0 where n_c < 2; and n_c, `(G, k)`.
    """
    problems, dim = x.shape[0], x.shape[2]
    one_hot = F.one_hot(labels, k)
    counts = one_hot.sum(dim=1)
    means = torch.bmm(one_hot.to(x.dtype).mT, x) / counts.clamp(min=1).unsqueeze(-1)
    flat = (labels + k * torch.arange(problems, device=x.device).unsqueeze(1)).reshape(-1)
    sizes = counts.reshape(-1)

    # Rows in the order of their cluster, clusters in the order of their size: the clusters of a
    # bucket are then neighbours, and one split (whose backward is one concatenation) parts them.
    by_size = sizes.argsort(stable=True)
    rank = torch.empty_like(by_size).scatter_(0, by_size, torch.arange(len(sizes), device=x.device))
    rows = rank[flat].argsort(stable=True)
    ordered = x.reshape(-1, dim).index_select(0, rows)
    ordered = ordered - means.reshape(-1, dim).index_select(0, flat[rows])

    norms = []
    sizes = sizes[by_size]
    buckets = _bucket_lengths(sizes)
    row_counts = [int(part.sum()) for part in sizes.split(buckets)]
    for n_c, part in zip(sizes.split(buckets), ordered.split(row_counts), strict=True):
        width = int(n_c[-1])
        if width < 2:
            norms.append(x.new_zeros(len(n_c)))
            continue
        slots = torch.arange(width, device=x.device)
        inside = slots < n_c.unsqueeze(1)
        # One row of zeros behind the last row is what the padding points to.
        index = torch.where(inside, (n_c.cumsum(0) - n_c).unsqueeze(1) + slots, len(part))
        block = F.pad(part, (0, 0, 0, 1))[index.reshape(-1)].reshape(len(n_c), width, dim)
        norms.append(singular_values(block).sum(dim=-1))
    return torch.cat(norms)[rank].reshape(problems, k), counts


def _bucket_lengths(sizes: Tensor, step: int = 16) -> list[int]:
    """How many clusters, in ascending size, share a width: sizes 0 to 1, then steps of 16."""
    width = torch.where(sizes < 2, 0, (sizes + step - 1) // step)
    lengths: list[int] = torch.unique_consecutive(width, return_counts=True)[1].tolist()
    return lengths


def effective_rank(
    x: Tensor, singular_values: Callable[[Tensor], Tensor] = gram_singular_values
) -> Tensor:
    """The exponential of the entropy of the normalized singular values of a matrix.

    Args:
        x: `(n, d)`.
        singular_values: Of matrices `(m, n, d)`, such as `torch.linalg.svdvals`.

    Returns:
        0-dim.
    """
    sigma = singular_values(x.unsqueeze(0)).squeeze(0)
    p = sigma / (sigma.sum() + 1e-12)
    return torch.exp(torch.special.entr(p).sum())


def _square_roots(eigenvalues: Tensor) -> Tensor:
    """Square roots of eigenvalues, 0 with gradient 0 where they are rounding noise."""
    info = torch.finfo(eigenvalues.dtype)
    positive = eigenvalues > info.eps * eigenvalues[..., -1:].clamp(min=info.tiny)
    return torch.where(positive, torch.where(positive, eigenvalues, 1).sqrt(), 0)


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `(G, m, d)` of `(G, n, d)` by index `(G, m)`."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), index]
