"""Probes: the true quality of dense features, measured with labels."""

from dse_ext.probes.datasets import DATASETS, DatasetError, SegmentationData, open_dataset
from dse_ext.probes.knn import KNNProbe
from dse_ext.probes.linear import LinearProbe, PatchBatch
from dse_ext.probes.measure import PROBES, ProbeSettings, measure
from dse_ext.probes.patches import PatchTargets, patch_targets
from dse_ext.probes.score import ProbeScore, ScoreAccumulator

__all__ = [
    "DATASETS",
    "PROBES",
    "DatasetError",
    "KNNProbe",
    "LinearProbe",
    "PatchBatch",
    "PatchTargets",
    "ProbeScore",
    "ProbeSettings",
    "ScoreAccumulator",
    "SegmentationData",
    "measure",
    "open_dataset",
    "patch_targets",
]
