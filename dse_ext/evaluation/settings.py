"""What a sweep over checkpoints is to compute, and how the machine is to do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dse_ext.checkpoints import CheckpointReader, find_reader
from dse_ext.checkpoints.extractor import FINAL

TEXTURE_SCENES = "texture-scenes"
VARIANTS = ("regularizer", "evaluation", "paper")
PRECISIONS = ("float32", "bfloat16", "float16")

_LEAST = {
    "images": 1,
    "batch_size": 1,
    "dse_batch": 1,
    "lidar_images": 0,
    "lidar_views": 0,
    "seed": 0,
    "workers": -1,
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that defines a sweep.

    Attributes:
        method: Name of the method, ``"module:attribute"`` or a reader.
        checkpoints: Pattern of the checkpoint files, or their folder.
        data: ``"texture-scenes"`` or a folder of images.
        variant: Definition of DSE: ``"evaluation"``, ``"paper"`` or ``"regularizer"``.
        images: Number of images; a folder that has fewer gives all of them.
        image_size: Width and height of an image in pixels; None for the method's.
        layer: Layer whose features are scored, as :func:`dse_ext.checkpoints.load` takes it.
        model: Name of a timm model; None for the method's.
        model_args: Keyword arguments for ``timm.create_model``.
        seed: Seed of the choice of images, of k-means and of LiDAR's augmentations.
        precision: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` (autocast of the network).
        dse_batch: Largest number of images whose DSE is computed together. The images are cut into
            batches as equal as possible, whose components are averaged.
        lidar_images: Number of images that LiDAR takes; 0 leaves it out.
        lidar_views: Number of augmented views of each; 0 leaves it out.
        run: Name of the run; None for the name of the checkpoints' folder.
        batch_size: Images per forward pass.
        device: ``"auto"``, or a torch device.
        workers: Processes that prepare images; -1 chooses.
        allow_pickle: Whether code that a checkpoint contains may run.
    """

    method: str | CheckpointReader
    checkpoints: str
    data: str
    variant: str = "evaluation"
    images: int = 2048
    image_size: int | None = None
    layer: int | str = FINAL
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    precision: str = "float32"
    dse_batch: int = 1024
    lidar_images: int = 512
    lidar_views: int = 4
    run: str | None = None
    batch_size: int = 64
    device: str = "auto"
    workers: int = -1
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ValueError: With the option, what was given and what is accepted.
        """
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}.")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be >= 1, got {self.image_size}.")
        for name, accepted in (("variant", VARIANTS), ("precision", PRECISIONS)):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}."
                )

    @property
    def reader(self) -> CheckpointReader:
        """The reader of the method."""
        return find_reader(self.method)

    @property
    def has_lidar(self) -> bool:
        """Whether LiDAR is computed."""
        return self.lidar_images > 0 and self.lidar_views > 0

    def settings(self) -> dict[str, Any]:
        """What the results depend on, as JSON can hold it: no paths, nothing of the machine."""
        import dse_ext

        return {
            "dse_ext": dse_ext.__version__,
            "method": self.reader.name,
            "model": self.model,
            "model_args": dict(self.model_args),
            "layer": self.layer,
            "variant": self.variant,
            "image_size": self.image_size,
            "precision": self.precision,
            "seed": self.seed,
            "dse_batch": self.dse_batch,
            "lidar_images": self.lidar_images if self.has_lidar else 0,
            "lidar_views": self.lidar_views if self.has_lidar else 0,
        }
