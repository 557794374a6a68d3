"""DSE and the label-free baselines of one network, from one pass over the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dse_ext
from dse_ext.checkpoints import DenseExtractor
from dse_ext.evaluation.images import Item, batch_sizes
from dse_ext.evaluation.settings import EvaluateConfig
from dse_ext.spectrum import RankMeAccumulator

#: The figures of a checkpoint, in the order of the columns of results.csv.
FIGURES = (
    "m_inter",
    "m_intra_image",
    "m_intra_batch",
    "m_intra",
    "class_relevance",
    "m_dim",
    "avg_norm",
    "rankme",
    "rankme_dense",
    "alpha_req",
    "lidar",
)


@dataclass
class Seconds:
    """Where the time goes.

    Attributes:
        data: Waiting for images.
        forward: The network's forward passes over the images that DSE is computed on.
        dse: DSE.
        baselines: RankMe, dense RankMe and α-ReQ.
        lidar: LiDAR with the forward passes over its views.
        images: Number of images of ``forward``.
    """

    data: float = 0.0
    forward: float = 0.0
    dse: float = 0.0
    baselines: float = 0.0
    lidar: float = 0.0
    images: int = 0


@dataclass
class Scorer:
    """Scores networks on the same images.

    Memory holds one batch of dense features (``dse_batch`` images), whatever the number of
    images, and one vector per image.

    Attributes:
        config: What is to be computed.
        device: Where.
        seconds: Where the time went so far.
    """

    config: EvaluateConfig
    device: torch.device
    seconds: Seconds = field(default_factory=Seconds)

    def score(
        self,
        network: DenseExtractor,
        images: Iterable[Item],
        count: int,
        views: Iterable[Item] | None,
        on_batch: Callable[[int, tuple[str, ...]], None] = lambda done, skipped: None,
    ) -> dict[str, float]:
        """Computes every figure of a network.

        Args:
            network: The network, on the device.
            images: Batches of images.
            count: Their number in all.
            views: Batches of the views that LiDAR takes; None leaves it out.
            on_batch: Called after each batch with the number of images (or views) in it, and
                messages about images that could not be read.

        Returns:
            A value for each of :data:`FIGURES`; NaN where a feature is not finite, and for what
            was left out.
        """
        metric = dse_ext.DSEMetric(
            variant=self.config.variant, seed=self.config.seed, sync_on_compute=False
        ).to(self.device)
        rank = RankMeAccumulator()
        pooled: list[Tensor] = []
        for features in self._groups(network, images, count, rank, pooled, on_batch):
            with self._timed("dse"):
                metric.update(features)
        with self._timed("dse"):
            result = {name: float(value) for name, value in metric.compute().items()}
        result["m_intra"] = (result["m_intra_image"] + result["m_intra_batch"]) / 2
        with self._timed("baselines"):
            vectors = torch.cat(pooled).double()
            result["rankme"] = float(dse_ext.rankme(vectors))
            result["rankme_dense"] = float(rank.compute())
            result["alpha_req"] = float(dse_ext.alpha_req(vectors))
        result["lidar"] = float("nan")
        if views is not None:
            with self._timed("lidar"):
                result["lidar"] = self._lidar(network, views, on_batch)
        return {name: result[name] for name in FIGURES}

    def _groups(
        self,
        network: DenseExtractor,
        images: Iterable[Item],
        count: int,
        rank: RankMeAccumulator,
        pooled: list[Tensor],
        on_batch: Callable[[int, tuple[str, ...]], None],
    ) -> Any:
        """Yields the dense features of one DSE batch after the other, in one buffer."""
        sizes = batch_sizes(count, self.config.dse_batch)
        buffer: Tensor | None = None
        wanted, filled = next(sizes), 0
        waited = time.perf_counter()
        for item in images:
            self.seconds.data += time.perf_counter() - waited
            with self._timed("forward"):
                vectors, dense = self._forward(network, item.pixels)
            self.seconds.images += len(dense)
            with self._timed("baselines"):
                rank.update(dense)
            pooled.append(vectors)
            if buffer is None:
                # The first batch is the largest.
                buffer = torch.empty((wanted, *dense.shape[1:]), device=dense.device)
            start = 0
            while start < len(dense):
                step = min(wanted - filled, len(dense) - start)
                buffer[filled : filled + step] = dense[start : start + step]
                filled, start = filled + step, start + step
                if filled == wanted:
                    yield buffer[:filled]
                    wanted, filled = next(sizes, 0), 0
            on_batch(len(dense), item.skipped)
            waited = time.perf_counter()

    def _lidar(
        self,
        network: DenseExtractor,
        views: Iterable[Item],
        on_batch: Callable[[int, tuple[str, ...]], None],
    ) -> float:
        vectors: list[Tensor] = []
        for item in views:
            n, q = item.pixels.shape[:2]
            parts = [
                self._forward(network, part)[0]
                for part in item.pixels.flatten(0, 1).split(self.config.batch_size)
            ]
            vectors.append(torch.cat(parts).unflatten(0, (n, q)))
            on_batch(n * q, item.skipped)
        return float(dse_ext.lidar(torch.cat(vectors).double()))

    def _forward(self, network: DenseExtractor, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True)
        half = self.config.precision != "float32"
        dtype = getattr(torch, self.config.precision) if half else torch.bfloat16
        with torch.autocast(self.device.type, dtype=dtype, enabled=half):
            pooled, dense = network(images)
        return pooled.float(), dense.float()

    @contextmanager
    def _timed(self, part: str) -> Any:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        setattr(self.seconds, part, getattr(self.seconds, part) + time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
