"""Renaming of entries from the layout of official code to timm's names.

What timm converts itself (position embeddings, DINOv2 and DINOv3 names, Swin's down-sampling
layers and index buffers) is left to timm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse_ext.checkpoints.errors import CheckpointLayoutError
from dse_ext.checkpoints.reader import ModelSpec, StateDict

# torchvision's resnet as the nn.Sequential of its children: convolution, norm, ReLU, pooling, and
# the four stages.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")
_VIT_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_DINOV2_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
_DINOV3_SIZES = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}
_SWIN_SIZES = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
_RESNETS = {
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}


def name_children(state: StateDict) -> StateDict:
    """Names the children of a ResNet that was cut into an ``nn.Sequential``."""
    renamed = {}
    for key, value in state.items():
        child, dot, rest = key.partition(".")
        renamed[_CHILDREN.get(child, child) + dot + rest] = value
    return renamed


def unchunk_blocks(state: StateDict) -> StateDict:
    """Takes out the chunk's number that DINOv2 puts before a block's for sharded training."""
    return {_CHUNKED_BLOCK.sub(r"blocks.\1.", key): value for key, value in state.items()}


def guess_model(state: StateDict) -> str | None:
    """The timm model whose usual sizes the weights have; None where there is none.

    Args:
        state: The network's entries under timm's names.
    """
    patches = state.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4:
        width, patch = patches.shape[0], patches.shape[-1]
        if any(key.startswith("layers.0.") for key in state):
            size = _SWIN_SIZES.get((width, _count(state, "layers.2.blocks.")))
            return f"swin_{size}_patch{patch}_window7_224" if size else None
        size = _VIT_SIZES.get(width)
        return f"vit_{size}_patch{patch}_224" if size else None
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        depths = [_count(state, f"layer{stage}.") for stage in (1, 2, 3, 4)]
        return _RESNETS.get((*depths, "layer1.0.conv3.weight" in state))  # type: ignore[arg-type]
    return None


def describe_by_shape(content: Mapping[str, Any], state: StateDict, path: Path) -> ModelSpec:
    """The model whose usual sizes the weights have.

    Raises:
        CheckpointLayoutError: If they are not those of a common network.
    """
    model = guess_model(state)
    if model is None:
        raise CheckpointLayoutError(
            "the weights do not have the sizes of a common ViT, Swin or ResNet: name the timm model"
        )
    args = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return ModelSpec(model, args if model.startswith("vit_") and "cls_token" not in state else {})


def describe_dinov2(content: Mapping[str, Any], state: StateDict, path: Path) -> ModelSpec:
    """DINOv2's size, and whether it has registers."""
    registers = "_reg4" if "register_tokens" in state or "reg_token" in state else ""
    return ModelSpec(f"vit_{_size(state, _DINOV2_SIZES)}_patch14{registers}_dinov2")


def describe_dinov3(content: Mapping[str, Any], state: StateDict, path: Path) -> ModelSpec:
    """DINOv3's size, and whether its attention has biases."""
    biased = any(key.endswith(("attn.qkv.bias", "attn.q_bias")) for key in state)
    biases = "_qkvb" if biased else ""
    # The class token is DINOv3's image vector; timm's default is the mean.
    size = _size(state, _DINOV3_SIZES)
    return ModelSpec(f"vit_{size}_patch16_dinov3{biases}", {"global_pool": "token"})


def describe_own(content: Mapping[str, Any], state: StateDict, path: Path) -> ModelSpec:
    """The backbone of a run of ``dse-ext train``: from the file, and from the run's config.json."""
    name = content.get("backbone")
    if not isinstance(name, str):
        raise CheckpointLayoutError("the file does not say what its backbone is: name the model")
    config: dict[str, Any] = {}
    config_path = path.resolve().parent.parent / "config.json"
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
    args = dict(config.get("backbone_args", {}))
    if config.get("patch_size") is not None:
        args["patch_size"] = config["patch_size"]
    return ModelSpec(name, args, config.get("image_size"))


def _size(state: StateDict, sizes: Mapping[int, str]) -> str:
    """The size whose width the patch embedding has."""
    patches = state.get("patch_embed.proj.weight")
    size = None if patches is None else sizes.get(patches.shape[0])
    if size is None:
        raise CheckpointLayoutError(
            "the width of the patch embedding is not that of a published size: name the timm model"
        )
    return size


def _count(state: StateDict, prefix: str) -> int:
    """How many blocks there are below a prefix."""
    return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})
