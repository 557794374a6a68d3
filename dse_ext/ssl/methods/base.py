"""What a self-supervised method has to provide; the training loop knows nothing more of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self

from dse_ext.ssl.backbone import FAMILIES, DenseBackbone
from dse_ext.ssl.config import ConfigError


def recipe(base: Mapping[str, Any] | None = None, /, **options: Any) -> Mapping[str, Any]:
    """A recipe: options of a run that take the place of their defaults.

    Args:
        base: Another recipe to start from.
        **options: Options of :class:`dse_ext.ssl.TrainConfig`.
    """
    return MappingProxyType({**(base or {}), **options})


class MethodOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: The method's own loss, 0-dim.
        patch_tokens: Dense features ``(views * B, N, d)`` of the trained network, one view after
            the other, still in the graph: the regularizer is applied to them.
        views: Number of views in ``patch_tokens``.
    """

    loss: Tensor
    patch_tokens: Tensor
    views: int = 1


class Method(nn.Module, ABC):
    """A self-supervised method: views, networks and loss.

    All state that training changes (networks, teachers, centres, queues) must be in parameters
    or buffers, so that ``state_dict`` is enough to resume a run.

    Attributes:
        name: Name on the command line.
        title: Name as it is written.
        paper: Authors, venue and year.
        url: Address of the paper.
        families: Keys of :data:`dse_ext.ssl.backbone.FAMILIES`: backbones that it can train.
        regularizes: Which dense features DSE is applied to.
        min_batch: Least number of images in a batch.
        recipe: Options of :class:`dse_ext.ssl.TrainConfig` that take the place of their defaults
            where a run does not name them.
        Options: Dataclass of the method's options with their defaults.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    url: ClassVar[str]
    families: ClassVar[tuple[str, ...]] = tuple(FAMILIES)
    regularizes: ClassVar[str]
    min_batch: ClassVar[int] = 1
    recipe: ClassVar[Mapping[str, Any]] = recipe()
    Options: ClassVar[type]

    @classmethod
    def create(
        cls, backbone: DenseBackbone, image_size: int, steps: int, args: Mapping[str, Any]
    ) -> Self:
        """Creates the method with checked options.

        Args:
            backbone: The network to be trained.
            image_size: Size of a global view in pixels.
            steps: Number of steps of the whole run, for schedules.
            args: Options that differ from their defaults.

        Returns:
            The method.

        Raises:
            ConfigError: If an option is unknown or its value is not accepted, or the method
                cannot train such a backbone.
        """
        known = {f.name: f for f in dataclasses.fields(cls.Options)}
        for key, value in args.items():
            if key not in known:
                raise ConfigError(
                    f"method {cls.name} has no option {key!r}; it has {', '.join(sorted(known))}."
                )
            _check_type(key, value, known[key].default)
        if backbone.family not in cls.families:
            raise ConfigError(
                f"method {cls.name} trains {cls.backbones()} backbones, but "
                f"{type(backbone.model).__name__} is of the family {FAMILIES[backbone.family]}."
            )
        return cls(backbone, image_size, steps, cls.Options(**args))

    @classmethod
    def backbones(cls) -> str:
        """The families that it can train, as text."""
        return ", ".join(FAMILIES[family] for family in cls.families)

    def __init__(self, backbone: DenseBackbone, image_size: int, steps: int, options: Any) -> None:
        """Keeps what every method needs; sub-classes build their networks around ``backbone``."""
        super().__init__()
        self.image_size = image_size
        self.steps = steps
        self.options = options

    @abstractmethod
    def transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Returns the augmentation that makes the views of one image."""

    @abstractmethod
    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """Computes the loss of one batch.

        Args:
            views: One tensor ``(B, 3, h, w)`` per view.
            step: Number of optimizer steps done so far.
        """

    @abstractmethod
    def trained(self) -> list[nn.Module]:
        """The modules that the optimizer trains."""

    @abstractmethod
    def scored(self) -> DenseBackbone:
        """The network that is kept as the run's result and scored."""

    def before_optimizer(self, step: int) -> None:
        """Called between the backward pass and the optimizer step."""

    def after_optimizer(self, step: int) -> None:
        """Called after the optimizer step, for example to move a teacher."""


def _check_type(key: str, value: Any, default: Any) -> None:
    """Raises ConfigError unless a value is of the kind of the option's default."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        wanted, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        wanted, fits = "an integer", number and isinstance(value, int)
    else:
        wanted, fits = "a number", number
    if not fits:
        raise ConfigError(f"method option {key} must be {wanted}, got {value!r}.")
