"""A training loop of one's own: SimSiam, DSE regularizer, DSE monitor.

    python examples/plain_loop.py

Three additions to an ordinary loop are marked with (1), (2), (3).
"""

import argparse

import timm
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

from dse_ext import DSERegularizer
from dse_ext.data import TextureScenes
from dse_ext.hooks import DenseFeatures
from dse_ext.monitor import DSEMonitor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--out", default="runs/plain_loop")
args = parser.parse_args()

torch.manual_seed(0)


class SimSiam(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimSiamProjectionHead(backbone.num_features, 128, 64)
        self.prediction_head = SimSiamPredictionHead(64, 32, 64)

    def forward(self, x):
        z = self.projection_head(self.backbone(x))
        return z.detach(), self.prediction_head(z)


backbone = timm.create_model("resnet10t", num_classes=0)  # any timm model
model = SimSiam(backbone)

# Images that need no download. Your own: torchvision.datasets.ImageFolder.
dataset = TextureScenes(args.steps * 16, size=64, transform=SimSiamTransform(input_size=64))
dataloader = DataLoader(dataset, batch_size=16, shuffle=True)

criterion = NegativeCosineSimilarity()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

# (1) The features that are regularized, and the regularizer. A layer may be named:
#     DenseFeatures(backbone, "layer3").
dense = DenseFeatures(backbone, keep=None)
regularizer = DSERegularizer(weight=0.001)

# (2) The monitor: DSE of the same images every few steps.
plain = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
probe_set = TextureScenes(32, size=64, split="heldout", transform=plain)
probe = torch.stack([image for image, _ in probe_set])
monitor = DSEMonitor(backbone, probe, every=3, folder=args.out, keep=2)

print("Starting training")
for step, ((x0, x1), _) in enumerate(dataloader, start=1):
    dense.clear()
    z0, p0 = model(x0)
    z1, p1 = model(x1)
    loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
    # (3) L = L_ssl − β · DSE, of both views. `dense.last` would be the last view alone.
    features = torch.cat(dense.calls)  # (2B, N, d)
    loss = loss + regularizer(features)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    if evaluation := monitor.step(step):
        print(
            f"step {step:>4}  loss {loss.item():.4f}  DSE of the batch "
            f"{regularizer.last.score():.4f}  of the probe images {evaluation.score:.4f}"
        )
    if monitor.should_stop:  # with early_stop=True
        break

print(f"best step: {monitor.best.step}; history and checkpoints in {args.out}")
