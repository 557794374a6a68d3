"""Dense features of training runs that degrade in a known way, with their true quality.

Every position has a class. Two things are changed from one checkpoint to the next:

- ``mixing`` t: the positions of an image are mixed by an orthogonal matrix that keeps their mean,
  the identity at t = 0. Classes run into each other, but the singular values of the features stay
  the same to rounding, and so do the image vectors: nothing that looks at spectra alone can tell.
- ``directions`` r: classes and noise lie in r of the d directions, at the same relation of
  distances between classes to the size of a class.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGES, POSITIONS, DIM, CLASSES = 64, 48, 32, 60
VIEWS = 4

#: Mixing and directions of the first checkpoints of both runs: the network learns.
LEARNING = ((0.8, 14), (0.4, 20), (0.2, 26), (0.1, 30), (0.0, 32))
BEST = len(LEARNING) - 1
#: Then class separability falls while the rank stays.
SEPARABILITY_FALLS = (*LEARNING, (0.1, 32), (0.2, 32), (0.4, 32), (0.8, 32))
#: Or the rank collapses while separability stays.
RANK_COLLAPSES = (*LEARNING, (0.0, 28), (0.0, 22), (0.0, 16), (0.0, 10))


class Run:
    """The draws that all checkpoints have in common."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        shares = torch.arange(POSITIONS) % 3  # three classes an image
        self.labels = torch.stack(
            [torch.randperm(CLASSES, generator=g)[:3][shares] for _ in range(IMAGES)]
        )
        self.centres = torch.randn(CLASSES, DIM, generator=g, dtype=torch.float64)
        self.noise = torch.randn(IMAGES, POSITIONS, DIM, generator=g, dtype=torch.float64)
        self.jitter = torch.randn(IMAGES, VIEWS, DIM, generator=g, dtype=torch.float64)
        shape = (IMAGES, POSITIONS, POSITIONS)
        turn = torch.randn(shape, generator=g, dtype=torch.float64) / math.sqrt(POSITIONS)
        keep_mean = torch.eye(POSITIONS, dtype=torch.float64) - 1 / POSITIONS
        self.turn = keep_mean @ (turn - turn.mT) @ keep_mean

    def features(self, mixing: float, directions: int) -> Tensor:
        """Dense features ``(B, N, d)`` of a checkpoint."""
        rest = (0, DIM - directions)
        centres = F.pad(F.normalize(self.centres[:, :directions], dim=1), rest)
        # Fewer directions of the same noise would make a class smaller by nuclear norm.
        size = 0.1 * (DIM / directions) ** 0.7
        noise = F.pad(self.noise[..., :directions], rest) * size
        return torch.linalg.matrix_exp(mixing * self.turn) @ (centres[self.labels] + noise)

    def accuracy(self, features: Tensor) -> float:
        """True quality: how many positions of the odd images the even ones' class means tell."""
        x = F.normalize(features, dim=-1)
        members = F.one_hot(self.labels, CLASSES).to(x.dtype)
        means = torch.einsum("bnk,bnd->kd", members[::2], x[::2])
        nearest = (x[1::2] @ F.normalize(means, dim=1).mT).argmax(dim=-1)
        return float((nearest == self.labels[1::2]).double().mean())


class Network:
    """Stands for the network of a checkpoint: an image is its number, a view two numbers."""

    def __init__(self, run: Run, features: Tensor) -> None:
        self.run = run
        self.dense = features

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        numbers = pixels.long()
        dense = self.dense[numbers[:, 0]]
        pooled = dense.mean(dim=1)
        if numbers.shape[1] == 2:
            pooled = pooled + 0.05 * self.run.jitter[numbers[:, 0], numbers[:, 1]]
        return pooled, dense
