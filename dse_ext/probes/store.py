"""The training patches of one checkpoint: in memory where they are few, in a file where not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from dse_ext.probes.linear import PatchBatch
from dse_ext.probes.patches import PatchTargets

MEMORY_LIMIT = 1 << 30
"""Bytes of features that are kept in memory; more of them go to a file."""

_ROWS = 1 << 16


class PatchStore(Sequence[PatchBatch]):
    """Patch features and targets that are written once and read many times, batch by batch.

    Features are float32. The file has no name, so that nothing is left of it however the process
    ends; pages of it that are in use stay in memory as far as the system has room.
    """

    def __init__(
        self,
        patches: int,
        dim: int,
        folder: Path | None = None,
        *,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        """Makes room.

        Args:
            patches: Number of patches that will be added.
            dim: Number of features of each.
            folder: Where the file is made; None is the system's folder for temporary files.
            memory_limit: Bytes up to which there is no file.

        Raises:
            OSError: If the disk has too little room.
        """
        size = patches * dim * 4
        self._features: np.ndarray[tuple[int, int], np.dtype[np.float32]]
        if size <= memory_limit:
            self._features = np.empty((patches, dim), dtype=np.float32)
        else:
            where = Path(folder or tempfile.gettempdir())
            free = shutil.disk_usage(where).free
            if size > free:
                raise OSError(
                    f"the features of {patches} training patches take {size / 2**30:.1f} GiB, but "
                    f"{where} has {free / 2**30:.1f} GiB left: use fewer training images or a "
                    "smaller image size."
                )
            with tempfile.TemporaryFile(dir=where) as file:
                self._features = np.memmap(  # keeps the file open by itself
                    file, dtype=np.float32, mode="w+", shape=(patches, dim)
                )
        self._targets: list[PatchTargets] = []
        self._joined: PatchTargets | None = None
        self._filled = 0

    def add(self, features: Tensor, targets: PatchTargets) -> None:
        """Appends patches.

        Args:
            features: ``(P, d)``.
            targets: Their targets.

        Raises:
            ValueError: If there are more of them than there is room for.
        """
        stop = self._filled + features.shape[0]
        if stop > len(self._features):
            raise ValueError(f"there is room for {len(self._features)} patches, got {stop}.")
        self._features[self._filled : stop] = features.detach().float().cpu().numpy()
        self._targets.append(targets.to(torch.device("cpu")))
        self._filled = stop
        self._joined = None

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._filled // _ROWS)

    @overload
    def __getitem__(self, index: int) -> PatchBatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PatchBatch]: ...
    def __getitem__(self, index: int | slice) -> PatchBatch | Sequence[PatchBatch]:
        """Returns a batch, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} batches.")
        if self._joined is None:
            self._joined = PatchTargets.cat(self._targets)
        start = (index % len(self)) * _ROWS
        stop = min(start + _ROWS, self._filled)
        features = torch.from_numpy(np.asarray(self._features[start:stop]))
        return PatchBatch(features, self._joined.rows(start, stop))
