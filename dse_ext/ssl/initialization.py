"""Starting from a checkpoint: one of this program, or of any method that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dse_ext.ssl.backbone import DenseBackbone
from dse_ext.ssl.config import ConfigError, TrainConfig

AUTO_FORMAT = "auto"
OWN_FORMAT = "dse-ext"


def start_from(config: TrainConfig, backbone: DenseBackbone) -> Mapping[str, Any] | None:
    """Loads the checkpoint that a run starts from into its backbone.

    Args:
        config: The run's configuration; without ``init`` nothing is done.
        backbone: The network; its weights are replaced.

    Returns:
        The state of the whole method, where the checkpoint is a saved run (``resume.pt``): heads
        and teachers with the backbone. None where it is a backbone alone.

    Raises:
        ConfigError: If there is no such file, or it does not fit the configuration.
    """
    if config.init is None:
        return None
    path = Path(config.init)
    if not path.is_file():
        raise ConfigError(f"init must be a checkpoint file, got {config.init!r}: no such file.")
    state = _saved_run(config, path)
    if state is not None:
        return state
    from dse_ext import checkpoints

    known = config.init_format
    if known == AUTO_FORMAT:
        own = checkpoints.find_reader(OWN_FORMAT).fits(path.name)
        known = OWN_FORMAT if own else config.method
    args = dict(config.backbone_args)
    if config.patch_size is not None:
        args["patch_size"] = config.patch_size
    try:
        network = checkpoints.load(
            path,
            known,
            model=config.backbone,
            model_args=args,
            image_size=config.image_size,
            allow_pickle=config.allow_pickle,
        )
    except checkpoints.CheckpointError as error:
        raise ConfigError(
            f"init: {path} cannot be read as a checkpoint of {known}: {error}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"init: {error}") from error
    _load(backbone.model, network.model.state_dict(), config)
    return None


def _saved_run(config: TrainConfig, path: Path) -> Mapping[str, Any] | None:
    """The networks of a ``resume.pt``, None for any other file."""
    from dse_ext.checkpoints import read_content

    if path.name != "resume.pt" or config.init_format not in (AUTO_FORMAT, OWN_FORMAT):
        return None
    content = read_content(path)
    state = content.get("method") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ConfigError(f"init: {path} does not hold a saved run.")
    return state


def load_method(method: nn.Module, state: Mapping[str, Any], config: TrainConfig) -> None:
    """Loads what :func:`start_from` returned.

    Raises:
        ConfigError: If it is the state of another method or of other networks.
    """
    _load(method, state, config)


def _load(module: nn.Module, state: Mapping[str, Any], config: TrainConfig) -> None:
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        first = str(error).splitlines()[:3]
        raise ConfigError(
            f"init: {config.init} does not fit method {config.method} with backbone "
            f"{config.backbone}: {' '.join(line.strip() for line in first)}"
        ) from error
