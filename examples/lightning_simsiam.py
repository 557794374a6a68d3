"""Lightning: a module that knows nothing of DSE, regularized and watched by two callbacks.

pip install 'dse-ext[ssl,lightning]'
python examples/lightning_simsiam.py
"""

import argparse

import lightning
import timm
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

from dse_ext.data import TextureScenes
from dse_ext.integrations.lightning import DSEMonitorCallback, DSERegularizerCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--out", default="runs/lightning_simsiam")
args = parser.parse_args()

lightning.seed_everything(0)


class SimSiam(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("resnet10t", num_classes=0)
        self.projection_head = SimSiamProjectionHead(self.backbone.num_features, 128, 64)
        self.prediction_head = SimSiamPredictionHead(64, 32, 64)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        z = self.projection_head(self.backbone(x))
        return z.detach(), self.prediction_head(z)

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        z0, p0 = self(x0)
        z1, p1 = self(x1)
        return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


dataset = TextureScenes(args.steps * 16, size=64, transform=SimSiamTransform(input_size=64))
dataloader = DataLoader(dataset, batch_size=16, shuffle=True)
plain = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
probe_set = TextureScenes(32, size=64, split="heldout", transform=plain)
probe = torch.stack([image for image, _ in probe_set])

# The last feature map of `backbone`, both views. On several GPUs, with the DSE of the global batch:
# DSERegularizerCallback(DSERegularizer(0.001, process_group="world"), module="backbone").
regularize = DSERegularizerCallback(0.001, module="backbone")
# Alone, without `regularize`, it only watches.
watch = DSEMonitorCallback(probe, module="backbone", every=3, folder=args.out, keep=2)

trainer = lightning.Trainer(
    max_epochs=1,
    accelerator="auto",
    callbacks=[regularize, watch],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(SimSiam(), dataloader)

for name, value in trainer.callback_metrics.items():
    print(f"{name:<28} {value:.4f}")
print(f"best step: {watch.monitor.best.step}; history and checkpoints in {args.out}")
