"""Any folder of images, without labels."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps
from torch.utils.data import Dataset

EXTENSIONS: tuple[str, ...] = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
"""File endings that count as images, whatever their case."""


class NoImagesError(ValueError):
    """A folder holds no image, or none that can be read."""


class UnreadableImageError(OSError):
    """An image file cannot be decoded.

    Attributes:
        path: The file.
        reason: What the decoder said.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot read the image {path}: {reason}")
        self.path = path
        self.reason = reason


class ImageFolder(Dataset[Image.Image]):
    """The images of a folder and its sub-folders, as RGB PIL images in a fixed order.

    Files are sorted by their path relative to the folder, so that an index means the same image
    on every machine. A file that cannot be decoded is named in a warning and the next readable
    one takes its place, so that a batch keeps its size and the outcome does not depend on chance.

    Examples:
        >>> from dse_ext.data import ImageFolder
        >>> images = ImageFolder("photos")
        >>> images[0].size
        (640, 427)

    Attributes:
        root: The folder.
        paths: The files, in order.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Lists the images of a folder; none is opened yet.

        Args:
            root: The folder.

        Raises:
            NotADirectoryError: If there is no such folder.
            NoImagesError: If neither it nor a folder below it holds an image.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise NotADirectoryError(f"a folder of images was expected, but {self.root} {what}.")
        self.paths, others = _list_images(self.root)
        if not self.paths:
            found = (
                f"it holds {len(others)} other file(s), such as {others[0].name}"
                if others
                else "it holds no file at all"
            )
            raise NoImagesError(
                f"no image in {self.root.resolve()}: looked in it and in every folder below it "
                f"for files that end in {', '.join(EXTENSIONS)} (in any case); {found}."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Decodes one image.

        Args:
            index: Index into :attr:`paths`.

        Returns:
            The image, upright (EXIF orientation applied), in RGB.

        Raises:
            UnreadableImageError: If the file cannot be decoded.
        """
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                return ImageOps.exif_transpose(file).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything on broken bytes
            raise UnreadableImageError(path, str(error) or type(error).__name__) from error

    def load(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """Returns the first readable image from ``index`` on, and what was skipped on the way.

        Args:
            index: Index into :attr:`paths`.

        Returns:
            The image, and one message per unreadable file that came before it.

        Raises:
            NoImagesError: If no file of the folder can be decoded.
        """
        skipped: list[str] = []
        for offset in range(len(self.paths)):
            try:
                return self.image((index + offset) % len(self.paths)), tuple(skipped)
            except UnreadableImageError as error:
                skipped.append(str(error))
        raise NoImagesError(
            f"none of the {len(self.paths)} images in {self.root.resolve()} can be read; "
            f"the first: {skipped[0]}"
        )

    def __getitem__(self, index: int) -> Image.Image:
        """Returns an image, or the next readable one with a warning that names what was skipped."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images.")
        image, skipped = self.load(index % len(self))
        for message in skipped:
            warnings.warn(f"skipped: {message}", stacklevel=2)
        return image


def _list_images(root: Path) -> tuple[list[Path], list[Path]]:
    """The images and the other files below a folder, each sorted by relative path."""
    images: list[Path] = []
    others: list[Path] = []
    visited: set[str] = set()
    # Data sets are often put together out of symbolic links, which may form a cycle.
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()
        for name in files:
            path = Path(folder, name)
            (images if path.suffix.lower() in EXTENSIONS else others).append(path)

    def relative(path: Path) -> str:
        return path.relative_to(root).as_posix()

    return sorted(images, key=relative), sorted(others, key=relative)
