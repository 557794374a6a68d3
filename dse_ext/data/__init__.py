"""Image collections: scenes with true labels that need no download, and folders of images."""

from dse_ext.data.folder import ImageFolder, NoImagesError, UnreadableImageError
from dse_ext.data.photographs import TEXTURES, Texture
from dse_ext.data.scenes import TextureScenes
from dse_ext.data.source import ImageSource

__all__ = [
    "TEXTURES",
    "ImageFolder",
    "ImageSource",
    "NoImagesError",
    "Texture",
    "TextureScenes",
    "UnreadableImageError",
]
