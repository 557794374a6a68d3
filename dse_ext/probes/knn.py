"""k-NN segmentation probe: the labels of the training patches that look most alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dse_ext.probes.patches import (
    Grid,
    check_features,
    check_labels,
    patch_targets,
    to_map,
)
from dse_ext.probes.score import ProbeScore, ScoreAccumulator


class KNNProbe:
    r"""k-nearest-neighbour segmentation from a bank of labelled patches, without training.

    The neighbours of a patch are the k patches of the bank with the largest cosine similarity s.
    They vote with the shares y of the classes among their pixels, weighted by a softmax of the
    similarities:

    .. math::
        p_c = \sum_{j=1}^{k} w_j\, y_{jc}, \qquad
        w_j = \frac{\exp(s_j / T)}{\sum_{l=1}^{k} \exp(s_l / T)}

    Votes are upsampled bilinearly to the label map's size; a pixel gets the class with the most.
    This is retrieval from a memory of soft-labelled patches as in Balažević et al., "Towards
    In-Context Scene Understanding", NeurIPS 2023, https://arxiv.org/abs/2306.01667, with its k = 30
    and T = 0.02, and with an exact search instead of an approximate one.

    Examples:
        >>> probe = KNNProbe(num_classes=12)
        >>> probe.fit(train_features, train_labels)    # (B, N, d), (B, H, W)
        >>> probe.score(features, labels).miou
        0.39
    """

    def __init__(
        self,
        num_classes: int,
        *,
        k: int = 30,
        temperature: float = 0.02,
        ignore_index: int | None = None,
    ) -> None:
        """Describes the probe.

        Args:
            num_classes: Number of classes, at least 2.
            k: Number of neighbours, at least 1; a smaller bank votes as a whole.
            temperature: T, above 0.
            ignore_index: Label of pixels that count neither in the bank nor in the score.

        Raises:
            ValueError: If an argument is out of range.
        """
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}.")
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}.")
        self.num_classes = num_classes
        self.k = k
        self.temperature = temperature
        self.ignore_index = ignore_index
        self._bank: Tensor | None = None
        self._shares: Tensor | None = None

    def fit(self, features: Tensor, labels: Tensor, grid: Grid | None = None) -> KNNProbe:
        """Takes all labelled patches of some images as the bank.

        Args:
            features: Patch features of shape ``(B, N, d)``, N the positions of a grid in row
                order.
            labels: Pixel labels of shape ``(B, H, W)``, integers in ``[0, num_classes)`` or
                ``ignore_index``.
            grid: Rows and columns of the grid; None is a square.

        Returns:
            The probe itself.

        Raises:
            ValueError: If shapes do not match, a label is out of range, or no pixel is labelled.
        """
        grid = check_features(features, grid)
        check_labels(features, labels, self.num_classes, self.ignore_index)
        targets = patch_targets(
            labels.to(features.device), grid, self.num_classes, self.ignore_index
        )
        return self.fit_bank(features.flatten(0, 1), targets.dense(self.num_classes))

    def fit_bank(self, features: Tensor, shares: Tensor) -> KNNProbe:
        """Takes patches as the bank.

        Args:
            features: ``(M, d)``.
            shares: Shares of the classes among the pixels of each patch, ``(M, num_classes)``.
                Patches without a share are left out.

        Returns:
            The probe itself.

        Raises:
            ValueError: If shapes do not match or no patch is labelled.
        """
        if features.ndim != 2 or shares.shape != (features.shape[0], self.num_classes):
            raise ValueError(
                f"features and shares must have shapes (M, d) and (M, {self.num_classes}), got "
                f"{tuple(features.shape)} and {tuple(shares.shape)}."
            )
        labelled = shares.sum(dim=1) > 0
        if not bool(labelled.any()):
            raise ValueError("labels must have at least one pixel that is not ignored.")
        self._bank = F.normalize(features.detach()[labelled].float(), dim=1)
        # A patch that is half ignored has as much of a say as any other.
        self._shares = F.normalize(shares[labelled].float(), p=1, dim=1)
        return self

    def patch_votes(self, features: Tensor) -> Tensor:
        """Returns the votes for each patch, ``(..., num_classes)``, which add up to 1.

        Args:
            features: Patch features of shape ``(..., d)``.

        Raises:
            RuntimeError: If the probe has not been fitted.
        """
        if self._bank is None or self._shares is None:
            raise RuntimeError("fit the probe before asking it for predictions.")
        x = F.normalize(features.detach().float(), dim=-1).flatten(0, -2)
        k = min(self.k, self._bank.shape[0])
        # As many rows at a time as make 16 million similarities, or shares of neighbours: 64 MiB.
        rows = max((1 << 24) // max(self._bank.shape[0], k * self.num_classes), 1)
        votes = []
        for part in x.split(rows):
            near, index = (part @ self._bank.T).topk(k, dim=1)
            weight = torch.softmax(near / self.temperature, dim=1)
            votes.append(torch.einsum("nk,nkc->nc", weight, self._shares[index]))
        result: Tensor = torch.cat(votes).unflatten(0, features.shape[:-1])
        return result

    def predict(self, features: Tensor, size: tuple[int, int], grid: Grid | None = None) -> Tensor:
        """Returns the class with the most votes at every pixel, int64 of shape ``(B, H, W)``.

        Args:
            features: Patch features of shape ``(B, N, d)``.
            size: Height and width of the wanted map in pixels.
            grid: Rows and columns of the N positions; None is a square.
        """
        grid = check_features(features, grid)
        return to_map(self.patch_votes(features), grid, size).argmax(dim=1)

    def score(
        self, features: Tensor, labels: Tensor, batch_size: int = 64, grid: Grid | None = None
    ) -> ProbeScore:
        """Measures the probe on images that are not in the bank.

        Args:
            features: Patch features of shape ``(B, N, d)``.
            labels: Pixel labels of shape ``(B, H, W)``.
            batch_size: Number of images whose votes are held in memory at once.
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
