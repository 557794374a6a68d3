"""Linear segmentation probe: how much of the true labels frozen dense features hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dse_ext.probes.patches import (
    Grid,
    PatchTargets,
    check_features,
    check_labels,
    patch_targets,
    to_map,
)
from dse_ext.probes.score import ProbeScore, ScoreAccumulator


class PatchBatch(NamedTuple):
    """Some of the patches that a probe is fitted to.

    Attributes:
        features: ``(P, d)``, any floating point type.
        targets: Their classes.
    """

    features: Tensor
    targets: PatchTargets


class LinearProbe:
    r"""Multinomial logistic regression from patch features to pixel labels.

    Every feature is standardized with the training set's mean and deviation. The weights minimize

    .. math::
        -\frac{1}{M} \sum_{i=1}^{M} \sum_c y_{ic} \log p_{ic} + \frac{l_2}{2} \|W\|_F^2,

    where y_i are the shares of the classes among the pixels of patch i: the cross-entropy of the
    pixels themselves, if all pixels of a patch get the patch's logits. M is the sum of all shares,
    which is the number of patches where no pixel is ignored. The problem is convex and solved to
    its optimum by L-BFGS from zero, so there is neither a seed nor a learning rate to tune, and
    two checkpoints are compared on equal terms. For predictions the logits are upsampled
    bilinearly to the label map's size.

    Examples:
        >>> probe = LinearProbe(num_classes=12)
        >>> probe.fit(train_features, train_labels)    # (B, N, d), (B, H, W)
        >>> probe.score(features, labels).miou
        0.41
    """

    def __init__(
        self,
        num_classes: int,
        *,
        l2: float = 1e-4,
        max_iter: int = 200,
        ignore_index: int | None = None,
    ) -> None:
        """Describes the probe.

        Args:
            num_classes: Number of classes, at least 2.
            l2: Weight of the penalty on the squared weights, at least 0.
            max_iter: Bound on the number of L-BFGS iterations, at least 1.
            ignore_index: Label of pixels that count neither in training nor in the score.

        Raises:
            ValueError: If an argument is out of range.
        """
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}.")
        if l2 < 0:
            raise ValueError(f"l2 must be >= 0, got {l2}.")
        if max_iter < 1:
            raise ValueError(f"max_iter must be >= 1, got {max_iter}.")
        self.num_classes = num_classes
        self.l2 = l2
        self.max_iter = max_iter
        self.ignore_index = ignore_index
        self._mean: Tensor | None = None
        self._scale: Tensor | None = None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def fit(self, features: Tensor, labels: Tensor, grid: Grid | None = None) -> LinearProbe:
        """Fits the probe to features in memory.

        Args:
            features: Patch features of shape ``(B, N, d)``, N the positions of a grid in row
                order.
            labels: Pixel labels of shape ``(B, H, W)``, integers in ``[0, num_classes)`` or
                ``ignore_index``.
            grid: Rows and columns of the grid; None is a square.

        Returns:
            The probe itself.

        Raises:
            ValueError: If shapes do not match or a label is out of range.
        """
        grid = check_features(features, grid)
        check_labels(features, labels, self.num_classes, self.ignore_index)
        parts = [
            # A few images at a time: pixels are many more than patches.
            patch_targets(part, grid, self.num_classes, self.ignore_index)
            for part in labels.to(features.device).split(64)
        ]
        batch = PatchBatch(features.detach().float().flatten(0, 1), PatchTargets.cat(parts))
        total = self._standardize([batch])
        # Standardized once: the passes over data in memory are many.
        resident = batch._replace(features=self._standardized(batch.features))
        return self._solve([resident], total, standardized=True)

    def fit_batches(
        self, batches: Sequence[PatchBatch], device: torch.device | None = None
    ) -> LinearProbe:
        """Fits the probe to patches that come in batches, as many passes as it takes.

        The result is that of :meth:`fit` on all patches at once, up to rounding: gradients are
        those of the whole set, there is no noise of batches.

        Args:
            batches: The batches; they are gone through about `max_iter` times, always in the
                same order. What they hold at once is up to the sequence: it may read a file.
            device: Where the probe computes; None is where the features are.

        Returns:
            The probe itself.

        Raises:
            ValueError: If there is no labelled patch.
        """
        moved = _Moved(batches, device)
        return self._solve(moved, self._standardize(moved), standardized=False)

    def _standardize(self, batches: Iterable[PatchBatch]) -> float:
        """Mean and deviation of every feature, merged batch by batch in double precision.

        Returns the sum of all shares.
        """
        count, total = 0, 0.0
        mean = squares = torch.zeros(())
        for x, targets in batches:
            total += float(targets.share.sum(dtype=torch.float64))
            rows = x.shape[0]
            part_mean = x.mean(dim=0, dtype=torch.float64)
            part_squares = (x - part_mean.to(x.dtype)).square().sum(dim=0, dtype=torch.float64)
            if not count:
                mean, squares = part_mean, part_squares
            else:
                shift = part_mean - mean
                mean = mean + shift * (rows / (count + rows))
                squares = squares + part_squares
                squares = squares + shift.square() * (count * rows / (count + rows))
            count += rows
        if not total > 0:
            raise ValueError("labels must have at least one pixel that is not ignored.")
        deviation = (squares / count).sqrt().float()
        self._mean = mean.float()
        # A feature that does not vary carries nothing; dividing by its zero deviation would.
        self._scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        return total

    def _standardized(self, x: Tensor) -> Tensor:
        if self._mean is None or self._scale is None:
            raise RuntimeError("fit the probe before asking it for predictions.")
        return (x.detach().float() - self._mean) / self._scale

    def _solve(
        self, batches: Iterable[PatchBatch], total: float, standardized: bool
    ) -> LinearProbe:
        assert self._mean is not None
        weight = self._mean.new_zeros(self.num_classes, self._mean.shape[0], requires_grad=True)
        bias = self._mean.new_zeros(self.num_classes, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias],
            max_iter=self.max_iter,
            history_size=20,
            tolerance_grad=1e-5,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def objective() -> Tensor:
            value = 0.5 * self.l2 * weight.square().sum(dtype=torch.float64)
            weight_grad = self.l2 * weight
            bias_grad = torch.zeros_like(bias)
            for features, targets in batches:
                x = features if standardized else self._standardized(features)
                log_p = F.log_softmax(F.linear(x, weight, bias), dim=-1)
                at = (targets.patch, targets.label)
                value -= (targets.share * log_p[at]).sum(dtype=torch.float64) / total
                # Of the logits: weight of the patch times p, minus the shares.
                slope = log_p.exp_().mul_(targets.weight()[:, None])
                slope[at] -= targets.share
                slope /= total
                weight_grad.addmm_(slope.T, x)
                bias_grad += slope.sum(dim=0)
            weight.grad, bias.grad = weight_grad, bias_grad
            return value.float()

        solver.step(objective)
        self._weight, self._bias = weight.detach(), bias.detach()
        return self

    def logits(self, features: Tensor, size: tuple[int, int], grid: Grid | None = None) -> Tensor:
        """Returns logits per pixel.

        Args:
            features: Patch features of shape ``(B, N, d)``.
            size: Height and width of the wanted map in pixels.
            grid: Rows and columns of the N positions; None is a square.

        Returns:
            Logits of shape ``(B, num_classes, H, W)``.

        Raises:
            RuntimeError: If the probe has not been fitted.
            ValueError: If the positions do not form the grid.
        """
        return to_map(self.patch_logits(features), check_features(features, grid), size)

    def patch_logits(self, features: Tensor) -> Tensor:
        """Returns logits per patch, ``(..., num_classes)``.

        Args:
            features: Patch features of shape ``(..., d)``.

        Raises:
            RuntimeError: If the probe has not been fitted.
        """
        if self._weight is None:
            raise RuntimeError("fit the probe before asking it for predictions.")
        return F.linear(self._standardized(features), self._weight, self._bias)

    def predict(self, features: Tensor, size: tuple[int, int], grid: Grid | None = None) -> Tensor:
        """Returns the most likely class of every pixel, int64 of shape ``(B, H, W)``.

        Args:
            features: Patch features of shape ``(B, N, d)``.
            size: Height and width of the wanted map in pixels.
            grid: Rows and columns of the N positions; None is a square.
        """
        return self.logits(features, size, grid).argmax(dim=1)

    def score(
        self, features: Tensor, labels: Tensor, batch_size: int = 64, grid: Grid | None = None
    ) -> ProbeScore:
        """Measures the probe on images it was not fitted to.

        Args:
            features: Patch features of shape ``(B, N, d)``.
            labels: Pixel labels of shape ``(B, H, W)``.
            batch_size: Number of images whose logits are held in memory at once.
            grid: Rows and columns of the N positions; None is a square.

        Returns:
            Mean and per-class intersection over union, and pixel accuracy.

        Raises:
            ValueError: If shapes do not match or a label is out of range.
        """
        check_features(features, grid)
        check_labels(features, labels, self.num_classes, self.ignore_index)
        size = (labels.shape[1], labels.shape[2])
        counts = ScoreAccumulator(
            self.num_classes, ignore_index=self.ignore_index, device=features.device
        )
        for start in range(0, len(features), batch_size):
            part = slice(start, start + batch_size)
            guess = self.predict(features[part], size, grid)
            counts.update(guess, labels[part].to(features.device))
        return counts.compute()


class _Moved:
    """Batches as float32 on a device, each when its turn comes."""

    def __init__(self, batches: Sequence[PatchBatch], device: torch.device | None) -> None:
        self.batches = batches
        self.device = device

    def __iter__(self) -> Iterator[PatchBatch]:
        for features, targets in self.batches:
            device = self.device or features.device
            yield PatchBatch(features.detach().to(device).float(), targets.to(device))
