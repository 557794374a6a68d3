"""Mean intersection over union, accumulated over images of any sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


class ScoreAccumulator:
    """Counts predictions against labels; intersections and unions are those of all pixels pooled.

    Pooled counts are how segmentation benchmarks define mIoU; a mean over images is another
    quantity.

    Examples:
        >>> counts = ScoreAccumulator(num_classes=21, ignore_index=255)
        >>> counts.update(prediction, labels)  # (..., H, W) each
        >>> counts.compute().miou
        0.41
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Starts with no pixel.

        Args:
            num_classes: Number of classes, at least 2.
            ignore_index: Label of pixels that do not count.
            device: Where the counts are kept; None is the CPU.
        """
        from torchmetrics.classification import MulticlassConfusionMatrix

        self._matrix = MulticlassConfusionMatrix(
            num_classes, ignore_index=ignore_index, validate_args=False
        )
        if device is not None:
            self._matrix = self._matrix.to(device)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Counts more pixels.

        Args:
            prediction: Classes, integers of any shape.
            labels: True classes of the same shape.
        """
        self._matrix.update(prediction, labels)

    def compute(self) -> ProbeScore:
        """Returns the score of all pixels so far.

        Raises:
            ValueError: If no labelled pixel was counted.
        """
        counts = self._matrix.confmat.double()
        if not bool(counts.any()):
            raise ValueError("there is no labelled pixel to score a probe on.")
        hits = counts.diagonal()
        iou = hits / (counts.sum(dim=0) + counts.sum(dim=1) - hits)
        return ProbeScore(
            miou=float(iou.nanmean()),
            class_iou=tuple(iou.tolist()),
            pixel_accuracy=float(hits.sum() / counts.sum()),
        )
