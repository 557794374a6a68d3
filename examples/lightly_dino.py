"""lightly's DINO, with dse-ext in the place of lightly's own DSE regularizer.

    python examples/lightly_dino.py

The script is that of a lightly user: lightly's transform, heads and loss. lightly 1.6 has a
DSERegularizer too; ours takes its place by one changed import.
"""

import argparse
import copy
import warnings

import timm
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.utils.scheduler import cosine_schedule
from torch import nn
from torch.utils.data import DataLoader

# before: from lightly.loss.regularizer import DSERegularizer
from dse_ext import DSERegularizer
from dse_ext.data import TextureScenes

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

torch.manual_seed(0)
warnings.filterwarnings("ignore", message=".*weight_norm.*")


class DINO(nn.Module):
    def __init__(self, vit):
        super().__init__()
        head_args = {"hidden_dim": 128, "bottleneck_dim": 32, "output_dim": 256}
        self.student_backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.student_head = DINOProjectionHead(vit.embed_dim, **head_args, freeze_last_layer=1)
        self.teacher_backbone = copy.deepcopy(self.student_backbone)
        self.teacher_head = DINOProjectionHead(vit.embed_dim, **head_args)
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)

    def forward(self, x):
        tokens = self.student_backbone.encode(x)  # class token and patch tokens
        return self.student_head(tokens[:, 0]), tokens[:, 1:]

    def forward_teacher(self, x):
        return self.teacher_head(self.teacher_backbone(x))


vit = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=64,
    patch_size=8,
    depth=4,
    dynamic_img_size=True,
    num_classes=0,
)
model = DINO(vit)

transform = DINOTransform(global_crop_size=64, local_crop_size=32, n_local_views=2)
dataset = TextureScenes(args.steps * 16, size=64, transform=transform)
dataloader = DataLoader(dataset, batch_size=16, shuffle=True)

criterion = DINOLoss(output_dim=256)
regularizer = DSERegularizer(weight=0.001)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

print("Starting training")
for step, (views, _) in enumerate(dataloader):
    momentum = cosine_schedule(step, args.steps, 0.996, 1.0)
    update_momentum(model.student_backbone, model.teacher_backbone, m=momentum)
    update_momentum(model.student_head, model.teacher_head, m=momentum)

    with torch.no_grad():
        teacher_out = [model.forward_teacher(view) for view in views[:2]]
    student_out, patch_tokens = zip(*(model(view) for view in views), strict=True)
    dino_loss = criterion(teacher_out, list(student_out))
    # The patch tokens of the two global views.
    dse_loss = regularizer(torch.cat(patch_tokens[:2]))
    loss = dino_loss + dse_loss

    optimizer.zero_grad()
    loss.backward()
    model.student_head.cancel_last_layer_gradients(current_epoch=step)
    optimizer.step()
    if step % 4 == 0 or step == args.steps - 1:
        last = regularizer.last
        print(
            f"step {step:>3}  DINO loss {dino_loss.item():.4f}  DSE {last.score():.4f}  "
            f"(M_inter {last.m_inter:.3f}, M_dim {last.m_dim:.3f})"
        )
