"""The description of one checkpoint layout: data, and as little code as the layout needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from dse_ext.checkpoints.errors import CheckpointLayoutError

StateDict: TypeAlias = dict[str, Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_EPOCH = re.compile(r"\{epoch(?::0(\d+)d)?\}")


@dataclass(frozen=True)
class ModelSpec:
    """Which timm model a file belongs to.

    Attributes:
        name: Name of the timm model.
        args: Keyword arguments for ``timm.create_model``.
        image_size: Width and height of an image in pixels; None for the default.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None


@dataclass(frozen=True)
class CheckpointReader:
    """Layout of the checkpoint files of one method.

    A network is found in a file in three steps: the value under the first of ``keys`` that the
    file has is a state dict; of it, the entries under the first of ``prefixes`` that occurs are
    the network, and entries without that prefix belong to other networks (heads, predictors,
    queues) and are left alone; of the network's own entries, those that match ``ignore`` are
    dropped. Everything else must fit the timm model, key by key.

    Attributes:
        name: Name on the command line.
        title: Name in print.
        source: Where the layout comes from.
        network: Which network of the method is read, such as ``"teacher"``.
        files: Patterns of file names. ``{epoch}`` stands for digits, ``{epoch:04d}`` for at least
            four of them, ``*`` for anything. The first pattern that fits gives the epoch.
        keys: Names under which the state dict may be found, in order of preference; dots go down
            into nested dictionaries, ``""`` is the file itself.
        prefixes: Prefixes of the network's entries, in order of preference; ``""`` takes all.
        model: timm model that the file belongs to unless told otherwise.
        model_args: Keyword arguments for ``timm.create_model``.
        prefix_tokens: Number of tokens in front of the patch tokens; None takes timm's number.
        ignore: Patterns (``*`` stands for anything) of the network's entries that are no part of
            the backbone, such as its classifier.
        convert: Renames entries, prefix stripped, to timm's names; None where they are the same or
            timm's own conversion for the model does it.
        describe: Finds the timm model from the file's content, the network's entries and the path;
            None uses ``model``.
        mean: Mean of the pixels' colours that the method normalizes with.
        std: Their standard deviation.

    Examples:
        >>> from dse_ext.checkpoints import CheckpointReader, register
        >>> reader = register(
        ...     CheckpointReader(
        ...         name="mine",
        ...         title="My method",
        ...         source="https://example.org",
        ...         network="teacher",
        ...         files=("ckpt_{epoch}.pt",),
        ...         keys=("ema",),
        ...         prefixes=("module.encoder.",),
        ...         model="vit_base_patch16_224",
        ...     )
        ... )
    """

    name: str
    title: str
    source: str
    network: str
    files: tuple[str, ...]
    keys: tuple[str, ...]
    prefixes: tuple[str, ...]
    model: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    prefix_tokens: int | None = None
    ignore: tuple[str, ...] = ()
    convert: Callable[[StateDict], StateDict] | None = None
    describe: Callable[[Mapping[str, Any], StateDict, Path], ModelSpec] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def epoch(self, file_name: str) -> int | None:
        """The epoch in a file name; None where the pattern that fits has none.

        Raises:
            CheckpointLayoutError: If no pattern fits.
        """
        for pattern in self.files:
            match = _file_pattern(pattern).fullmatch(file_name)
            if match:
                return int(match["epoch"]) if "epoch" in match.groupdict() else None
        raise CheckpointLayoutError(
            f"the file name must be like {' or '.join(self.files)} for {self.name}, "
            f"got {file_name!r}"
        )

    def fits(self, file_name: str) -> bool:
        """Whether a file of this name may be a checkpoint of the method."""
        return any(_file_pattern(pattern).fullmatch(file_name) for pattern in self.files)

    def network_state(self, content: object) -> StateDict:
        """The entries of the network, prefix stripped, without what is to be ignored.

        Args:
            content: What the file holds.

        Raises:
            CheckpointLayoutError: If the file has neither of ``keys`` or none of ``prefixes``.
        """
        state = self._state_dict(content)
        for prefix in self.prefixes:
            own = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
            if own:
                break
        else:
            raise CheckpointLayoutError(
                f"no weight's name begins with {' or '.join(self.prefixes)}, as those of the "
                f"{self.network} in a checkpoint of {self.name} do; the file has "
                f"{_listed(_stems(state))}"
            )
        if self.convert is not None:
            own = self.convert(own)
        return {
            key: value
            for key, value in own.items()
            if not any(fnmatchcase(key, pattern) for pattern in self.ignore)
        }

    def _state_dict(self, content: object) -> StateDict:
        if not isinstance(content, Mapping):
            raise CheckpointLayoutError(
                f"the file must hold a dictionary, got {type(content).__name__}"
            )
        for key in self.keys:
            found: object = content
            for part in key.split(".") if key else ():
                found = found.get(part) if isinstance(found, Mapping) else None
            if isinstance(found, Mapping):
                state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
                if state:
                    return state
        wanted = " or ".join(repr(key) if key else "the file itself" for key in self.keys)
        raise CheckpointLayoutError(
            f"the weights of a checkpoint of {self.name} are in {wanted}; the file has "
            f"{_listed(sorted(map(str, content)))}"
        )


def _file_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a file-name pattern."""
    parts: list[str] = []
    last = 0
    for match in _EPOCH.finditer(pattern):
        parts.append(_glob(pattern[last : match.start()]))
        digits = match[1]
        parts.append(f"(?P<epoch>[0-9]{{{int(digits)},}})" if digits else "(?P<epoch>[0-9]+)")
        last = match.end()
    return re.compile("".join(parts) + _glob(pattern[last:]))


def _glob(text: str) -> str:
    return ".*".join(re.escape(part) for part in text.split("*"))


def _stems(state: StateDict) -> list[str]:
    """The first two parts of the names, which show how a file is laid out."""
    return sorted({".".join(key.split(".")[:2]) for key in state})


def _listed(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown or "nothing"
