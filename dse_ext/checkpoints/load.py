"""From a checkpoint file to a network that gives dense features."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dse_ext.checkpoints.conversions import guess_model
from dse_ext.checkpoints.errors import CheckpointMismatchError
from dse_ext.checkpoints.extractor import FINAL, DenseExtractor, evaluation_transform
from dse_ext.checkpoints.files import read_content
from dse_ext.checkpoints.reader import CheckpointReader, ModelSpec, StateDict
from dse_ext.checkpoints.registry import find_reader

DEFAULT_IMAGE_SIZE = 224


def load(
    path: str | os.PathLike[str],
    method: str | CheckpointReader,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    layer: int | str = FINAL,
    allow_pickle: bool = False,
) -> DenseExtractor:
    """Loads the network of a checkpoint file.

    Position embeddings and relative position biases are resampled to the image size by timm. All
    other weights must fit: a weight that the file lacks or has too many is an error, apart from
    the heads that the method's layout declares.

    Args:
        path: The file.
        method: Name of the method (``dse-ext evaluate --list``), ``"module:attribute"`` or a
            :class:`CheckpointReader`.
        model: Name of a timm model; None takes the method's.
        model_args: Keyword arguments for ``timm.create_model``, in addition to the method's.
        image_size: Width and height of an image in pixels; None takes that of the training run
            where the file tells it, else 224.
        layer: Which layer's features: see :class:`DenseExtractor`.
        allow_pickle: Whether code that the file contains may run. Only for files that come from
            someone you trust.

    Returns:
        The network in evaluation mode on the CPU; ``forward(images)`` gives pooled features
        ``(B, d)`` and dense features ``(B, N, d)``.

    Raises:
        CheckpointError: If the file is damaged, not laid out as the method's, needs a pickle that
            was not allowed, or does not fit the model; the error has the missing and unexpected
            names.
        ValueError: If there is no such method, model, layer, or image size.
        FileNotFoundError: If there is no such file.

    Examples:
        >>> import torch
        >>> from dse_ext.checkpoints import load
        >>> network = load("runs/dino/checkpoint0100.pth", "dino")
        >>> pooled, dense = network(torch.rand(2, 3, 224, 224))
        >>> dense.shape, network.grid(224, 224)
        (torch.Size([2, 196, 384]), (14, 14))
    """
    reader = find_reader(method)
    path = Path(path)
    content = read_content(path, allow_pickle=allow_pickle)
    state = reader.network_state(content)
    spec = _spec(reader, content, state, path, model)
    size = image_size or spec.image_size or DEFAULT_IMAGE_SIZE
    network = create_model(spec.name, size, {**spec.args, **(model_args or {})})
    _load_weights(network, state, spec.name)
    return DenseExtractor(
        network,
        image_size=size,
        transform=evaluation_transform(size, reader.mean, reader.std),
        layer=layer,
        # Another model than the method's own may have another number of them, which timm knows.
        prefix_tokens=reader.prefix_tokens if spec.name == reader.model else None,
    )


def create_model(name: str, image_size: int, args: Mapping[str, Any]) -> nn.Module:
    """Creates an untrained timm model without classifier for images of one size.

    Args:
        name: Name of the timm model.
        image_size: Width and height of an image in pixels.
        args: Keyword arguments for ``timm.create_model``.

    Raises:
        ValueError: If timm has no such model, or the model refuses the arguments or the size.
    """
    import timm

    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:8] or timm.list_models("vit_*")[:8]
        raise ValueError(f"model: timm has no {name!r}; it has {', '.join(similar)}, ...")
    # Convolutional networks take images of any size and know neither keyword.
    sized: tuple[dict[str, Any], ...] = (
        {"img_size": image_size, "dynamic_img_size": True},
        {"img_size": image_size},
        {},
    )
    refusals: list[str] = []
    for size_args in sized:
        try:
            model: nn.Module = timm.create_model(
                name, pretrained=False, num_classes=0, **{**size_args, **args}
            )
        except TypeError as error:
            refusals.append(str(error))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"model {name} cannot be created for {image_size} x {image_size} images: {error}"
            ) from error
        else:
            return model
    raise ValueError(f"model {name} does not accept {', '.join(args)}: {refusals[-1]}")


def _spec(
    reader: CheckpointReader, content: object, state: StateDict, path: Path, model: str | None
) -> ModelSpec:
    """The model to be created: as asked for, as the file says, or as the method has it."""
    if reader.describe is not None and isinstance(content, Mapping):
        if model is None:
            return reader.describe(content, state, path)
        # The file's image size and options hold for the model that was named, where it is the same.
        with suppress(ValueError):
            described = reader.describe(content, state, path)
            if described.name == model:
                return described
        return ModelSpec(model, reader.model_args)
    if model is None or model == reader.model:
        return ModelSpec(reader.model, reader.model_args)
    return ModelSpec(model, _shared_args(reader, model))


def _shared_args(reader: CheckpointReader, model: str) -> Mapping[str, Any]:
    """The method's arguments that hold for its other sizes too."""
    family = model.partition("_")[0]
    if family != reader.model.partition("_")[0]:
        return {}
    # The number of heads is a matter of the size.
    return {key: value for key, value in reader.model_args.items() if key != "num_heads"}


def _load_weights(model: nn.Module, state: StateDict, name: str) -> None:
    """Loads weights; nothing may be missing, left over or of another shape."""
    own = model.state_dict()
    problem = _patch_size_problem(own, state)
    converted = None if problem else _timm_conversion(model, state)
    weights = state if converted is None else converted
    # Files of old versions of torch do not have this counter, and evaluation does not use it.
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in own]
    if not (problem or missing or unexpected):
        shapes = [k for k, v in weights.items() if v.shape != own[k].shape]
        if shapes:
            key = shapes[0]
            problem = (
                f"{len(shapes)} weight(s) have another shape, such as {key}: "
                f"{tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the model"
            )
    if not (problem or missing or unexpected):
        model.load_state_dict(weights, strict=False)
        return
    parts = [problem] if problem else []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            parts.append(f"{len(names)} {what}: {_listed(names)}")
    guess = guess_model(state)
    hint = f". The weights look like those of {guess}: name it as the model" if guess else ""
    raise CheckpointMismatchError(
        f"the weights do not fit the timm model {name}: {'; '.join(parts)}"
        + (hint if guess != name else ""),
        missing,
        unexpected,
    )


def _patch_size_problem(own: Mapping[str, torch.Tensor], state: StateDict) -> str | None:
    """A difference that timm would resample away, which makes another network of it."""
    key = "patch_embed.proj.weight"
    if key not in own or key not in state or own[key].ndim != 4 or state[key].ndim != 4:
        return None
    theirs, ours = tuple(state[key].shape), tuple(own[key].shape)
    if theirs[2:] == ours[2:]:
        return None
    return f"patches are of {theirs[2:]} pixels in the file and of {ours[2:]} in the model"


def _timm_conversion(model: nn.Module, state: StateDict) -> StateDict | None:
    """The conversion that timm itself does for the model; None where it has none or it fails."""
    module = importlib.import_module(type(model).__module__)
    convert: Callable[[StateDict, nn.Module], StateDict] | None = getattr(
        module, "checkpoint_filter_fn", None
    )
    if convert is None:
        return None
    try:
        return convert(dict(state), model)
    except (AttributeError, AssertionError, KeyError, RuntimeError, ValueError):
        return None  # weights of another network: the comparison of the names will tell which


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
