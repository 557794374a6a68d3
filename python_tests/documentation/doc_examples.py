"""Examples of docstrings that need something of the reader's.

``STAND_INS`` prepares it, in a folder and as names; the values that are printed are then others and
not compared. ``NOT_RUN`` tells why an example is not run; its imports are checked all the same.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

NOT_RUN = {
    "dse_ext.checkpoints.load.load": "needs a checkpoint of DINO; test_checkpoints.py writes one",
    "dse_ext.distributed.global_dse_components": "needs several processes, as in test_torchrun.py",
    "dse_ext.evaluation.probing.probe_checkpoints": "needs ADE20K and checkpoints of DINO",
    "dse_ext.evaluation.sweep.evaluate": "needs checkpoints of DINO; test_evaluate.py writes some",
    "dse_ext.plan.collect": "needs a build with the CUDA library; test_plan.py runs it there",
    "dse_ext.probes.datasets.registry.open_dataset": "needs ADE20K",
    "dse_ext.probes.measure.measure": "needs PASCAL VOC and a checkpoint of DINO",
    "dse_ext.ssl.run.train": "trains for minutes; it is what `make demo` does",
}


def _photos(folder: Path) -> dict[str, Any]:
    from PIL import Image

    (folder / "photos").mkdir()
    Image.new("RGB", (640, 427)).save(folder / "photos" / "a.png")
    return {}


def _checkpoint_files(folder: Path) -> dict[str, Any]:
    (folder / "runs/dino").mkdir(parents=True)
    for epoch in (0, 20, 40):
        (folder / f"runs/dino/checkpoint{epoch:04d}.pth").touch()
    return {}


def _features(folder: Path) -> dict[str, Any]:
    labels = torch.randint(12, (4, 32, 32))
    names = {"features": torch.randn(4, 16, 8), "labels": labels}
    return {**names, "train_features": torch.randn(4, 16, 8), "train_labels": labels}


def _prediction(folder: Path) -> dict[str, Any]:
    return {"prediction": torch.randint(21, (2, 8, 8)), "labels": torch.randint(21, (2, 8, 8))}


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _tables(folder: Path) -> dict[str, Any]:
    """What ``dse-ext evaluate`` and ``dse-ext probe`` write."""
    series = {"class_relevance": (0.1, 0.4, 0.3, 0.2), "m_dim": (0.5, 0.6, 0.4, 0.3)}
    keys = [
        {"run": "dino", "checkpoint": f"checkpoint{20 * i:04d}.pth", "epoch": 20 * i}
        for i in range(4)
    ]
    results = [{**key, **{k: v[i] for k, v in series.items()}} for i, key in enumerate(keys)]
    _write(folder / "results/results.csv", results)
    miou = (0.30, 0.42, 0.40, 0.35)
    _write(folder / "miou.csv", [{**k, "voc_linear": v} for k, v in zip(keys, miou, strict=True)])
    return {}


def _probe_results(folder: Path) -> dict[str, Any]:
    from dse_ext.probes import ProbeScore

    score = ProbeScore(miou=0.4, class_iou=(0.5, 0.3), pixel_accuracy=0.6)
    return {
        "csv_text": None, "json_text": None, "settings": {"k": 30}, "classes": ("a", "b"),
        "score": score,
    }  # fmt: skip


STAND_INS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "dse_ext.checkpoints.files.find_checkpoints": _checkpoint_files,
    "dse_ext.data.folder.ImageFolder": _photos,
    "dse_ext.probes.knn.KNNProbe": _features,
    "dse_ext.probes.linear.LinearProbe": _features,
    "dse_ext.probes.results.ProbeResults": _probe_results,
    "dse_ext.probes.score.ScoreAccumulator": _prediction,
    "dse_ext.selection": _tables,
    "dse_ext.selection.miou.read_miou": _tables,
    "dse_ext.selection.results.read_results": _tables,
}
