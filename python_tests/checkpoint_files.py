"""Writes checkpoint files as the official code of each method lays them out.

Written from the layouts, not from dse_ext's readers: networks whose weights are known, and beside
them what real files have as well (students, heads, queues, optimizers, the command line).
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

State = dict[str, Tensor]

VIT: dict[str, Any] = {"embed_dim": 48, "depth": 2}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
RESNET: dict[str, Any] = {"layers": (1, 1, 2, 1)}


class Written(NamedTuple):
    """A checkpoint and what its network gives.

    Attributes:
        name: File name.
        content: What is saved.
        dense: Gives the dense features of images, computed by the network that was written.
        model_args: What makes the reader's model as small as the network that was written.
        image_size: Size of the images that the network was made for.
        model: timm model, where the file neither tells it nor is of the reader's.
    """

    name: str
    content: Any
    dense: Callable[[Tensor], Tensor]
    model_args: dict[str, Any]
    image_size: int
    model: str | None = None


def known(model: nn.Module) -> nn.Module:
    """Gives every weight and statistic of a model a value that makes a difference."""
    generator = torch.Generator().manual_seed(7)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(1 + 0.5 * noise.abs())
        elif value.ndim > 1:
            value.copy_(noise / value[0].numel() ** 0.5 if "embed" not in name else noise)
        else:
            value.copy_(value + 0.2 * noise)
    return model.eval()


def vit(**changes: Any) -> VisionTransformer:
    options = {"img_size": 64, "patch_size": 16, "num_heads": 6, "num_classes": 0, **VIT}
    return known(VisionTransformer(**{**options, **changes}))


def resnet() -> ResNet:
    return known(ResNet(Bottleneck, list(RESNET["layers"])))


def vit_dense(model: nn.Module, prefix: int = 1) -> Callable[[Tensor], Tensor]:
    def dense(images: Tensor) -> Tensor:
        return model.forward_features(images)[:, prefix:]

    return dense


def resnet_dense(model: ResNet) -> Callable[[Tensor], Tensor]:
    body = nn.Sequential(*list(model.children())[:-2])

    def dense(images: Tensor) -> Tensor:
        return body(images).flatten(2).transpose(1, 2)

    return dense


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    """Weights of a network that is not the one to be read."""
    return {key: torch.full_like(value, 3) for key, value in state.items()}


def body(model: ResNet) -> State:
    return {key: v for key, v in model.state_dict().items() if not key.startswith("fc.")}


def mlp(*names: str) -> State:
    """Entries of a head."""
    return {name: torch.ones(4) for name in names}


def optimizer() -> dict[str, Any]:
    return {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


ARGS = argparse.Namespace(arch="vit_small", lr=0.1, output_dir=pathlib.PosixPath("runs/a"))
DINO_HEAD = ("head.mlp.0.weight", "head.mlp.0.bias", "head.last_layer.weight_g")


def dino() -> Written:
    model = vit()
    state = model.state_dict()
    content = {
        "student": {
            **prefixed("module.backbone.", other(state)),
            **prefixed("module.", mlp(*DINO_HEAD)),
        },
        "teacher": {**prefixed("backbone.", state), **mlp(*DINO_HEAD)},
        "optimizer": optimizer(),
        "epoch": 21,
        "args": ARGS,
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    return Written("checkpoint0020.pth", content, vit_dense(model), VIT, 64)


def ibot() -> Written:
    model = vit()
    state = model.state_dict()
    head = (*DINO_HEAD, "head.last_layer2.weight_g")
    # A teacher with batch normalization in its head is wrapped for distributed training.
    content = {
        "student": {
            **prefixed("module.backbone.", other(state)),
            "module.backbone.masked_embed": torch.zeros(1, 48),
        },
        "teacher": {
            **prefixed("module.backbone.", state),
            "module.backbone.masked_embed": torch.zeros(1, 48),
            **prefixed("module.", mlp(*head)),
        },
        "optimizer": optimizer(),
        "epoch": 41,
        "args": ARGS,
        "ibot_loss": {"center": torch.zeros(1, 4), "center2": torch.zeros(1, 1, 4)},
        "fp16_scaler": {"scale": 65536.0},
    }
    return Written("checkpoint0040.pth", content, vit_dense(model), VIT, 64)


def mugs() -> Written:
    model = vit()
    state = model.state_dict()
    relation = {
        key.replace("blocks.0", "backbone.relation_blocks.0"): value
        for key, value in state.items()
        if key.startswith("blocks.0")
    }
    content = {
        "student": prefixed("module.backbone.", other(state)),
        "teacher": {
            **prefixed("backbone.", state),
            **other(relation),
            **mlp("instance_head.projector.0.weight", "local_group_head.projector.0.weight"),
            **mlp("group_head.projector.0.weight", "group_head.last_layer.weight_v"),
        },
        "student_mem": {"block.queue_q": torch.zeros(4, 4)},
        "optimizer": optimizer(),
        "epoch": 100,
        "args": ARGS,
    }
    return Written("checkpoint0100.pth", content, vit_dense(model), VIT, 64)


def mae() -> Written:
    model = vit()
    decoder = mlp("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")
    content = {
        "model": {
            **model.state_dict(),
            **decoder,
            **mlp("mask_token", "decoder_norm.weight", "decoder_pred.weight"),
        },
        "optimizer": optimizer(),
        "epoch": 399,
        "scaler": {"scale": 1.0},
        "args": ARGS,
    }
    return Written("checkpoint-399.pth", content, vit_dense(model), VIT, 64)


def ijepa() -> Written:
    model = vit(class_token=False, global_pool="avg", fc_norm=False, num_heads=12)
    state = model.state_dict()
    content = {
        "encoder": prefixed("module.", state),
        "predictor": prefixed("module.", mlp("predictor_embed.weight", "mask_token")),
        "opt": optimizer(),
        "scaler": {"scale": 1.0},
        "target_encoder": prefixed("module.", other(state)),
        "epoch": 50,
        "loss": 0.2,
        "batch_size": 128,
        "world_size": 16,
        "lr": 0.001,
    }
    return Written("ijepa-ep50.pth.tar", content, vit_dense(model, 0), VIT, 64)


def mocov3() -> Written:
    model = vit(num_heads=12)
    state = model.state_dict()
    head = ("head.0.weight", "head.1.running_mean", "head.3.weight")
    content = {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": {
            **prefixed("module.base_encoder.", {**other(state), **mlp(*head)}),
            **prefixed("module.momentum_encoder.", {**state, **mlp(*head)}),
            **prefixed("module.predictor.", mlp("0.weight", "1.bias")),
        },
        "optimizer": optimizer(),
        "scaler": {"scale": 1.0},
    }
    return Written("checkpoint_0299.pth.tar", content, vit_dense(model), VIT, 64)


def esvit() -> Written:
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = known(
        SwinTransformer(img_size=224, window_size=7, num_classes=0, norm_layer=norm, **SWIN)
    )
    # The original has down-sampling at the end of a stage, timm at the start of the next one, and
    # it keeps the index of the relative positions.
    state: State = {}
    for key, value in model.state_dict().items():
        renamed = re.sub(
            r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        state[renamed] = value
        if key.endswith("relative_position_bias_table"):
            index = torch.arange(49 * 49).view(49, 49)
            state[renamed.replace("bias_table", "index")] = index
    heads = mlp(*DINO_HEAD, *(name.replace("head", "head_dense") for name in DINO_HEAD))
    content = {
        "student": prefixed("module.", {**other(state), **heads}),
        "teacher": {**state, **heads},
        "optimizer": optimizer(),
        "epoch": 11,
        "args": ARGS,
        "dino_loss": {"center": torch.zeros(1, 4)},
    }

    def dense(images: Tensor) -> Tensor:
        return model.forward_features(images).flatten(1, 2)

    return Written("checkpoint0010.pth", content, dense, SWIN, 224)


def siamese() -> Written:
    model = resnet()
    state = body(model)
    content = {
        "epoch": 100,
        "arch": "resnet50",
        "state_dict": {
            **prefixed("module.encoder.", state),
            **prefixed("module.encoder.fc.", mlp("0.weight", "1.running_mean", "6.bias")),
            **prefixed("module.predictor.", mlp("0.weight", "3.bias")),
        },
        "optimizer": optimizer(),
        "best": np.float64(71.3),
    }
    return Written("checkpoint_0099.pth.tar", content, resnet_dense(model), RESNET, 64)


def densecl() -> Written:
    model = resnet()
    state = body(model)
    content = {
        "meta": {"epoch": 200, "iter": 1000, "mmcv_version": "0.6.2", "time": "Mon"},
        "state_dict": {
            **mlp("queue", "queue2", "queue_ptr", "queue2_ptr"),
            **prefixed("encoder_q.0.", state),
            **mlp("encoder_q.1.mlp.0.weight"),
            **prefixed("encoder_k.0.", other(state)),
            **prefixed("backbone.", state),
        },
        "optimizer": optimizer(),
    }
    return Written("epoch_200.pth", content, resnet_dense(model), RESNET, 64)


def swav() -> Written:
    model = resnet()
    content = {
        "epoch": 200,
        "state_dict": {
            **prefixed("module.", body(model)),
            **prefixed("module.projection_head.", mlp("0.weight", "1.running_mean", "3.bias")),
            **mlp("module.prototypes.weight"),
        },
        "optimizer": optimizer(),
        "amp": {"loss_scaler0": {"loss_scale": 1.0, "unskipped": 3}},
    }
    return Written("ckp-199.pth", content, resnet_dense(model), RESNET, 64)


def swav_plain() -> Written:
    written = swav()
    return written._replace(name="ckp-99.pth", content=written.content["state_dict"])


def vicreg() -> Written:
    model = resnet()
    content = {
        "epoch": 100,
        "model": {
            **prefixed("module.backbone.", body(model)),
            **prefixed("module.projector.", mlp("0.weight", "1.running_var")),
        },
        "optimizer": optimizer(),
        "args": ARGS,
    }
    return Written("model_100.pth", content, resnet_dense(model), RESNET, 64)


def vicregl() -> Written:
    written = vicreg()
    extra = mlp("maps_projector.0.weight", "classifier.weight", "classifier.bias")
    written.content["model"].update(prefixed("module.", extra))
    return written._replace(name="model_300.pth")


def barlowtwins() -> Written:
    model = resnet()
    content = {
        "epoch": 300,
        "model": {
            **prefixed("module.backbone.", body(model)),
            **prefixed("module.", mlp("projector.0.weight", "bn.running_mean")),
        },
        "optimizer": optimizer(),
    }
    return Written("checkpoint_300.pth", content, resnet_dense(model), RESNET, 64)


def byol() -> Written:
    model = resnet()
    # The encoder is the nn.Sequential of the ResNet's children without the classifier.
    state = nn.Sequential(*list(model.children())[:-1]).state_dict()
    head = prefixed("projetion.", mlp("l1.weight", "bn1.running_mean", "l2.bias"))
    content = {
        "config": {"model": {"backbone": {"type": "resnet50", "pretrained": False}}},
        "epoch": 300,
        "steps": 1000,
        "model": {
            **prefixed("module.online_network.encoder.", other(state)),
            **prefixed("module.online_network.", head),
            **prefixed("module.target_network.encoder.", state),
            **prefixed("module.target_network.", head),
            **mlp("module.predictor.predictor.l1.weight"),
        },
        "optimizer": optimizer(),
        "amp": None,
    }
    return Written("resnet50_300.pth.tar", content, resnet_dense(model), RESNET, 64)


def dinov2(registers: bool) -> Written:
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    model = known(timm.create_model(name, num_classes=0, depth=2, img_size=56))
    state = dict(model.state_dict())
    if registers:
        # The original adds a position to the class token, timm has it in the token itself.
        position = torch.randn(1, 1, 384)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 384)
    prefix = 5 if registers else 1
    return Written("dinov2_vits14.pth", state, vit_dense(model, prefix), {"depth": 2}, 56)


def dinov2_training() -> Written:
    """As the training code writes it: a teacher whose blocks are in chunks."""
    written = dinov2(registers=False)
    state = {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{m[1]}.{m[1]}", key): value
        for key, value in written.content.items()
    }
    content = {
        "teacher": {**prefixed("backbone.", state), **mlp("dino_head.mlp.0.weight")},
    }
    return written._replace(name="teacher_12499.pth", content=content)


def dinov3() -> Written:
    model = known(timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, depth=2))
    state: State = {"rope_embed.periods": torch.ones(16), "mask_token": torch.zeros(1, 384)}
    for key, value in model.state_dict().items():
        if key.endswith(".q_bias"):
            zero = torch.zeros_like(value)
            stem = key.removesuffix("q_bias")
            v_bias = model.state_dict()[stem + "v_bias"]
            state[stem + "qkv.bias"] = torch.cat([value, zero, v_bias])
            state[stem + "qkv.bias_mask"] = torch.ones(3 * len(value))
        elif key.endswith(("k_bias", "v_bias")) or key.startswith("rope."):
            continue
        else:
            renamed = key.replace("reg_token", "storage_tokens")
            state[re.sub(r"gamma_(\d)", r"ls\1.gamma", renamed)] = value
    return Written("dinov3_vits16.pth", state, vit_dense(model, 5), {"depth": 2}, 64)


def lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 9,
        "global_step": 1000,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [optimizer()],
        "lr_schedulers": [],
        "hyper_parameters": {"batch_size": 64},
    }


def lightly_resnet() -> Written:
    """As lightly's examples do it: the children of torchvision's ResNet, and a momentum copy."""
    model = resnet()
    state = nn.Sequential(*list(model.children())[:-1]).state_dict()
    content = lightning(
        {
            **prefixed("backbone.", state),
            **prefixed("backbone_momentum.", other(state)),
            **prefixed("projection_head.layers.", mlp("0.weight", "3.bias")),
        }
    )
    return Written("epoch=9-step=1000.ckpt", content, resnet_dense(model), RESNET, 64, "resnet50")


def lightly_vit() -> Written:
    """A teacher that is a ViT in lightly's MaskedVisionTransformerTIMM."""
    from lightly.models.modules import MaskedVisionTransformerTIMM

    model = vit(embed_dim=192, num_heads=3)
    state = MaskedVisionTransformerTIMM(model, weight_initialization="skip").state_dict()
    content = lightning(
        {
            **prefixed("student_backbone.", other(state)),
            **prefixed("teacher_backbone.", state),
            **prefixed("teacher_head.", mlp("layers.0.weight")),
        }
    )
    return Written("last.ckpt", content, vit_dense(model), {"depth": 2}, 64)


#: Method and what its official code writes.
FILES: dict[str, tuple[str, Callable[[], Written]]] = {
    "dino": ("dino", dino),
    "ibot": ("ibot", ibot),
    "mugs": ("mugs", mugs),
    "mae": ("mae", mae),
    "ijepa": ("ijepa", ijepa),
    "mocov3": ("mocov3", mocov3),
    "esvit": ("esvit", esvit),
    "simsiam": ("simsiam", siamese),
    "mec": ("mec", siamese),
    "resa": ("resa", siamese),
    "densecl": ("densecl", densecl),
    "swav": ("swav", swav),
    "vicreg": ("vicreg", vicreg),
    "vicregl": ("vicregl", vicregl),
    "barlowtwins": ("barlowtwins", barlowtwins),
    "byol": ("byol", byol),
    "swav, plain": ("swav", swav_plain),
    "dinov2": ("dinov2", partial(dinov2, registers=False)),
    "dinov2, registers": ("dinov2", partial(dinov2, registers=True)),
    "dinov2, training": ("dinov2", dinov2_training),
    "dinov3": ("dinov3", dinov3),
    "lightly, ResNet": ("lightly", lightly_resnet),
    "lightly, ViT": ("lightly", lightly_vit),
}
