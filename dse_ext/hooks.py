"""Dense features of a model that is not ours, captured where they are: by a forward hook."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

__all__ = ["DenseFeatures", "block_names", "dense_layers"]

# Where libraries keep the blocks or stages of a backbone: timm, DINO, MAE, torchvision, Hugging
# Face, open_clip.
_BLOCK_LISTS = ("blocks", "layers", "layer", "stages", "resblocks", "features")
_NUMBERED_STAGE = re.compile(r"^(layer|stage|block|s)(\d+)$")
_FINAL_NORMS = ("norm", "layernorm", "layer_norm", "ln", "ln_post", "ln_f", "post_layernorm",
                "final_layer_norm", "norm_pre", "fc_norm")  # fmt: skip
# Learned tokens in front of the patch tokens: name of the parameter -> whether it holds several.
_PREFIX_PARAMETERS = {
    "cls_token": False, "class_token": False, "class_embedding": False, "dist_token": False,
    "distillation_token": False, "reg_token": True, "register_tokens": True,
    "storage_tokens": True,
}  # fmt: skip
# Fields of a model's output that hold dense features, in the order in which they are preferred.
_OUTPUT_FIELDS = ("x_norm_patchtokens", "last_hidden_state", "hidden_states", "feature_maps")
# Of torch.compile, and of DistributedDataParallel.
_WRAPPERS = ("_orig_mod", "module")


class DenseFeatures:
    """Captures the dense features of a forward pass as ``(B, N, d)``.

    Works on any timm, Hugging Face or torchvision backbone, and on any module with a layer whose
    output is a token sequence or a feature map: class and register tokens are removed, maps
    (NCHW, or NHWC as in Swin) are flattened in row order. The features stay in the autograd graph.

    The hook sits in the network that is trained and does not change what it computes. It is left
    out of copies (``copy.deepcopy``, for a teacher) and of pickles. A model may be wrapped by
    ``DistributedDataParallel``, FSDP2 or ``torch.compile``, before or after; a compiled model must
    not have run yet, because ``torch.compile`` keeps the hooks of its first call. Within
    activation checkpointing use the non-reentrant kind (``use_reentrant=False``, the default of
    timm and of Hugging Face); the reentrant kind runs the block without a graph.

    Args:
        model:
            The model, or one that contains it.
        layer:
            Which output to capture:

            - None (default): the last block or stage, after the final norm where the model has one;
            - an integer: this block or stage, counted from 0, or from the end where negative; as
              it is, before the final norm;
            - a string: the module of this name, as in ``model.named_modules()``.
        prefix_tokens:
            Number of tokens in front of the patch tokens. Default: as the model has it (timm's
            ``num_prefix_tokens``, or its class, distillation and register parameters).
        channels_last:
            Whether a map is ``(B, H, W, C)`` rather than ``(B, C, H, W)``. Default: as the
            layer's own weights tell.
        keep:
            Number of calls whose features are kept, for methods that run several views one after
            another; None keeps all calls until :meth:`take` or :meth:`clear`.

    Attributes:
        layer:
            Name of the module whose output is captured.
        last:
            Features of the last call, ``(B, N, d)``; None before it.
        grid:
            ``(h, w)`` of the last call with ``h * w == N``, N in row order; None where it is not
            known (masked tokens, an oblong image without a patch embedding in sight).

    Raises:
        ValueError: If there is no such layer, or (in the forward pass) its output is not dense.

    Examples:
        >>> import torch
        >>> from dse_ext import DSERegularizer
        >>> from dse_ext.hooks import DenseFeatures
        >>> backbone = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1)
        ... )
        >>> with DenseFeatures(backbone, "0") as features:
        ...     loss = backbone(torch.rand(4, 3, 33, 33)).square().mean()
        ...     loss = loss + DSERegularizer(weight=0.001)(features.take())
        >>> loss.backward()
        >>> features.grid
        (16, 16)
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | int | None = None,
        *,
        prefix_tokens: int | None = None,
        channels_last: bool | None = None,
        keep: int | None = 1,
    ) -> None:
        if prefix_tokens is not None and prefix_tokens < 0:
            raise ValueError(f"prefix_tokens must be >= 0 or None, got {prefix_tokens}.")
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be >= 1 or None, got {keep}.")
        model = unwrap(model)
        names = _find_layers(model, layer)
        self.layer = names[0]
        self.keep = keep
        self.grid: tuple[int, int] | None = None
        self._calls: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._merges = any("Merging" in type(module).__name__ for module in model.modules())
        # Output of the first convolution of the current pass: (batch, height, width).
        self._stem: tuple[int, int, int] | None = None
        self._model = model

        stem = _stem(model, names[0])
        if stem is not None:
            self._hook(stem, self._see_stem)
        # In the order in which they run: what the final norm gives takes the place of what the last
        # block gave, unless the norm is applied after pooling.
        for name in reversed(names):
            last_resort = name == names[-1]
            capture = _Capture(self, model, name, prefix_tokens, channels_last, last_resort)
            self._hook(_module(model, name), capture)

    @property
    def last(self) -> Tensor | None:
        """Features of the last call."""
        return self._calls[-1] if self._calls else None

    @property
    def calls(self) -> tuple[Tensor, ...]:
        """Features of the last ``keep`` calls, oldest first."""
        return tuple(self._calls)

    def take(self) -> Tensor:
        """Returns the features of the last call and lets go of all of them.

        Holding them longer than a step would hold the step's whole graph in memory.

        Raises:
            RuntimeError: If the layer has not run since.
        """
        if not self._calls:
            raise RuntimeError(
                f"no features were captured: layer {self.layer!r} has not run since the last "
                "take() (or the hook was removed, or the model was compiled before it was hooked)."
            )
        last = self._calls[-1]
        self.clear()
        return last

    def clear(self) -> None:
        """Lets go of the captured features."""
        self._calls.clear()

    def remove(self) -> None:
        """Takes the hooks out of the model; what was captured stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        shape = None if self.last is None else tuple(self.last.shape)
        return f"{type(self).__name__}(layer={self.layer!r}, last={shape})"

    def _hook(self, module: nn.Module, seen: Callable[[Any], None]) -> None:
        self._handles.append(module.register_forward_hook(_Hook(seen)))

    def _see_stem(self, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            self._stem = (output.shape[0], output.shape[2], output.shape[3])

    def _keep(
        self, layer: str, features: Tensor, grid: tuple[int, int] | None, replaces: bool
    ) -> None:
        self.layer = layer
        if replaces and self._calls:
            self._calls.pop()
        self._calls.append(features)
        if self.keep is not None and len(self._calls) > self.keep:
            self._calls.pop(0)
        self.grid = grid


class _Hook:
    """A forward hook of one module; copies of the module have one that does nothing."""

    def __init__(self, seen: Callable[[Any], None]) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # Activation checkpointing runs the layer once more, during the backward pass.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self.seen(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_NoHook, ())


class _NoHook:
    """What a copy of a hooked module has in place of the hook."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        return None


