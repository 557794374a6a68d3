"""DSE as a loss term, in the place of ``lightly.loss.regularizer.DSERegularizer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dse_ext.functional import DSEComponents, dse_components

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DSERegularizer(nn.Module):
    """Dense representation structure estimator as a regularizer: ``-weight * DSE``.

    Added to a self-supervised loss it rewards patch features that separate classes and span many
    dimensions ("Exploring Structural Degradation in Dense Representations for Self-supervised
    Learning", NeurIPS 2025, https://arxiv.org/abs/2510.17299; the paper trains with weight 0.001).
    Takes the place of lightly's ``DSERegularizer``: same leading arguments, errors and result.

    ``DSE = m_inter - (m_intra_image + m_intra_batch) / 2 + dim_weight * m_dim``, see
    :func:`dse_ext.dse_components` with ``variant="regularizer"``.

    Attributes:
        weight:
            Weight of the term, >= 0.
        normalize:
            Whether features are L2-normalized first.
        local_clusters:
            Clusters within each image.
        global_clusters:
            Clusters within each group of images.
        max_kmeans_iters:
            Lloyd iterations at most.
        tol:
            k-means stops when the centroids shift by less.
        group_images:
            Images in a group; ``max(global_clusters // local_clusters, 1)`` if None.
        dim_weight:
            Weight λ of the effective rank within DSE.
        generator:
            Source of randomness; torch's default generator if None.
        process_group:
            Ranks whose batches are taken as one; None for each rank's own batch.
        last:
            Components of the last call, detached, for logging; None before it.

    Examples:
        >>> regularizer = DSERegularizer(weight=0.001)
        >>> patch_tokens = torch.randn(8, 49, 32, requires_grad=True)  # (B, N, d)
        >>> ssl_loss = torch.tensor(1.0)
        >>> loss = ssl_loss + regularizer(patch_tokens)
        >>> loss.backward()
        >>> regularizer.last.m_dim.shape
        torch.Size([])
        >>>
        >>> # Convolutional features of shape (B, C, H, W):
        >>> features = torch.randn(8, 32, 7, 7)
        >>> loss = ssl_loss + regularizer(features.flatten(2).transpose(1, 2))
    """

    last: DSEComponents | None

    def __init__(
        self,
        weight: float = 1.0,
        normalize: bool = True,
        local_clusters: int = 3,
        global_clusters: int = 24,
        max_kmeans_iters: int = 20,
        tol: float = 1e-4,
        *,
        group_images: int | None = None,
        dim_weight: float = 1.0,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        """Check and keep the parameters.

        Args:
            weight: See the attributes.
            normalize: See the attributes.
            local_clusters: See the attributes.
            global_clusters: See the attributes.
            max_kmeans_iters: See the attributes.
            tol: See the attributes.
            group_images: See the attributes.
            dim_weight: See the attributes.
            generator: See the attributes.
            process_group:
                A process group of ``torch.distributed``, or ``"world"``, the default group at the
                time of the call. Clusters stay local, everything else is that of the batch of all
                ranks; the gradient is scaled for the mean over ranks that
                ``DistributedDataParallel`` and FSDP take, see
                :func:`dse_ext.distributed.global_dse_components`. None: DSE of the rank's own
                batch, without communication.

        Raises:
            ValueError: If ``weight`` is negative, a count is below 1 or ``tol`` is not positive.
        """
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must be >= 0, got {weight}.")
        if local_clusters < 1:
            raise ValueError(f"local_clusters must be >= 1, got {local_clusters}.")
        if global_clusters < 1:
            raise ValueError(f"global_clusters must be >= 1, got {global_clusters}.")
        if max_kmeans_iters < 1:
            raise ValueError(f"max_kmeans_iters must be >= 1, got {max_kmeans_iters}.")
        if tol <= 0:
            raise ValueError(f"tol must be > 0, got {tol}.")
        if group_images is not None and group_images < 1:
            raise ValueError(f"group_images must be >= 1 or None, got {group_images}.")
        self.weight = weight
        self.normalize = normalize
        self.local_clusters = local_clusters
        self.global_clusters = global_clusters
        self.max_kmeans_iters = max_kmeans_iters
        self.tol = tol
        self.group_images = group_images
        self.dim_weight = dim_weight
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(
                f"process_group must be a ProcessGroup, 'world' or None, got {process_group!r}."
            )
        self.generator = generator
        self.process_group = process_group
        self.last = None

    def forward(self, representations: Tensor) -> Tensor:
        """Compute the regularization loss.

        Args:
            representations:
                Dense features of shape ``(B, N, d)``, see :func:`dse_ext.dse_components`.

        Returns:
            ``-weight * DSE``, 0-dim, differentiable. With weight 0 a constant zero, without
            computing anything.

        Raises:
            ValueError: If the features' shape or dtype is not accepted.
        """
        # Over ranks the features are checked where the other ranks hear of what is wrong with them.
        if self.process_group is None or self.weight == 0:
            _require_dense(representations)
        if self.weight == 0:
            return representations.new_zeros(())
        options: dict[str, Any] = {
            "local_clusters": self.local_clusters,
            "global_clusters": self.global_clusters,
            "group_images": self.group_images,
            "normalize": self.normalize,
            "max_kmeans_iters": self.max_kmeans_iters,
            "tol": self.tol,
            "generator": self.generator,
        }
        if self.process_group is None:
            components = dse_components(representations, variant="regularizer", **options)
        else:
            from dse_ext.distributed import global_dse_components

            components = global_dse_components(representations, self.process_group, **options)
        self.last = components.detach()
        return -self.weight * components.score(self.dim_weight)

    def extra_repr(self) -> str:
        """Parameters shown by ``repr``."""
        return (
            f"weight={self.weight}, normalize={self.normalize}, "
            f"local_clusters={self.local_clusters}, global_clusters={self.global_clusters}, "
            f"max_kmeans_iters={self.max_kmeans_iters}, tol={self.tol}, "
            f"group_images={self.group_images}, dim_weight={self.dim_weight}"
            + ("" if self.process_group is None else f", process_group={self.process_group!r}")
        )


def _require_dense(representations: Tensor) -> None:
    """Raises lightly's errors for what has no images, tokens or features."""
    if representations.ndim != 3:
        raise ValueError(
            "representations must have shape (batch_size, num_tokens, dim), "
            f"got {tuple(representations.shape)}."
        )
    if 0 in representations.shape:
        raise ValueError(
            "representations must have non-empty batch, token, and feature dimensions, "
            f"got {tuple(representations.shape)}."
        )
