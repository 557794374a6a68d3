"""Segmentation data sets in their published folder layouts, and any folder of label maps."""

from dse_ext.probes.datasets.base import (
    IGNORE,
    DatasetError,
    LabelledFiles,
    LabelledSource,
    SegmentationData,
)
from dse_ext.probes.datasets.registry import DATASETS, DatasetOptions, open_dataset

__all__ = [
    "DATASETS",
    "IGNORE",
    "DatasetError",
    "DatasetOptions",
    "LabelledFiles",
    "LabelledSource",
    "SegmentationData",
    "open_dataset",
]
