"""The layouts of official checkpoint files, one entry each.

The sixteen methods of the paper come first. Sizes are those of the checkpoints that the paper
scores; another size of the same method is loaded by naming its timm model.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from dse_ext.checkpoints.conversions import (
    describe_by_shape,
    describe_dinov2,
    describe_dinov3,
    describe_own,
    name_children,
    unchunk_blocks,
)
from dse_ext.checkpoints.reader import CheckpointReader

_VIT_S = "vit_small_patch16_224"
# A wrapper for distributed training may or may not have been there when the file was written.
_BACKBONE = ("module.backbone.", "backbone.", "module.", "")
_CLASSIFIER = ("head.*", "fc.*")

DINO = CheckpointReader(
    name="dino",
    title="DINO",
    source="https://github.com/facebookresearch/dino",
    network="teacher",
    files=("checkpoint{epoch:04d}.pth",),
    keys=("teacher",),
    prefixes=_BACKBONE,
    model=_VIT_S,
    prefix_tokens=1,
    ignore=_CLASSIFIER,
)

IBOT = CheckpointReader(
    name="ibot",
    title="iBOT",
    source="https://github.com/bytedance/ibot",
    network="teacher",
    files=("checkpoint{epoch:04d}.pth",),
    keys=("teacher",),
    prefixes=_BACKBONE,
    model=_VIT_S,
    prefix_tokens=1,
    # The student's token for masked patches.
    ignore=(*_CLASSIFIER, "masked_embed"),
)

MUGS = CheckpointReader(
    name="mugs",
    title="Mugs",
    source="https://github.com/sail-sg/mugs",
    network="teacher",
    files=("checkpoint{epoch:04d}.pth",),
    keys=("teacher",),
    prefixes=_BACKBONE,
    model=_VIT_S,
    prefix_tokens=1,
    # Blocks of the local-group branch, which the backbone's own output does not pass through.
    ignore=(*_CLASSIFIER, "relation_blocks.*"),
)

MAE = CheckpointReader(
    name="mae",
    title="MAE",
    source="https://github.com/facebookresearch/mae",
    network="encoder",
    files=("checkpoint-{epoch}.pth",),
    keys=("model",),
    prefixes=("module.", ""),
    model=_VIT_S,
    prefix_tokens=1,
    ignore=(*_CLASSIFIER, "mask_token", "decoder_*"),
)

IJEPA = CheckpointReader(
    name="ijepa",
    title="I-JEPA",
    source="https://github.com/facebookresearch/ijepa",
    network="encoder",
    files=("ijepa-ep{epoch}.pth.tar", "*-ep{epoch}.pth.tar"),
    keys=("encoder",),
    prefixes=("module.", ""),
    model="vit_base_patch16_224",
    # No class token: the image vector is the mean of the patch tokens after the final norm.
    model_args={"class_token": False, "global_pool": "avg", "fc_norm": False},
    prefix_tokens=0,
)

MOCO_V3 = CheckpointReader(
    name="mocov3",
    title="MoCo v3",
    source="https://github.com/facebookresearch/moco-v3",
    network="momentum encoder",
    files=("checkpoint_{epoch:04d}.pth.tar",),
    keys=("state_dict",),
    prefixes=("module.momentum_encoder.", "momentum_encoder."),
    model=_VIT_S,
    # MoCo v3's ViT-S has 12 heads, other methods' and timm's 6: the weights have the same shapes.
    model_args={"num_heads": 12},
    prefix_tokens=1,
    ignore=_CLASSIFIER,
)

ESVIT = CheckpointReader(
    name="esvit",
    title="EsViT",
    source="https://github.com/microsoft/esvit",
    network="teacher",
    files=("checkpoint{epoch:04d}.pth",),
    keys=("teacher",),
    prefixes=_BACKBONE,
    model="swin_tiny_patch4_window7_224",
    model_args={"norm_layer": partial(nn.LayerNorm, eps=1e-6)},
    prefix_tokens=0,
    ignore=("head.*", "head_dense.*"),
)


def _siamese(name: str, title: str, source: str) -> CheckpointReader:
    """A ResNet-50 in the layout of SimSiam's code, which others build on."""
    return CheckpointReader(
        name=name,
        title=title,
        source=source,
        network="encoder",
        files=("checkpoint_{epoch:04d}.pth.tar",),
        keys=("state_dict",),
        prefixes=("module.encoder.", "encoder."),
        model="resnet50",
        prefix_tokens=0,
        # The projection head stands where the classifier was.
        ignore=("fc.*",),
    )


SIMSIAM = _siamese("simsiam", "SimSiam", "https://github.com/facebookresearch/simsiam")
MEC = _siamese("mec", "MEC", "https://github.com/xinliu20/MEC")
RESA = _siamese("resa", "ReSA", "https://arxiv.org/abs/2501.18452")

DENSECL = CheckpointReader(
    name="densecl",
    title="DenseCL",
    source="https://github.com/WXinlong/DenseCL",
    network="backbone",
    files=("epoch_{epoch}.pth",),
    keys=("state_dict",),
    prefixes=("module.backbone.", "backbone."),
    model="resnet50",
    prefix_tokens=0,
    ignore=("fc.*",),
)

