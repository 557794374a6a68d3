"""Several processes: DistributedDataParallel and the DSE of the batch of all ranks.

    torchrun --nproc-per-node 2 examples/ddp.py

Works the same with FSDP2 (torch.distributed.fsdp.fully_shard). On GPUs: backend "nccl", and the
model and batches on cuda:LOCAL_RANK.
"""

import argparse

import timm
import torch
import torch.distributed as dist
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from dse_ext import DSERegularizer
from dse_ext.data import TextureScenes
from dse_ext.hooks import DenseFeatures

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=8)
args = parser.parse_args()

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)


class SimSiam(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("resnet10t", num_classes=0)
        self.projection_head = SimSiamProjectionHead(self.backbone.num_features, 128, 64)
        self.prediction_head = SimSiamPredictionHead(64, 32, 64)

    def forward(self, x0, x1):
        z0, z1 = (self.projection_head(self.backbone(x)) for x in (x0, x1))
        return z0.detach(), self.prediction_head(z0), z1.detach(), self.prediction_head(z1)


model = nn.parallel.DistributedDataParallel(SimSiam())
dense = DenseFeatures(model.module.backbone, keep=2)  # the two views of a step
# Clusters are found on each rank's images; M_dim and the scale are those of the global batch.
# 8 images a rank are a multiple of group_images (8), so that groups are whole.
regularizer = DSERegularizer(weight=0.001, process_group="world")

dataset = TextureScenes(args.steps * 8 * world, 64, transform=SimSiamTransform(input_size=64))
dataloader = DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset))
criterion = NegativeCosineSimilarity()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
torch.manual_seed(rank)  # k-means seeds differ between ranks

for step, ((x0, x1), _) in enumerate(dataloader):
    z0, p0, z1, p1 = model(x0, x1)
    loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
    dse_loss = torch.stack([regularizer(view) for view in dense.calls]).mean()
    optimizer.zero_grad()
    (loss + dse_loss).backward()
    optimizer.step()
    if rank == 0 and step % 4 == 0:
        print(f"step {step:>3}  loss {loss.item():.4f}  global DSE {regularizer.last.score():.4f}")

dist.destroy_process_group()
