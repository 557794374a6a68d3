"""Scores of a run's checkpoints: DSE without labels, and the true dense quality with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from dse_ext.data import ImageSource, TextureScenes
from dse_ext.probes import LinearProbe
from dse_ext.selection import kendall_tau, select_by_dse
from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.config import TrainConfig

_BATCH = 64


@dataclass(frozen=True)
class CheckpointScore:
    """What one checkpoint was measured at.

    Attributes:
        step: Number of optimizer steps.
        m_inter: Separation of clusters, ``variant="evaluation"``.
        m_intra_image: Spread within the clusters of an image.
        m_intra_batch: Spread within the clusters of a group of images.
        m_dim: Effective dimensionality.
        miou: Mean intersection over union of a linear probe on held-out scenes; None without
            labels.
        pixel_accuracy: Share of held-out pixels that the probe gets right; None without labels.
        class_iou: Intersection over union of each class; None without labels.
    """

    step: int
    m_inter: float
    m_intra_image: float
    m_intra_batch: float
    m_dim: float
    miou: float | None = None
    pixel_accuracy: float | None = None
    class_iou: tuple[float, ...] | None = None

    @property
    def m_intra(self) -> float:
        """Mean of the two spreads."""
        return (self.m_intra_image + self.m_intra_batch) / 2

    @property
    def class_relevance(self) -> float:
        """M_inter − M_intra."""
        return self.m_inter - self.m_intra

    def dse(self, dim_weight: float) -> float:
        """M_inter − M_intra + λ · M_dim."""
        return self.class_relevance + dim_weight * self.m_dim

    def to_dict(self) -> dict[str, Any]:
        """The score as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointScore:
        """The inverse of :meth:`to_dict`."""
        iou = values.get("class_iou")
        return cls(**{**values, "class_iou": None if iou is None else tuple(iou)})


class Selection(NamedTuple):
    """The outcome of a run's scores.

    Attributes:
        dim_weight: λ; 1 where a run has too few checkpoints to compute it.
        dim_weight_computed: Whether λ was computed from the run.
        chosen: Steps of the chosen checkpoints, best first.
        kendall_tau: Kendall's τ of DSE with mIoU; None without labels or where undefined.
        p_value: Its two-sided p-value.
    """

    dim_weight: float
    dim_weight_computed: bool
    chosen: tuple[int, ...]
    kendall_tau: float | None
    p_value: float | None


class LabelledImages(NamedTuple):
    """Images ready for the network, with their pixel labels.

    Attributes:
        images: ``(B, 3, H, W)``, normalized.
        labels: ``(B, H, W)`` int64.
    """

    images: Tensor
    labels: Tensor


class ScoringData:
    """The fixed images that every checkpoint of a run is measured on.

    DSE is computed on the first ``score_images`` training images without augmentation. The probe
    is fitted to the first ``probe_images`` training scenes and measured on held-out scenes, whose
    photographs' pixels the network has never seen.

    Attributes:
        images: Images for DSE, ``(B, 3, H, W)``, normalized.
        probe: Labelled images the probe is fitted to; None without labels.
        heldout: Labelled images it is measured on; None without labels.
        classes: Class names; empty without labels.
        skipped: Messages that name images which could not be read.
    """

    def __init__(self, config: TrainConfig, source: ImageSource) -> None:
        self.skipped: list[str] = []
        self.images = self._load(source, config)
        self.probe: LabelledImages | None = None
        self.heldout: LabelledImages | None = None
        self.classes: tuple[str, ...] = ()
        if isinstance(source, TextureScenes):
            self.classes = source.classes
            scenes = TextureScenes(config.probe_images, source.size, seed=source.seed)
            heldout = TextureScenes(
                config.heldout_images, source.size, split="heldout", seed=source.seed
            )
            self.probe, self.heldout = _labelled(scenes), _labelled(heldout)

    def _load(self, source: ImageSource, config: TrainConfig) -> Tensor:
        images: list[Tensor] = []
        index = 0
        while index < len(source) and len(images) < config.score_images:
            image, skipped = source.load(index)
            self.skipped.extend(skipped)
            # What stands in for an unreadable image is the next readable one: use it once.
            index += len(skipped)
            if index < len(source):
                images.append(to_input(image, config.image_size))
            index += 1
        return torch.stack(images)


