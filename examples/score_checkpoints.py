"""Which checkpoint of a run has the best dense features? Ask DSE: no labels, no probe.

    python examples/score_checkpoints.py                       # makes a short run of its own
    python examples/score_checkpoints.py 'runs/mine/*.pt'      # timm state dicts, in this order

A checkpoint file is the ``state_dict`` of the timm model ``--model``.
"""

import argparse
import glob
import pathlib

import timm
import torch
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms import VICRegTransform
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

from dse_ext import DSEMetric, dse_lambda, select_checkpoints
from dse_ext.data import TextureScenes
from dse_ext.hooks import DenseFeatures

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoints", nargs="?", help="a pattern, in quotes")
parser.add_argument("--model", default="resnet10t")
parser.add_argument("--steps", type=int, default=12, help="of the run, where there is none yet")
parser.add_argument("--out", default="runs/score_checkpoints")
args = parser.parse_args()

torch.manual_seed(0)
backbone = timm.create_model(args.model, num_classes=0)

# --- a short run, if there is none: VICReg, a checkpoint every few steps --------------------------
if args.checkpoints is None:
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("step-*.pt"):  # of an earlier call
        old.unlink()
    head = VICRegProjectionHead(backbone.num_features, 128, 128, num_layers=2)
    criterion = VICRegLoss()
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.02, momentum=0.9)
    dataset = TextureScenes(args.steps * 16, size=64, transform=VICRegTransform(input_size=64))
    for step, ((x0, x1), _) in enumerate(DataLoader(dataset, batch_size=16)):
        if step % max(args.steps // 6, 1) == 0:
            torch.save(backbone.state_dict(), folder / f"step-{step:06d}.pt")
        loss = criterion(head(backbone(x0)), head(backbone(x1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    args.checkpoints = str(folder / "step-*.pt")

# --- score every checkpoint on the same images in the same batches -------------------------------
transform = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
images = DataLoader(TextureScenes(48, 64, split="heldout", transform=transform), batch_size=24)

backbone.eval()
metric = DSEMetric(variant="evaluation")
files = sorted(glob.glob(args.checkpoints))
results = []
with DenseFeatures(backbone) as dense, torch.no_grad():
    for file in files:
        backbone.load_state_dict(torch.load(file, weights_only=True))
        for batch, _ in images:
            backbone(batch)
            metric.update(dense.take())  # (B, N, d)
        results.append(metric.compute())
        metric.reset()

# --- λ over the run, then the best local maxima --------------------------------------------------
weight = dse_lambda([r["class_relevance"] for r in results], [r["m_dim"] for r in results])
scores = [float(r["class_relevance"] + weight * r["m_dim"]) for r in results]
chosen = select_checkpoints(scores)

print(f"λ = {weight:.4f}")
for i, (file, result) in enumerate(zip(files, results, strict=True)):
    mark = f"  <- choice {chosen.index(i) + 1}" if i in chosen else ""
    print(
        f"{pathlib.Path(file).name}  M_inter - M_intra {result['class_relevance']:.4f}  "
        f"M_dim {result['m_dim']:.4f}  DSE {scores[i]:.4f}{mark}"
    )
