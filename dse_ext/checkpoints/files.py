"""Finding the checkpoints of a run, and reading them without running code from them."""

from __future__ import annotations

import argparse
import glob
import os
import pathlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch

from dse_ext.checkpoints.errors import CheckpointError, UnsafeCheckpointError
from dse_ext.checkpoints.reader import CheckpointReader
from dse_ext.checkpoints.registry import find_reader

# Names of folders that say nothing of the run they belong to.
_UNSPECIFIC = {"checkpoint", "checkpoints", "ckpt", "ckpts", "models", "weights"}

# What training scripts put beside their weights and what is plain data: the parsed command line
# (DINO, iBOT, Mugs, MAE, EsViT), paths in it (VICReg), NumPy scalars (best accuracies), each under
# the names that older and newer versions write.
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [
    argparse.Namespace,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")),
]
_UNSAFE = re.compile(r"GLOBAL (\S+) was not an allowed global")


@dataclass(frozen=True)
class CheckpointFile:
    """One checkpoint of a run.

    Attributes:
        path: The file.
        epoch: Epoch (or step) in its name; None where the name has none.
        run: Name of the run: that of the folder, or of the one above where the folder is called
            ``checkpoints`` or the like.
    """

    path: Path
    epoch: int | None
    run: str


def find_checkpoints(
    pattern: str | os.PathLike[str], method: str | CheckpointReader
) -> list[CheckpointFile]:
    """Lists the checkpoints of one run or of several.

    Files whose names are not like those of the method are left out: a folder usually holds a
    ``checkpoint.pth`` of the latest state, logs and results as well.

    Args:
        pattern: A folder, a file, or a pattern such as ``"runs/dino/*.pth"`` or ``"runs/*/*.pth"``
            (``**`` goes down any number of folders).
        method: Name of the method, ``"module:attribute"`` or a reader.

    Returns:
        The checkpoints, ordered by run, then by epoch.

    Raises:
        ValueError: If there is no such method.
        FileNotFoundError: If nothing is found; it says what was found instead.

    Examples:
        >>> from dse_ext.checkpoints import find_checkpoints
        >>> [file.epoch for file in find_checkpoints("runs/dino/*.pth", "dino")]
        [0, 20, 40]
    """
    reader = find_reader(method)
    text = os.path.expanduser(os.fspath(pattern))
    folder = Path(text)
    found = folder.iterdir() if folder.is_dir() else map(Path, glob.glob(text, recursive=True))
    paths = sorted(path for path in found if path.is_file())
    fitting = [path for path in paths if reader.fits(path.name)]
    if not fitting:
        others = ", ".join(path.name for path in paths[:5])
        instead = (
            f"it names {len(paths)} other file(s), such as {others}" if paths else "it names none"
        )
        raise FileNotFoundError(
            f"checkpoints {text!r} must name files like {' or '.join(reader.files)} for the "
            f"method {reader.name}; {instead}."
        )
    runs = _run_names({path.parent for path in fitting})
    files = [CheckpointFile(path, reader.epoch(path.name), runs[path.parent]) for path in fitting]
    return sorted(files, key=lambda f: (f.run, f.epoch is None, f.epoch or 0, f.path.name))


def read_content(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> object:
    """Reads a checkpoint file onto the CPU.

    Args:
        path: The file; ``.safetensors`` is read as such.
        allow_pickle: Whether code that the file contains may run. Only for files that come from
            someone you trust.

    Returns:
        What it holds.

    Raises:
        UnsafeCheckpointError: If it cannot be read without running code from it.
        CheckpointError: If it is damaged or no checkpoint at all.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        # Mapped, so that of a training state only the weights that are copied are ever read; files
        # of before torch 1.6 cannot be.
        mapped = is_zipfile(path)
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise
    except UnpicklingError as error:
        needed = _unsafe_globals(path, error)
        if not needed:
            raise CheckpointError(
                f"the file is damaged or no checkpoint: {_first_line(error)}"
            ) from error
        if not allow_pickle:
            raise UnsafeCheckpointError(
                f"reading the file would run code that it contains: it needs {', '.join(needed)}. "
                "If you trust its origin, allow it with --allow-pickle (allow_pickle=True)."
            ) from error
    except (RuntimeError, EOFError, OSError, BadZipFile, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the file is damaged or no checkpoint: {_first_line(error)}"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
    except Exception as error:  # whatever the code in the file raises
        raise CheckpointError(f"the file cannot be unpickled: {_first_line(error)}") from error


def _unsafe_globals(path: Path, error: UnpicklingError) -> list[str]:
    """What a file needs besides plain data and tensors."""
    names: set[str] = set(_UNSAFE.findall(str(error)))
    # The error names the first one only; files of before torch 1.6 cannot be looked through.
    with (
        suppress(ValueError, RuntimeError, UnpicklingError),
        torch.serialization.safe_globals(_PLAIN),
    ):
        names.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return sorted(names)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _run_names(folders: set[Path]) -> dict[Path, str]:
    """A name for each folder, long enough to tell it from the others."""
    parts = {}
    for folder in folders:
        resolved = folder.resolve()
        if resolved.name.lower() in _UNSPECIFIC and resolved.parent.name:
            resolved = resolved.parent
        parts[folder] = [part for part in resolved.parts if part != resolved.anchor] or ["run"]
    depth = 1
    while True:
        names = {folder: "/".join(path[-depth:]) for folder, path in parts.items()}
        if len(set(names.values())) == len(names) or depth > max(map(len, parts.values())):
            return names
        depth += 1