def to_input(image: Image.Image, size: int) -> Tensor:
    """Prepares an image for a network, without augmentation.

    Args:
        image: An RGB image.
        size: Wanted width and height: the shorter side is scaled to it, the middle is cut out.

    Returns:
        Normalized image of shape ``(3, size, size)``.
    """
    from lightly.transforms.utils import IMAGENET_NORMALIZE

    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(round(side * scale), size) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    mean = torch.tensor(IMAGENET_NORMALIZE["mean"]).view(3, 1, 1)
    std = torch.tensor(IMAGENET_NORMALIZE["std"]).view(3, 1, 1)
    return (pixels - mean) / std


def _labelled(scenes: TextureScenes) -> LabelledImages:
    scenes.transform = lambda image: to_input(image, scenes.size)
    images, labels = next(iter(DataLoader(scenes, batch_size=len(scenes))))
    return LabelledImages(images, labels)


@torch.no_grad()
def dense_features(backbone: DenseBackbone, images: Tensor) -> Tensor:
    """Dense features of many images in evaluation mode.

    Args:
        backbone: The network.
        images: ``(B, 3, H, W)``, normalized, on any device.

    Returns:
        ``(B, N, d)`` in float32 on the network's device.
    """
    device = next(backbone.parameters()).device
    backbone.eval()
    parts = [backbone(part.to(device))[1].float() for part in images.split(_BATCH)]
    return torch.cat(parts)


def score_checkpoint(
    backbone: DenseBackbone, step: int, data: ScoringData, config: TrainConfig
) -> CheckpointScore:
    """Scores one checkpoint.

    Args:
        backbone: Its network.
        step: Its number of optimizer steps.
        data: The images.
        config: The run's configuration (cluster numbers and seed).

    Returns:
        The score.
    """
    import dse_ext

    features = dense_features(backbone, data.images)
    with torch.no_grad():
        components = dse_ext.dse_components(
            features,
            variant="evaluation",
            local_clusters=config.local_clusters,
            global_clusters=config.global_clusters,
            # The same draw for every checkpoint: their scores differ by their features alone.
            generator=torch.Generator(features.device).manual_seed(config.seed),
        )
    score = CheckpointScore(
        step=step,
        m_inter=float(components.m_inter),
        m_intra_image=float(components.m_intra_image),
        m_intra_batch=float(components.m_intra_batch),
        m_dim=float(components.m_dim),
    )
    if data.probe is None or data.heldout is None:
        return score
    probe = fit_probe(backbone, data)
    quality = probe.score(dense_features(backbone, data.heldout.images), data.heldout.labels)
    return CheckpointScore(
        **{
            **score.to_dict(),
            "miou": quality.miou,
            "pixel_accuracy": quality.pixel_accuracy,
            "class_iou": quality.class_iou,
        }
    )


def fit_probe(backbone: DenseBackbone, data: ScoringData) -> LinearProbe:
    """Fits the linear probe to a network's features of the labelled training scenes.

    Raises:
        ValueError: If the data has no labels.
    """
    if data.probe is None:
        raise ValueError("the data has no labels to fit a probe to.")
    features = dense_features(backbone, data.probe.images)
    return LinearProbe(len(data.classes)).fit(features, data.probe.labels)


def select(scores: Sequence[CheckpointScore], top: int = 3, window: int = 2) -> Selection:
    """Computes λ over a run, chooses checkpoints by DSE and compares DSE with mIoU.

    The untrained network (step 0) takes no part: it is there to be compared with, and features
    that were never trained would dominate the deviations that λ is made of.

    Args:
        scores: One score per checkpoint in the order of training.
        top: Greatest number of checkpoints to choose.
        window: Neighbours on each side that a candidate must exceed.

    Returns:
        λ, the chosen steps and Kendall's τ.
    """
    trained = [score for score in scores if score.step > 0]
    result = select_by_dse(
        class_relevance=[score.class_relevance for score in trained],
        m_dim=[score.m_dim for score in trained],
        top=top,
        window=window,
    )
    mious = [score.miou for score in trained]
    tau, p_value = (None, None) if None in mious else kendall_tau(result.scores, mious)
    return Selection(
        result.dim_weight,
        result.dim_weight_computed,
        tuple(trained[index].step for index in result.chosen),
        tau,
        p_value,
    )