SWAV = CheckpointReader(
    name="swav",
    title="SwAV",
    source="https://github.com/facebookresearch/swav",
    network="backbone",
    files=("ckp-{epoch}.pth",),
    keys=("state_dict", ""),
    prefixes=("module.", ""),
    model="resnet50",
    prefix_tokens=0,
    ignore=("projection_head.*", "prototypes.*", "fc.*"),
)

VICREG = CheckpointReader(
    name="vicreg",
    title="VICReg",
    source="https://github.com/facebookresearch/vicreg",
    network="backbone",
    files=("model_{epoch}.pth",),
    keys=("model",),
    prefixes=("module.backbone.", "backbone."),
    model="resnet50",
    prefix_tokens=0,
    ignore=("fc.*",),
)

VICREGL = CheckpointReader(
    name="vicregl",
    title="VICRegL",
    source="https://github.com/facebookresearch/VICRegL",
    network="backbone",
    files=("model_{epoch}.pth",),
    keys=("model",),
    prefixes=("module.backbone.", "backbone."),
    model="resnet50",
    prefix_tokens=0,
    ignore=("fc.*",),
)

BARLOW_TWINS = CheckpointReader(
    name="barlowtwins",
    title="Barlow Twins",
    source="https://github.com/facebookresearch/barlowtwins",
    network="backbone",
    files=("checkpoint_{epoch}.pth",),
    keys=("model",),
    prefixes=("module.backbone.", "backbone."),
    model="resnet50",
    prefix_tokens=0,
    ignore=("fc.*",),
)

BYOL = CheckpointReader(
    name="byol",
    title="BYOL",
    source="https://github.com/yaox12/BYOL-PyTorch",
    network="target network",
    files=("resnet50_{epoch}.pth.tar", "*_{epoch}.pth.tar"),
    keys=("model",),
    prefixes=(
        "module.target_network.encoder.",
        "target_network.encoder.",
        "module.target_network.",
        "target_network.",
    ),
    model="resnet50",
    prefix_tokens=0,
    # The projector, where the encoder's entries have no level of their own; misspelt at the source.
    ignore=("fc.*", "projetion.*", "projection.*"),
    convert=name_children,
)

PAPER: tuple[CheckpointReader, ...] = (
    MOCO_V3,
    DENSECL,
    BYOL,
    SIMSIAM,
    ESVIT,
    MEC,
    VICREGL,
    DINO,
    IBOT,
    MUGS,
    MAE,
    IJEPA,
    SWAV,
    VICREG,
    BARLOW_TWINS,
    RESA,
)
"""The sixteen methods of the paper, in its order."""

DINOV2 = CheckpointReader(
    name="dinov2",
    title="DINOv2",
    source="https://github.com/facebookresearch/dinov2",
    network="teacher",
    files=("teacher_{epoch}.pth", "*.pth", "*.safetensors"),
    keys=("teacher", "model", ""),
    prefixes=_BACKBONE,
    model="vit_small_patch14_dinov2",
    # The token for masked patches stays: timm knows the layout by it, and drops it.
    ignore=_CLASSIFIER,
    convert=unchunk_blocks,
    describe=describe_dinov2,
)

DINOV3 = CheckpointReader(
    name="dinov3",
    title="DINOv3",
    source="https://github.com/facebookresearch/dinov3",
    network="teacher",
    files=("teacher_{epoch}.pth", "*.pth", "*.safetensors"),
    keys=("teacher", "model", ""),
    prefixes=_BACKBONE,
    model="vit_small_patch16_dinov3_qkvb",
    ignore=(*_CLASSIFIER, "mask_token"),
    convert=unchunk_blocks,
    describe=describe_dinov3,
)

LIGHTLY = CheckpointReader(
    name="lightly",
    title="lightly / Lightning",
    source="https://docs.lightly.ai/self-supervised-learning/",
    network="backbone",
    files=("*epoch={epoch}*.ckpt", "*.ckpt"),
    keys=("state_dict", ""),
    # timm's ViT is inside lightly's MaskedVisionTransformerTIMM. A module that has a teacher and
    # no network called backbone is scored by its teacher.
    prefixes=tuple(
        f"{network}.{inner}"
        for network in ("backbone", "teacher_backbone", "teacher", "student_backbone", "encoder")
        for inner in ("vit.", "backbone.", "")
    ),
    model="resnet50",
    ignore=_CLASSIFIER,
    convert=name_children,
    describe=describe_by_shape,
)

OWN = CheckpointReader(
    name="dse-ext",
    title="dse-ext train",
    source="https://arxiv.org/abs/2510.17299",
    network="scored network",
    files=("step_{epoch}.pt",),
    keys=("state_dict",),
    prefixes=("",),
    model="vit_tiny_patch16_224",
    describe=describe_own,
)

OTHERS: tuple[CheckpointReader, ...] = (DINOV2, DINOV3, LIGHTLY, OWN)
"""Further layouts."""
