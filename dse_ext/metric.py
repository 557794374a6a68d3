"""DSE as a torchmetrics metric: accumulated over batches, reduced over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from dse_ext.functional import DSEComponents, dse_components

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DSEMetric"]

#: The components of a batch that are averaged, in the order in which they are reported.
_COMPONENTS = ("m_inter", "m_intra_image", "m_intra_batch", "m_dim", "avg_norm")


class DSEMetric(Metric):
    r"""The Dense representation Structure Estimator (DSE) of features that come in batches.

    .. math::
        \mathrm{DSE} = M_{inter} - M_{intra} + \lambda \, M_{dim}, \qquad
        M_{intra} = \tfrac{1}{2} \big(M_{intra}^{image} + M_{intra}^{batch}\big)

    DSE estimates the quality of dense features (patch tokens, positions of a feature map) without
    labels; higher is better. Source: "Exploring Structural Degradation in Dense Representations
    for Self-supervised Learning", 2025, https://arxiv.org/abs/2510.17299. The definitions of the
    components and their three variants are in `docs/definitions.md`.

    Every component is the mean over the batches, weighted by the number of images in them. The
    value therefore depends on the batch size, because clusters and spectra are those of a batch:
    compare checkpoints that were measured with the same batches. A batch with features that are
    not finite makes every component NaN.

    As input to `update` and `forward` the metric takes

    - `z`: dense features of shape `(B, N, d)`: B images, N positions, d features. Convolutional
      features `(B, C, H, W)` are `features.flatten(2).transpose(1, 2)`.

    As output of `compute` and `forward` it returns a dict of 0-dim float64 tensors

    - `m_inter`, `m_intra_image`, `m_intra_batch`, `m_dim`, `avg_norm`: the components.
    - `class_relevance`: M_inter − M_intra. With `m_dim` it is what `dse_ext.dse_lambda` takes, one
      value of each per checkpoint, to weigh the two over a run.
    - `score`: class_relevance + dim_weight · m_dim.
    - `images`: the number of images (int64).

    States are sums, reduced over ranks by addition: on W ranks the result is the one of a single
    process that saw the batches of all ranks. `compute` before the first `update` warns, as
    every torchmetrics metric does, and gives NaN for everything but `images`, which is 0.

    Args:
        variant:
            `"regularizer"` (the authors' training code, and lightly's), `"evaluation"` (their
            scoring code: the one to compare checkpoints with) or `"paper"` (Eq. 5).
        local_clusters:
            Number of clusters for the positions of each image. Must be >= 1.
        global_clusters:
            Number of clusters for the positions of each group of images. Must be >= 1.
        group_images:
            Number of consecutive images in a group. Must be >= 1. Default:
            `max(global_clusters // local_clusters, 1)`.
        normalize:
            If True, L2-normalize the features first.
        max_kmeans_iters:
            Maximum number of Lloyd iterations. Must be >= 1.
        tol:
            Centroid shift at which k-means stops. Must be > 0.
        dim_weight:
            λ, the weight of `m_dim` in `score`.
        seed:
            Seed of k-means and of the permutations of `variant="evaluation"`. Every update starts
            from it, so that the value of a batch depends on that batch alone: not on the batches
            before it, not on the rank, and not on the state of the global random generator, which
            is left as it is.
        generator:
            Draw from this generator, which moves on with every update, in place of the seed.
        **kwargs:
            Arguments of `torchmetrics.Metric`, such as `sync_on_compute`.

    Raises:
        ValueError: If an argument is out of range. `update` raises it for features that
            `dse_ext.dse_components` does not accept, before it adds anything.

    Examples:
        >>> import torch
        >>> from dse_ext import DSEMetric, dse_lambda
        >>> metric = DSEMetric(variant="evaluation")
        >>> run = []
        >>> for checkpoint in range(3):
        ...     for batch in range(2):
        ...         patch_tokens = torch.randn(8, 49, 32).cumsum(dim=-1) + checkpoint
        ...         metric.update(patch_tokens)
        ...     run.append(metric.compute())
        ...     metric.reset()
        >>> weight = dse_lambda([r["class_relevance"] for r in run], [r["m_dim"] for r in run])
        >>> scores = [r["class_relevance"] + weight * r["m_dim"] for r in run]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    m_inter: Tensor
    m_intra_image: Tensor
    m_intra_batch: Tensor
    m_dim: Tensor
    avg_norm: Tensor
    images: Tensor

    def __init__(
        self,
        variant: str = "regularizer",
        local_clusters: int = 3,
        global_clusters: int = 24,
        group_images: int | None = None,
        normalize: bool = True,
        max_kmeans_iters: int = 20,
        tol: float = 1e-4,
        dim_weight: float = 1.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.variant = variant
        self.local_clusters = local_clusters
        self.global_clusters = global_clusters
        self.group_images = group_images
        self.normalize = normalize
        self.max_kmeans_iters = max_kmeans_iters
        self.tol = tol
        self.dim_weight = dim_weight
        self.seed = seed
        self.generator = generator
        # The function that takes the arguments checks them: now, not in the first validation.
        self._components(torch.zeros(1, 1, 1), torch.Generator())
        for name in _COMPONENTS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, z: Tensor) -> None:
        """Adds a batch of dense features.

        Args:
            z:
                Features of shape `(B, N, d)` in any floating point dtype, on the device of the
                metric.
        """
        generator = self.generator
        if generator is None:
            # On the CPU whatever the device, so that a seed means the same on each of them.
            generator = torch.Generator().manual_seed(self.seed)
        components = self._components(z, generator)
        for name in _COMPONENTS:
            value: Tensor = getattr(components, name)
            setattr(self, name, getattr(self, name) + z.shape[0] * value.to(torch.float64))
        self.images = self.images + z.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """The components, `class_relevance`, `score` and the number of images so far."""
        result: dict[str, Tensor] = {
            name: getattr(self, name) / self.images for name in _COMPONENTS
        }
        m_intra = (result["m_intra_image"] + result["m_intra_batch"]) / 2
        result["class_relevance"] = result["m_inter"] - m_intra
        result["score"] = result["class_relevance"] + self.dim_weight * result["m_dim"]
        result["images"] = self.images.clone()
        return result

    def _components(self, z: Tensor, generator: torch.Generator) -> DSEComponents:
        return dse_components(
            z,
            variant=self.variant,
            local_clusters=self.local_clusters,
            global_clusters=self.global_clusters,
            group_images=self.group_images,
            normalize=self.normalize,
            max_kmeans_iters=self.max_kmeans_iters,
            tol=self.tol,
            generator=generator,
        )

    def plot(
        self,
        val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
        ax: Axes | None = None,
    ) -> tuple[Figure, Axes]:
        """Plots one result of `compute`, or a series of them as curves, without `images`.

        Args:
            val:
                A result of `compute` or `forward`, or a list of them, one per checkpoint. Default:
                the result of `compute` now.
            ax:
                The matplotlib axes to draw on. Default: those of a new figure.

        Returns:
            The figure and the axes.
        """
        if val is None:
            val = self.compute()
        if isinstance(val, Mapping):
            shown: Any = _without_images(val)
        else:
            shown = [_without_images(v) for v in val]
        figure, axes = self._plot(shown, ax)
        return figure, cast("Axes", axes)


def _without_images(result: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in result.items() if name != "images"}
