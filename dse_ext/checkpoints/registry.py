"""Checkpoint readers by name: those that come along, and those that users add."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from dse_ext.checkpoints.methods import OTHERS, PAPER
from dse_ext.checkpoints.reader import CheckpointReader

_READERS: dict[str, CheckpointReader] = {reader.name: reader for reader in (*PAPER, *OTHERS)}


def readers() -> tuple[CheckpointReader, ...]:
    """Every reader that is known by name: the paper's sixteen first, then the others."""
    return tuple(_READERS.values())


def register(reader: CheckpointReader, *, replace: bool = False) -> CheckpointReader:
    """Makes a reader known by its name.

    Args:
        reader: The reader.
        replace: Whether it may take the place of one of the same name.

    Returns:
        The reader.

    Raises:
        ValueError: If there is one of that name already, or the name is not usable.
    """
    if not reader.name or ":" in reader.name:
        raise ValueError(f"the name of a reader must be a word without ':', got {reader.name!r}.")
    if reader.name in _READERS and not replace:
        raise ValueError(
            f"there is a reader named {reader.name!r} already; give replace=True to replace it."
        )
    _READERS[reader.name] = reader
    return reader


def find_reader(method: str | CheckpointReader) -> CheckpointReader:
    """Returns a reader.

    Args:
        method: Its name; or ``"module:attribute"``, where the attribute of the Python module is a
            reader or a function without arguments that returns one (modules in the current folder
            are found too); or a reader, which is returned as it is.

    Returns:
        The reader.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(method, CheckpointReader):
        return method
    if ":" in method:
        return _imported(method)
    if method not in _READERS:
        similar = get_close_matches(method, _READERS, n=3)
        hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
        raise ValueError(
            f"method must be one of {', '.join(_READERS)}, or module:function for one of your own, "
            f"got {method!r}.{hint}"
        )
    return _READERS[method]


def _imported(method: str) -> CheckpointReader:
    module_name, _, attribute = method.partition(":")
    try:
        with _current_folder():
            found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {method!r} cannot be imported: {error}.") from error
    if not isinstance(found, CheckpointReader) and callable(found):
        found = found()
    if not isinstance(found, CheckpointReader):
        raise ValueError(
            f"method {method!r} must be a dse_ext.checkpoints.CheckpointReader or a function that "
            f"returns one, got {type(found).__name__}."
        )
    return found


@contextmanager
def _current_folder() -> Iterator[None]:
    """Finds modules in the current folder, which an installed command does not by itself."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
