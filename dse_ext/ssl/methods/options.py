"""Options that several methods share, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dse_ext.ssl.config import ConfigError


def at_least(options: Any, least: float, *names: str) -> None:
    """Raises ConfigError unless each named option is at least ``least``."""
    for name in names:
        if not getattr(options, name) >= least:
            raise ConfigError(
                f"method option {name} must be >= {least}, got {getattr(options, name)}."
            )


def above(options: Any, bound: float, *names: str) -> None:
    """Raises ConfigError unless each named option is greater than ``bound``."""
    for name in names:
        if not getattr(options, name) > bound:
            raise ConfigError(
                f"method option {name} must be > {bound}, got {getattr(options, name)}."
            )


def shares(options: Any, *names: str) -> None:
    """Raises ConfigError unless each named option lies in [0, 1]."""
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            raise ConfigError(
                f"method option {name} must lie in [0, 1], got {getattr(options, name)}."
            )


@dataclass(frozen=True)
class ColourOptions:
    """How colours and sharpness of a view vary.

    Attributes:
        color_jitter: Strength of the colour jitter.
        gray_scale: Probability that a view loses its colours.
        blur: Greatest standard deviation of the Gaussian blur, in pixels of a view.
    """

    color_jitter: float = 0.5
    gray_scale: float = 0.2
    blur: float = 2.0

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        at_least(self, 0, "color_jitter")
        above(self, 0, "blur")
        shares(self, "gray_scale")


@dataclass(frozen=True)
class TwoViewOptions(ColourOptions):
    """Two random crops of one size.

    Attributes:
        crop_scale: Least share of the image's area in a view.
    """

    crop_scale: float = 0.2

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        above(self, 0, "crop_scale")
        shares(self, "crop_scale")


@dataclass(frozen=True)
class MultiCropOptions(ColourOptions):
    """Two global views and several small ones.

    Attributes:
        local_views: Number of small views per image.
        local_size: Width of a small view in pixels; 0 means half of the image size.
        global_scale: Least share of the image's area in a global view.
        local_scale: Least share of the image's area in a small view; its greatest share is
            ``global_scale``.
    """

    local_views: int = 6
    local_size: int = 0
    global_scale: float = 0.4
    local_scale: float = 0.05

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 0, "local_views", "local_size")
        if not 0 < self.local_scale <= self.global_scale <= 1:
            raise ConfigError(
                "method options must satisfy 0 < local_scale <= global_scale <= 1, "
                f"got {self.local_scale} and {self.global_scale}."
            )


@dataclass(frozen=True)
class DistillationOptions(MultiCropOptions):
    """A student that predicts its teacher's assignment to prototypes.

    Attributes:
        hidden_dim: Width of the projection head.
        bottleneck_dim: Width of the head's bottleneck.
        output_dim: Number of prototypes.
        batch_norm: Batch normalization in the head. An untrained network gives all images nearly
            the same vector; normalizing over the batch pulls them apart from the first step on,
            which a run of a few hundred steps needs.
        momentum: Momentum of the teacher at the first step; rises to 1 along a cosine.
        teacher_temp: Temperature of the teacher.
        warmup_teacher_temp: Temperature of the teacher at the first step.
        warmup_teacher_steps: Share of the steps over which it moves to ``teacher_temp``.
        student_temp: Temperature of the student.
        center_momentum: Momentum of the centre of the teacher's outputs.
        freeze_last_layer: Share of the steps during which the prototypes stay fixed.
    """

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    output_dim: int = 4096
    batch_norm: bool = False
    momentum: float = 0.996
    teacher_temp: float = 0.04
    warmup_teacher_temp: float = 0.04
    warmup_teacher_steps: float = 0.3
    student_temp: float = 0.1
    center_momentum: float = 0.9
    freeze_last_layer: float = 0.01

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        super().__post_init__()
        at_least(self, 1, "hidden_dim", "bottleneck_dim", "output_dim")
        above(self, 0, "teacher_temp", "warmup_teacher_temp", "student_temp")
        shares(self, "momentum", "center_momentum", "warmup_teacher_steps", "freeze_last_layer")
