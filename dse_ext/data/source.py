"""What the training loop asks of a collection of images."""

from __future__ import annotations

from typing import Protocol

from PIL import Image


class ImageSource(Protocol):
    """Images by number; :class:`TextureScenes` and :class:`ImageFolder` are such sources."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """Returns an RGB image, and a message for each unreadable one that it stands in for."""
        ...
