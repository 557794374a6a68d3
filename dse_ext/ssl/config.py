"""The configuration of a run: every choice that its result depends on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXTURE_SCENES = "texture-scenes"
"""The value of ``TrainConfig.data`` that means :class:`dse_ext.data.TextureScenes`."""


class ConfigError(ValueError):
    """A configuration that cannot be run."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run.

    Attributes:
        method: Name of the self-supervised method, one of ``dse_ext.ssl.methods.METHODS``.
        method_args: Options of the method that differ from its defaults.
        backbone: Name of a timm model.
        backbone_args: Keyword arguments for ``timm.create_model``.
        data: ``"texture-scenes"`` or a folder of images.
        train_images: Number of training scenes (``"texture-scenes"`` only).
        image_size: Width and height of a global view and of an image to be scored, in pixels.
        patch_size: Patch size of a ViT in pixels; None leaves the model's own.
        steps: Number of optimizer steps.
        batch_size: Images per step (each gives several views).
        lr: Peak learning rate of AdamW.
        min_lr: Learning rate at the last step.
        warmup: Share of the steps over which the learning rate rises linearly.
        weight_decay: Weight decay at the first step.
        weight_decay_end: Weight decay at the last step (cosine in between).
        clip_grad: Bound on the gradient's norm; 0 switches clipping off.
        dse_weight: β of L = L_ssl − β · DSE; 0 trains without the regularizer.
        local_clusters: Clusters per image in the regularizer and in the scores.
        global_clusters: Clusters per group of images in the regularizer and in the scores.
        checkpoints: Number of checkpoints that are kept, evenly spaced; the untrained network is
            kept besides.
        score_images: Number of training images that DSE scores are computed on.
        probe_images: Number of labelled training scenes that the linear probe is fitted to.
        heldout_images: Number of held-out scenes that the linear probe is measured on.
        seed: Seed of everything.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
        device: ``"auto"`` or a torch device.
        threads: CPU threads of the training process; 0 chooses.
        workers: Processes that prepare images; -1 chooses, 0 prepares them in the training
            process.
        save_every: Steps between two writes of the state that ``--resume`` starts from; it is
            written with each checkpoint as well.
    """

    method: str = "dino"
    method_args: Mapping[str, Any] = field(default_factory=dict)
    backbone: str = "vit_tiny_patch16_224"
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    data: str = TEXTURE_SCENES
    train_images: int = 2048
    image_size: int = 96
    patch_size: int | None = None
    steps: int = 1000
    batch_size: int = 64
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup: float = 0.1
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip_grad: float = 3.0
    dse_weight: float = 0.001
    local_clusters: int = 3
    global_clusters: int = 24
    checkpoints: int = 10
    score_images: int = 2048
    probe_images: int = 512
    heldout_images: int = 256
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"
    threads: int = 0
    workers: int = -1
    save_every: int = 100

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ConfigError: With the option, what was given and what is accepted.
        """
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{name} must be >= {least}, got {value}.")
        for name in ("lr",):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}.")
        if not self.warmup < 1:
            raise ConfigError(f"warmup is a share of the steps, in [0, 1), got {self.warmup}.")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision must be float32 or bfloat16, got {self.precision!r}.")
        if self.checkpoints > self.steps:
            raise ConfigError(
                f"checkpoints must be <= steps ({self.steps}), got {self.checkpoints}."
            )
        if self.patch_size is not None and self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size must be a multiple of patch_size ({self.patch_size}), "
                f"got {self.image_size}."
            )

    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps whose networks are kept, from 0 (untrained) to the last."""
        return tuple(round(k * self.steps / self.checkpoints) for k in range(self.checkpoints + 1))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary that JSON can hold."""
        return {
            f.name: dict(v) if isinstance(v := getattr(self, f.name), Mapping) else v
            for f in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: If a key is unknown.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown option(s) {', '.join(unknown)}; known: {sorted(known)}.")
        return cls(**values)

    def save(self, path: Path) -> None:
        """Writes the configuration as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Reads what :meth:`save` wrote.

        Raises:
            ConfigError: If the file is no such configuration.
        """
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} does not hold a configuration.")
        return cls.from_dict(values)


_LEAST: dict[str, float] = {
    "train_images": 1,
    "image_size": 16,
    "patch_size": 1,
    "steps": 1,
    "batch_size": 1,
    "min_lr": 0,
    "warmup": 0,
    "weight_decay": 0,
    "weight_decay_end": 0,
    "clip_grad": 0,
    "dse_weight": 0,
    "local_clusters": 1,
    "global_clusters": 1,
    "checkpoints": 1,
    "score_images": 1,
    "probe_images": 1,
    "heldout_images": 1,
    "seed": 0,
    "threads": 0,
    "workers": -1,
    "save_every": 1,
}

MACHINE_OPTIONS: frozenset[str] = frozenset({"device", "threads", "workers", "save_every"})
"""Options that say where and how a run is carried out: a resumed run may change them."""

PRESETS: dict[str, dict[str, Any]] = {
    # Sized for two CPU cores and four minutes.
    "demo": {
        "method": "dino",
        "backbone": "vit_tiny_patch16_224",
        "backbone_args": {"embed_dim": 128, "depth": 4, "num_heads": 4},
        "image_size": 64,
        "patch_size": 8,
        "steps": 240,
        "batch_size": 32,
        "lr": 1e-3,
        "warmup": 0.1,
        "train_images": 1024,
        "score_images": 256,
        "probe_images": 256,
        "heldout_images": 192,
        "method_args": {
            "hidden_dim": 512,
            "bottleneck_dim": 64,
            "output_dim": 1024,
            "batch_norm": True,
            "local_views": 2,
            "momentum": 0.99,
            # Sharp targets: a few hundred steps are too few for 0.04 to leave the uniform output.
            "teacher_temp": 0.02,
            "warmup_teacher_temp": 0.02,
        },
    },
}
"""Named sets of options; options given besides take precedence."""


def merge_options(
    given: Mapping[str, Any], preset: str | None = None, resumed: Path | None = None
) -> TrainConfig:
    """Puts a configuration together: defaults, or the resumed run's; preset; given options.

    Args:
        given: Options that were given; ``method_args`` and ``backbone_args`` are added to those
            of the preset or run, key by key, unless another method or backbone is given.
        preset: Name of a preset.
        resumed: Folder of a run to be continued; its configuration takes the place of the
            defaults if there is one.

    Returns:
        The configuration.

    Raises:
        ConfigError: If there is no such preset, or an option is not accepted.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(sorted(PRESETS))}, got {preset!r}.")
    values: dict[str, Any] = {}
    if resumed is not None and (resumed / "config.json").is_file():
        values = TrainConfig.load(resumed / "config.json").to_dict()
    values.update(PRESETS[preset] if preset is not None else {})
    for name, owner in (("method_args", "method"), ("backbone_args", "backbone")):
        before = (
            values.get(name, {}) if given.get(owner, values.get(owner)) == values.get(owner) else {}
        )
        values[name] = {**before, **given.get(name, {})}
    values.update({k: v for k, v in given.items() if k not in ("method_args", "backbone_args")})
    return TrainConfig.from_dict(values)


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
