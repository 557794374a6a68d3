"""Checkpoint files of self-supervised methods, as timm networks that give dense features.

One small declarative entry a method says how its official files are named and laid out
(:class:`CheckpointReader`); :func:`register` adds one of your own.
"""

from dse_ext.checkpoints.errors import (
    CheckpointError,
    CheckpointLayoutError,
    CheckpointMismatchError,
    UnsafeCheckpointError,
)
from dse_ext.checkpoints.extractor import DenseExtractor
from dse_ext.checkpoints.files import CheckpointFile, find_checkpoints, read_content
from dse_ext.checkpoints.load import load
from dse_ext.checkpoints.methods import PAPER
from dse_ext.checkpoints.reader import CheckpointReader, ModelSpec
from dse_ext.checkpoints.registry import find_reader, readers, register

__all__ = [
    "PAPER",
    "CheckpointError",
    "CheckpointFile",
    "CheckpointLayoutError",
    "CheckpointMismatchError",
    "CheckpointReader",
    "DenseExtractor",
    "ModelSpec",
    "UnsafeCheckpointError",
    "find_checkpoints",
    "find_reader",
    "load",
    "read_content",
    "readers",
    "register",
]
