"""The configuration of a run: every choice that its result depends on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AUTO = "auto"
"""The value of ``TrainConfig.dim_weight`` that means: computed during the run."""

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
        epochs: Number of passes over the images, in the place of ``steps``; 0 leaves ``steps``.
        batch_size: Images per step (each gives several views).
        accumulate: Number of equal parts that a batch is worked on in, one after the other, to
            save memory. Losses and DSE are then those of a part.
        optimizer: ``"adamw"``, ``"sgd"`` or ``"lars"``.
        sgd_momentum: Momentum of SGD and LARS.
        lr: Peak learning rate.
        min_lr: Learning rate at the last step.
        warmup: Share of the steps over which the learning rate rises linearly.
        weight_decay: Weight decay at the first step.
        weight_decay_end: Weight decay at the last step (cosine in between).
        clip_grad: Bound on the gradient's norm; 0 switches clipping off.
        init: Checkpoint to start from; None starts from random weights.
        init_format: What wrote it: a method of ``dse_ext.checkpoints``, or ``"auto"``: this
            program where the file is one of its own, else the method.
        allow_pickle: Whether code in the checkpoint may run.
        dse_weight: β of L = L_ssl − β · DSE; 0 trains without the regularizer.
        dse_every: DSE takes part in every n-th step; β is not scaled for it.
        dse_warmup: Share of the steps over which β rises linearly.
        dim_weight: λ of DSE = M_inter − M_intra + λ · M_dim: a number, or ``"auto"``: the ratio of
            the standard deviations of both parts over the run so far.
        dse_layer: Layer whose dense features are regularized: ``"last"`` (after the final norm),
            the number of a block or stage (negative: from the end), or the name of a module.
        dse_views: Number of global views whose features are regularized; 0 for all.
        local_clusters: Clusters per image in the regularizer and in the scores.
        global_clusters: Clusters per group of images in the regularizer and in the scores.
        checkpoints: Number of checkpoints that are kept, evenly spaced; the untrained network is
            kept besides. 0 chooses: one for every 20 steps, at least 1 and at most 10.
        score_images: Number of training images that DSE scores are computed on.
        probe_images: Number of labelled training scenes that the linear probe is fitted to.
        heldout_images: Number of held-out scenes that the linear probe is measured on.
        seed: Seed of everything.
        precision: ``"float32"``, ``"bfloat16"`` (autocast), or ``"float16"`` (autocast with a
            scaled loss; steps whose gradient is not finite are skipped).
        grad_checkpointing: Compute activations again in the backward pass, to save memory.
        compile: Compile the method's forward and backward pass with ``torch.compile``.
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
    epochs: float = 0.0
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    sgd_momentum: float = 0.9
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup: float = 0.1
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip_grad: float = 3.0
    init: str | None = None
    init_format: str = "auto"
    allow_pickle: bool = False
    dse_weight: float = 0.001
    dse_every: int = 1
    dse_warmup: float = 0.0
    dim_weight: float | str = 1.0
    dse_layer: str = "last"
    dse_views: int = 0
    local_clusters: int = 3
    global_clusters: int = 24
    checkpoints: int = 0
    score_images: int = 2048
    probe_images: int = 512
    heldout_images: int = 256
    seed: int = 0
    precision: str = "float32"
    grad_checkpointing: bool = False
    compile: bool = False
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
        if not self.dse_warmup <= 1:
            raise ConfigError(
                f"dse_warmup is a share of the steps, in [0, 1], got {self.dse_warmup}."
            )
        if not self.sgd_momentum < 1:
            raise ConfigError(f"sgd_momentum must lie in [0, 1), got {self.sgd_momentum}.")
        for name, accepted in _ACCEPTED.items():
            if getattr(self, name) not in accepted:
                raise ConfigError(
                    f"{name} must be {', '.join(accepted[:-1])} or {accepted[-1]}, "
                    f"got {getattr(self, name)!r}."
                )
        if isinstance(self.dim_weight, str):
            if self.dim_weight != AUTO:
                raise ConfigError(
                    f"dim_weight must be a number >= 0 or {AUTO!r}, got {self.dim_weight!r}."
                )
        elif not self.dim_weight >= 0:
            raise ConfigError(
                f"dim_weight must be a number >= 0 or {AUTO!r}, got {self.dim_weight}."
            )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate must divide batch_size ({self.batch_size}), got {self.accumulate}."
            )
        if not self.epochs and self.checkpoints > self.steps:
            raise ConfigError(
                f"checkpoints must be <= steps ({self.steps}), got {self.checkpoints}."
            )
        if self.patch_size is not None and self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size must be a multiple of patch_size ({self.patch_size}), "
                f"got {self.image_size}."
            )

    @classmethod
    def for_method(cls, method: str, **options: Any) -> TrainConfig:
        """The configuration that ``dse-ext train --method METHOD`` has.

        Args:
            method: Name of the method; its recipe takes the place of the defaults.
            **options: Options that differ from the recipe and the defaults.

        Raises:
            ConfigError: If there is no such method, or an option is not accepted.

        Examples:
            >>> TrainConfig.for_method("byol", steps=200).backbone
            'resnet18'
        """
        return merge_options({"method": method, **options})

    @property
    def start(self) -> str:
        """What the network at step 0 is: ``"untrained"``, or ``"given"`` as a checkpoint."""
        return "untrained" if self.init is None else "given"

    def for_images(self, images: int) -> TrainConfig:
        """The same configuration with ``epochs``, if there are any, turned into ``steps``.

        Args:
            images: Number of images of the data set.
        """
        if not self.epochs:
            return self
        steps = max(math.ceil(self.epochs * images / self.batch_size), 1)
        return dataclasses.replace(self, steps=steps)

    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps whose networks are kept, from 0 (untrained) to the last."""
        # Of a run that is counted in epochs it may turn out that it has fewer steps.
        number = min(self.checkpoints or min(max(self.steps // 20, 1), 10), self.steps)
        return tuple(round(k * self.steps / number) for k in range(number + 1))

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
    "epochs": 0,
    "batch_size": 1,
    "accumulate": 1,
    "sgd_momentum": 0,
    "min_lr": 0,
    "warmup": 0,
    "weight_decay": 0,
    "weight_decay_end": 0,
    "clip_grad": 0,
    "dse_weight": 0,
    "dse_every": 1,
    "dse_warmup": 0,
    "dse_views": 0,
    "local_clusters": 1,
    "global_clusters": 1,
    "checkpoints": 0,
    "score_images": 1,
    "probe_images": 1,
    "heldout_images": 1,
    "seed": 0,
    "threads": 0,
    "workers": -1,
    "save_every": 1,
}

_ACCEPTED: dict[str, tuple[str, ...]] = {
    "precision": ("float32", "bfloat16", "float16"),
    "optimizer": ("adamw", "sgd", "lars"),
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
    """Puts a configuration together.

    Later ones take precedence: defaults, the method's recipe, what a checkpoint of ``init`` says of
    its network (or, in the place of all three, the resumed run's configuration); preset; given
    options.

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
    if "steps" in given and given.get("epochs"):
        raise ConfigError(
            f"give steps or epochs, not both: got {given['steps']} and {given['epochs']}."
        )
    chosen = PRESETS[preset] if preset is not None else {}
    values: dict[str, Any]
    if resumed is not None and (resumed / "config.json").is_file():
        values = TrainConfig.load(resumed / "config.json").to_dict()
    else:
        network = _network_of(given.get("init"))
        named = {**network, **chosen, **given}
        method = named.get("method", TrainConfig.method)
        values = {"method": method, "backbone": TrainConfig.backbone}
        values = _overlay(values, _recipe(method, named.get("backbone")))
        # The checkpoint's own arguments: a recipe's would make another network of it.
        values = {**_overlay(values, network), **_only(network, "backbone_args")}
    return TrainConfig.from_dict(_overlay(_overlay(values, chosen), given))


def _overlay(values: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Puts options on top of others; arguments are added to those of the same owner."""
    merged = {**values, **layer}
    for name, owner in (("method_args", "method"), ("backbone_args", "backbone")):
        same = merged.get(owner) == values.get(owner)
        merged[name] = {**(values.get(name, {}) if same else {}), **layer.get(name, {})}
    return merged


def _recipe(method: str, backbone: str | None) -> Mapping[str, Any]:
    """The recipe of a method; of another kind of backbone only the method's own options hold."""
    from dse_ext.ssl.methods import METHODS

    if method not in METHODS:  # an error where the method is created
        return {}
    recipe = METHODS[method].recipe
    if backbone is not None and _kind(backbone) != _kind(
        recipe.get("backbone", TrainConfig.backbone)
    ):
        return _only(recipe, "method_args")
    return recipe


def _kind(backbone: str) -> str:
    """``"resnet"`` of ``"resnet18"``, ``"vit"`` of ``"vit_small_patch16_224"``."""
    return re.split(r"[^a-z]", backbone, maxsplit=1)[0]


def _network_of(checkpoint: str | None) -> dict[str, Any]:
    """What the configuration of the run that wrote a checkpoint says of its network."""
    if checkpoint is None:
        return {}
    folder = Path(checkpoint).parent
    for path in (folder / "config.json", folder.parent / "config.json"):
        if path.is_file():
            try:
                values = TrainConfig.load(path).to_dict()
            except ConfigError:
                continue  # other programs have a config.json too
            return _only(values, "method", "method_args", "backbone", "backbone_args",
                         "patch_size", "image_size")  # fmt: skip
    return {}


def _only(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
