"""What can be wrong with a checkpoint file, each with the facts a user needs to mend it."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint file cannot be used.

    Attributes:
        reason: What is wrong, without the path of the file.
        missing: Weights of the network that the file does not have.
        unexpected: Weights of the file that the network does not have.
    """

    def __init__(
        self, reason: str, missing: Sequence[str] = (), unexpected: Sequence[str] = ()
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)


class UnsafeCheckpointError(CheckpointError):
    """Reading the file would run code that it contains, which was not allowed."""


class CheckpointLayoutError(CheckpointError):
    """The file does not have the layout of the method."""


class CheckpointMismatchError(CheckpointError):
    """The weights of the file do not fit the network."""
