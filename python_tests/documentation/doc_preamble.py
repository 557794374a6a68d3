"""What the Python blocks of the documentation take for granted.

A block shows how something is used in a program that the reader has already: a network, a loader,
a loss. The names below stand for these; a block gets those that it uses without defining them. A
block that needs others names their set in a comment above it: ``<!-- run with: huggingface -->``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_SIZE = 32


def backbone() -> nn.Module:
    """A network from images to patch tokens: (B, 3, 32, 32) -> (B, 16, 64)."""
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=IMAGE_SIZE, patch_size=8, depth=2, embed_dim=64,
        num_heads=2, class_token=False, global_pool="", num_classes=0, fc_norm=False,
    )  # fmt: skip


def images() -> Tensor:
    return torch.rand(8, 3, IMAGE_SIZE, IMAGE_SIZE)


def loader() -> list[Tensor]:
    return [images() for _ in range(2)]


def ssl_loss(*tensors: Tensor) -> Tensor:
    """Stands for any loss; takes what a block happens to hand it."""
    return torch.stack(
        [tensor.square().mean() for tensor in tensors if tensor.is_floating_point()]
    ).sum()


def checkpoints() -> list[nn.Module]:
    return [backbone() for _ in range(4)]


def regularizer() -> nn.Module:
    import dse_ext

    return dse_ext.DSERegularizer(weight=0.001)


def _lightning() -> Any:
    import lightning

    return lightning


DEFAULT: dict[str, Callable[[], Any]] = {
    "backbone": backbone,
    "checkpoints": checkpoints,
    "images": images,
    "lightning": _lightning,
    "loader": loader,
    "model": backbone,
    "probe_images": images,
    "regularizer": regularizer,
    "ssl_loss": lambda: ssl_loss,
}


def _transformers() -> Any:
    import transformers

    return transformers


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=IMAGE_SIZE, patch_size=8,
        )
    )  # fmt: skip


def _arguments() -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir="trainer", report_to=[], use_cpu=True)


HUGGINGFACE: dict[str, Callable[[], Any]] = {
    "args": _arguments,
    "data": lambda: [{"pixel_values": image, "labels": 0} for image in images()],
    "model": _vit,
    "probe_images": images,
    "transformers": _transformers,
}

CONTEXTS = {"default": DEFAULT, "huggingface": HUGGINGFACE}
