"""A recipe for DINOv2-style code: student and teacher, DINO and iBOT heads, KoLeo, and DSE.

    python examples/dinov2_recipe.py

The parts have the names of DINOv2's code: a backbone whose forward pass gives a dict with
``x_norm_clstoken`` and ``x_norm_patchtokens``, and a ``SSLMetaArch``. What has to be added there
is marked with DSE: four lines. Sizes are those of a toy; the structure is the real one.
"""

import argparse
import copy
import warnings

import timm
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import random_block_mask, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.utils.scheduler import cosine_schedule
from torch import nn
from torch.utils.data import DataLoader

from dse_ext import DSERegularizer
from dse_ext.data import TextureScenes

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

torch.manual_seed(0)
warnings.filterwarnings("ignore", message=".*weight_norm.*")

PROTOTYPES = 256


class Backbone(nn.Module):
    """A ViT with registers and a mask token."""

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model(
            "vit_small_patch14_reg4_dinov2",
            img_size=64,
            patch_size=8,
            depth=4,
            embed_dim=96,
            num_heads=3,
            dynamic_img_size=True,
            num_classes=0,
        )
        self.mask_token = nn.Parameter(torch.zeros(96))

    def forward(self, x, masks=None):
        x = self.vit.patch_embed(x)  # (B, h, w, d), since the image size is dynamic
        if masks is not None:
            x = torch.where(masks.unflatten(1, x.shape[1:3]).unsqueeze(-1), self.mask_token, x)
        x = self.vit.norm(self.vit.blocks(self.vit._pos_embed(x)))
        return {
            "x_norm_clstoken": x[:, 0],
            "x_norm_patchtokens": x[:, self.vit.num_prefix_tokens :],
        }


class SSLMetaArch(nn.Module):
    def __init__(self):
        super().__init__()
        head = {"input_dim": 96, "hidden_dim": 128, "bottleneck_dim": 32, "output_dim": PROTOTYPES}
        self.student = nn.ModuleDict(
            {
                "backbone": Backbone(),
                "dino_head": DINOProjectionHead(**head),
                "ibot_head": DINOProjectionHead(**head),
            }
        )
        self.teacher = nn.ModuleDict(
            {
                "backbone": copy.deepcopy(self.student["backbone"]),
                "dino_head": DINOProjectionHead(**head),
                "ibot_head": DINOProjectionHead(**head),
            }
        )
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.dino_loss = DINOLoss(output_dim=PROTOTYPES)
        self.ibot_patch_loss = IBOTPatchLoss(output_dim=PROTOTYPES)
        self.koleo_loss = KoLeoLoss()
        # DSE (1 of 4): with several ranks and FSDP or DDP, process_group="world" gives the DSE of
        # the global batch, whose gradient is scaled for their mean over ranks.
        self.dse_loss = DSERegularizer(weight=0.001)

    def forward(self, global_crops, local_crops):
        both, batch = torch.cat(global_crops), len(global_crops[0])
        masks = random_block_mask((2 * batch, 8, 8), device=both.device)
        flat = masks.flatten(1)

        with torch.no_grad():
            teacher = self.teacher["backbone"](both)
            teacher_cls = self.teacher["dino_head"](teacher["x_norm_clstoken"])
            teacher_patches = self.teacher["ibot_head"](teacher["x_norm_patchtokens"][flat])

        student = self.student["backbone"](both, masks=flat)
        local = self.student["backbone"](torch.cat(local_crops))
        student_cls = self.student["dino_head"](
            torch.cat([student["x_norm_clstoken"], local["x_norm_clstoken"]])
        )
        student_patches = self.student["ibot_head"](student["x_norm_patchtokens"][flat])

        losses = {
            "dino": self.dino_loss(list(teacher_cls.split(batch)), list(student_cls.split(batch))),
            "ibot": self.ibot_patch_loss(teacher_patches, student_patches, masks),
            "koleo": 0.1 * self.koleo_loss(student["x_norm_clstoken"]),
            # DSE (2 of 4): the student's patch tokens of the global crops, masked as they are.
            "dse": self.dse_loss(student["x_norm_patchtokens"]),
        }
        return sum(losses.values()), losses

    def update_teacher(self, momentum):
        for name in self.student:
            update_momentum(self.student[name], self.teacher[name], m=momentum)


model = SSLMetaArch()
transform = DINOTransform(global_crop_size=64, local_crop_size=32, n_local_views=2)
dataset = TextureScenes(args.steps * 12, size=64, transform=transform)
dataloader = DataLoader(dataset, batch_size=12, shuffle=True)
optimizer = torch.optim.AdamW(model.student.parameters(), lr=5e-4)

print("Starting training")
for step, (views, _) in enumerate(dataloader):
    loss, losses = model(views[:2], views[2:])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.student.parameters(), 3.0)
    optimizer.step()
    model.update_teacher(cosine_schedule(step, args.steps, 0.994, 1.0))
    if step % 4 == 0 or step == args.steps - 1:
        # DSE (3 and 4 of 4): components for the log.
        dse = model.dse_loss.last
        values = "  ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
        print(f"step {step:>3}  {values}  (DSE {dse.score():.4f}, M_dim {dse.m_dim:.4f})")
