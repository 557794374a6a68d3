"""Linear segmentation probe: how much of the true labels frozen dense features hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ProbeScore:
    """Quality of a probe on held-out images.

    Attributes:
        miou: Mean intersection over union over the classes that occur, in [0, 1].
        class_iou: Intersection over union of each class; NaN for a class that occurs neither in
            the labels nor in the prediction.
        pixel_accuracy: Share of labelled pixels that are right, in [0, 1].
    """

    miou: float
    class_iou: tuple[float, ...]
    pixel_accuracy: float


class LinearProbe:
    r"""Multinomial logistic regression from patch features to pixel labels.

    Every feature is standardized with the training set's mean and deviation. The weights minimize

    .. math::
        -\frac{1}{M} \sum_{i=1}^{M} \sum_c y_{ic} \log p_{ic} + \frac{l_2}{2} \|W\|_F^2,

    where y_i are the shares of the classes among the pixels of patch i: the cross-entropy of the
    pixels themselves, if all pixels of a patch get the patch's logits. The problem is convex and
    solved to its optimum by L-BFGS from zero, so there is neither a seed nor a learning rate to
    tune, and two checkpoints are compared on equal terms. For predictions the logits are
    upsampled bilinearly to the label map's size.

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

    def fit(self, features: Tensor, labels: Tensor) -> LinearProbe:
        """Fits the probe.

        Args:
            features: Patch features of shape ``(B, N, d)``, N the positions of a square grid in
                row order.
            labels: Pixel labels of shape ``(B, H, W)``, integers in ``[0, num_classes)`` or
                ``ignore_index``.

        Returns:
            The probe itself.

        Raises:
            ValueError: If shapes do not match or a label is out of range.
        """
        side = self._check(features, labels)
        shares = self._class_shares(labels.to(features.device), side)
        weight_of_patch = shares.sum(dim=-1)
        if not bool(weight_of_patch.any()):
            raise ValueError("labels must have at least one pixel that is not ignored.")
        x = features.detach().float().flatten(0, 1)
        self._mean = x.mean(dim=0)
        # A feature that does not vary carries nothing; dividing by its zero deviation would.
        deviation = x.std(dim=0, unbiased=False)
        self._scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        x = (x - self._mean) / self._scale
        total = weight_of_patch.sum()
        weight = x.new_zeros(self.num_classes, x.shape[1], requires_grad=True)
        bias = x.new_zeros(self.num_classes, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias],
            max_iter=self.max_iter,
            history_size=20,
            tolerance_grad=1e-5,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            solver.zero_grad()
            log_p = F.log_softmax(F.linear(x, weight, bias), dim=-1)
            value = -(shares * log_p).sum() / total + 0.5 * self.l2 * weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            solver.step(objective)
        self._weight, self._bias = weight.detach(), bias.detach()
        return self

    def logits(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns logits per pixel.

        Args:
            features: Patch features of shape ``(B, N, d)``.
            size: Height and width of the wanted map in pixels.

        Returns:
            Logits of shape ``(B, num_classes, H, W)``.

        Raises:
            RuntimeError: If the probe has not been fitted.
        """
        if self._weight is None or self._mean is None or self._scale is None:
            raise RuntimeError("fit the probe before asking it for predictions.")
        side = _grid_side(features)
        x = (features.detach().float() - self._mean) / self._scale
        patches = F.linear(x, self._weight, self._bias).transpose(1, 2)
        grid = patches.reshape(features.shape[0], self.num_classes, side, side)
        return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)

    def predict(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the most likely class of every pixel, int64 of shape ``(B, H, W)``.

        Args:
            features: Patch features of shape ``(B, N, d)``.
            size: Height and width of the wanted map in pixels.
        """
        return self.logits(features, size).argmax(dim=1)

    def score(self, features: Tensor, labels: Tensor, batch_size: int = 64) -> ProbeScore:
        """Measures the probe on images it was not fitted to.

        Args:
            features: Patch features of shape ``(B, N, d)``.
            labels: Pixel labels of shape ``(B, H, W)``.
            batch_size: Number of images whose logits are held in memory at once.

        Returns:
            Mean and per-class intersection over union, and pixel accuracy.

        Raises:
            ValueError: If shapes do not match or a label is out of range.
        """
        from torchmetrics.classification import MulticlassConfusionMatrix

        self._check(features, labels)
        size = (labels.shape[1], labels.shape[2])
        matrix = MulticlassConfusionMatrix(
            self.num_classes, ignore_index=self.ignore_index, validate_args=False
        ).to(features.device)
        for start in range(0, len(features), batch_size):
            part = slice(start, start + batch_size)
            matrix.update(self.predict(features[part], size), labels[part].to(features.device))
        # Intersection over union from the pooled counts, as segmentation benchmarks define it.
        counts = matrix.compute().double()
        hits = counts.diagonal()
        union = counts.sum(dim=0) + counts.sum(dim=1) - hits
        iou = hits / union
        return ProbeScore(
            miou=float(iou.nanmean()),
            class_iou=tuple(iou.tolist()),
            pixel_accuracy=float(hits.sum() / counts.sum()),
        )

    def _check(self, features: Tensor, labels: Tensor) -> int:
        side = _grid_side(features)
        if labels.ndim != 3 or labels.shape[0] != features.shape[0]:
            raise ValueError(
                f"labels must have shape (B, H, W) with B = {features.shape[0]} as in features, "
                f"got {tuple(labels.shape)}."
            )
        if labels.dtype.is_floating_point:
            raise ValueError(f"labels must be integers, got {labels.dtype}.")
        counted = labels if self.ignore_index is None else labels[labels != self.ignore_index]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < self.num_classes:
            raise ValueError(
                f"labels must lie in [0, {self.num_classes}), got values from "
                f"{int(counted.min())} to {int(counted.max())}."
            )
        return side

    def _class_shares(self, labels: Tensor, side: int) -> Tensor:
        """Shares of the classes among the pixels of each patch, (B * N, classes)."""
        rows = []
        for image in labels.split(64):  # one-hot maps are large: a few images at a time
            one_hot = torch.stack([image == c for c in range(self.num_classes)], dim=1).float()
            shares = F.adaptive_avg_pool2d(one_hot, side)
            rows.append(shares.flatten(2).transpose(1, 2).flatten(0, 1))
        return torch.cat(rows)


def _grid_side(features: Tensor) -> int:
    if features.ndim != 3 or min(features.shape) == 0:
        raise ValueError(
            f"features must have shape (B, N, d) without empty axes, got {tuple(features.shape)}."
        )
    side = math.isqrt(features.shape[1])
    if side * side != features.shape[1]:
        raise ValueError(
            f"features must lie on a square grid, got N = {features.shape[1]} positions."
        )
    return side