class _Capture:
    """Turns the outputs of one layer into dense features."""

    def __init__(
        self,
        features: DenseFeatures,
        model: nn.Module,
        name: str,
        prefix_tokens: int | None,
        channels_last: bool | None,
        required: bool,
    ) -> None:
        self.features = features
        self.name = name
        self.required = required
        self.prefix_is_told = prefix_tokens is not None
        self.prefix = _prefix_tokens(model, name) if prefix_tokens is None else prefix_tokens
        self.channels_last = channels_last
        self.widths = _output_widths(_module(model, name))
        self.output_format = _nearest_attribute(model, name, "output_fmt")

    def __call__(self, output: Any) -> None:
        tensor, prefix = _dense_tensor(output, self.prefix)
        if tensor is None or tensor.ndim not in (3, 4):
            if not self.required:
                return  # a norm after pooling
            given = type(output).__name__ if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(
                f"layer {self.name!r} must give tokens (B, N, d) or a map (B, C, H, W) or "
                f"(B, H, W, C), got {given}; layers that may do so: "
                f"{_listed(dense_layers(self.features._model))}."
            )
        grid: tuple[int, int] | None
        if tensor.ndim == 4:
            last = self._is_channels_last(tensor)
            height, width = tensor.shape[1:3] if last else tensor.shape[2:]
            grid = (height, width)
            dense = tensor.flatten(1, 2) if last else tensor.flatten(2).transpose(1, 2)
        else:
            stem = self.features._stem
            if stem is not None and tensor.shape[0] != stem[0] == tensor.shape[1]:
                tensor = tensor.transpose(0, 1)  # sequence first, as in open_clip
            patches = None if stem is None else stem[1] * stem[2]
            if tensor.shape[1] == patches and not self.prefix_is_told:
                prefix = 0  # CaiT adds its class token after most of its blocks
            if tensor.shape[1] <= prefix:
                raise ValueError(
                    f"layer {self.name!r} gives {tensor.shape[1]} tokens an image, of which the "
                    f"first {prefix} would be removed: give prefix_tokens."
                )
            dense = tensor[:, prefix:]
            grid = _token_grid(dense.shape[1], stem, self.features._merges)
        # The final norm runs after the last block: of one call, both see the features.
        self.features._keep(self.name, dense, grid, replaces=not self.required)

    def _is_channels_last(self, tensor: Tensor) -> bool:
        if self.channels_last is not None:
            return self.channels_last
        first, last = tensor.shape[1] in self.widths, tensor.shape[3] in self.widths
        if first != last:
            return last
        if isinstance(self.output_format, str):
            return self.output_format == "NHWC"
        stem = self.features._stem
        if stem is None:
            return False
        return not _same_shape(stem, tensor.shape[2:]) and _same_shape(stem, tensor.shape[1:3])


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile`` wrappers."""
    while True:
        # A module of one's own may well have a child called "module" next to others.
        children = dict(model.named_children())
        inner = next((children[w] for w in _WRAPPERS if len(children) == 1 and w in children), None)
        if inner is None:
            return model
        model = inner


def block_names(model: nn.Module) -> list[str]:
    """Names of the blocks or stages of a backbone, first to last.

    Args:
        model:
            The model. Of several lists of blocks the one nearest to the root counts.

    Returns:
        Names as in ``model.named_modules()``; empty where nothing is known by a usual name.
    """
    model = unwrap(model)
    level: list[tuple[str, nn.Module]] = [("", model)]
    while level:
        found: list[list[str]] = []
        deeper: list[tuple[str, nn.Module]] = []
        for path, module in level:
            dot = f"{path}." if path else ""
            children = list(module.named_children())
            deeper += [(dot + name, child) for name, child in children]
            stages = [(m, name) for name, _ in children if (m := _NUMBERED_STAGE.match(name))]
            if len(stages) > 1:
                stages.sort(key=lambda item: int(item[0].group(2)))
                found.append([dot + name for _, name in stages])
            for name, child in children:
                is_list = isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 0
                if name in _BLOCK_LISTS and is_list:
                    found.append([f"{dot}{name}.{i}" for i, _ in child.named_children()])
        if found:
            return max(found, key=len)
        level = deeper
    return []


def dense_layers(model: nn.Module) -> list[str]:
    """Names of layers that may be given to :class:`DenseFeatures`.

    Args:
        model:
            The model.

    Returns:
        The final norm and the blocks, where they are known by a usual name; else the modules of
        the first two levels.
    """
    model = unwrap(model)
    blocks = block_names(model)
    if blocks:
        return [*_final_norms(model, blocks[-1]), *blocks]
    return [name for name, _ in model.named_modules() if name and name.count(".") < 2]


def _find_layers(model: nn.Module, layer: str | int | None) -> list[str]:
    """Names of the modules to hook; the first one is preferred."""
    if isinstance(layer, str):
        names = [name for name, _ in model.named_modules()]
        if layer not in names:
            similar = difflib.get_close_matches(layer, names, n=5)
            hint = f"similar: {_listed(similar)}; " if similar else ""
            raise ValueError(
                f"layer must be the name of a module of {type(model).__name__}, got {layer!r}; "
                f"{hint}layers that may give dense features: {_listed(dense_layers(model))}."
            )
        return [layer]
    if isinstance(layer, bool) or not (layer is None or isinstance(layer, int)):
        raise ValueError(f"layer must be a name, an integer or None, got {layer!r}.")
    blocks = block_names(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks by a usual name "
            f"({', '.join(_BLOCK_LISTS)}, layer1 ...): give layer by its name, one of "
            f"{_listed(dense_layers(model))}."
        )
    if layer is None:
        return [*_final_norms(model, blocks[-1]), blocks[-1]]
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(
            f"layer must be in [{-len(blocks)}, {len(blocks) - 1}] for the {len(blocks)} blocks of "
            f"{type(model).__name__} ({_listed(blocks)}), got {layer}."
        )
    return [blocks[layer]]


def _final_norms(model: nn.Module, last_block: str) -> list[str]:
    """The norm that follows the last block, beside the blocks or one level above (at most one)."""
    path = last_block
    for _ in range(3):
        path, _, child = path.rpartition(".")
        siblings = [name for name, _ in _module(model, path).named_children()]
        for name in siblings[siblings.index(child) + 1 :]:
            if name in _FINAL_NORMS:
                return [f"{path}.{name}" if path else name]
        if not path:
            break
    return []


def _stem(model: nn.Module, name: str) -> nn.Module | None:
    """The first convolution of the backbone that a layer is in: its patch embedding."""
    above = [module for _, module in _upwards(model, name)][1:]
    for module in above or [model]:
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                return child
    return None


def _prefix_tokens(model: nn.Module, name: str) -> int:
    """Number of tokens in front of the patch tokens, in the backbone that the layer is in."""
    stated = _nearest_attribute(model, name, "num_prefix_tokens")
    if isinstance(stated, int):
        return stated
    for _, module in _upwards(model, name):
        # Of each kind once: a wrapper may hold a student and a teacher.
        counts: dict[str, int] = {}
        for path, parameter in module.named_parameters():
            kind = path.rpartition(".")[2]
            if kind in _PREFIX_PARAMETERS:
                several = _PREFIX_PARAMETERS[kind] and parameter.ndim > 1
                counts.setdefault(kind, parameter.shape[-2] if several else 1)
        if counts:
            return sum(counts.values())
    return 0


def _upwards(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The module and its ancestors, up to the model."""
    while True:
        yield name, _module(model, name)
        if not name:
            return
        name = name.rpartition(".")[0]


def _nearest_attribute(model: nn.Module, name: str, attribute: str) -> Any:
    for _, module in _upwards(model, name):
        value = getattr(module, attribute, None)
        if value is not None:
            return value
    return None


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _output_widths(module: nn.Module) -> set[int]:
    """Numbers of output features of the last layer with weights: one of them is the map's d."""
    widths: set[int] = set()
    for leaf in module.modules():
        if isinstance(leaf, nn.Linear):
            widths = {leaf.out_features}
        elif isinstance(leaf, nn.modules.conv._ConvNd):
            widths = {leaf.out_channels}
        elif isinstance(leaf, nn.modules.batchnorm._BatchNorm):
            widths = {leaf.num_features}
        elif isinstance(leaf, nn.LayerNorm):
            widths = {leaf.normalized_shape[-1]}
        elif isinstance(leaf, nn.GroupNorm):
            widths = {leaf.num_channels}
    return widths


def _dense_tensor(output: Any, prefix: int) -> tuple[Tensor | None, int]:
    """The tensor of a layer's or a model's output, and how many tokens of it are no patches."""
    if isinstance(output, Tensor):
        return output, prefix
    if isinstance(output, Mapping):
        for field in _OUTPUT_FIELDS:
            value = output.get(field)
            if isinstance(value, Sequence) and value:
                value = value[-1]
            if isinstance(value, Tensor):
                return value, 0 if field == "x_norm_patchtokens" else prefix
        return None, prefix
    if isinstance(output, Sequence) and not isinstance(output, str) and output:
        return _dense_tensor(output[0], prefix)
    return None, prefix


def _token_grid(
    tokens: int, stem: tuple[int, int, int] | None, merges: bool
) -> tuple[int, int] | None:
    """Rows and columns of a token sequence: those of the patch embedding, or of a square."""
    if stem is not None:
        height, width = stem[1:]
        while merges and height * width > tokens:
            height, width = (height + 1) // 2, (width + 1) // 2
        # Fewer tokens than patches: some are masked, and what is left has no grid.
        return (height, width) if height * width == tokens else None
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def _same_shape(stem: tuple[int, int, int], size: Sequence[int]) -> bool:
    """Whether a map has the aspect of the stem's, up to the rounding of its strides."""
    _, height, width = stem
    rows, columns = size
    ratio = max(round(height / rows), 1)
    return abs(height / ratio - rows) < 1 and abs(width / ratio - columns) < 1


def _listed(names: Sequence[str], limit: int = 24) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown
