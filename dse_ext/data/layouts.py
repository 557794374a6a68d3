"""Random layouts of regions, as functions of the unit square.

A layout assigns a region number to every point; it knows nothing of pixels, so a scene keeps its
shape at any resolution. Straight boundaries are bent by a smooth random displacement.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Regions = npt.NDArray[np.int64]


def _grid(size: int) -> tuple[Floats, Floats]:
    """Pixel centres of a size x size image in [0, 1], as x and y of shape (size, size)."""
    centres = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y


def smooth_noise(rng: np.random.Generator, size: int, waves: int = 4) -> Floats:
    """A smooth random function on the pixel centres of the unit square.

    Args:
        rng: Source of randomness.
        size: Width and height in pixels.
        waves: Number of plane waves of 0.5 to 2 periods that are added up.

    Returns:
        Values of about unit variance, of shape ``(size, size)``.
    """
    centres = (np.arange(size) + 0.5) / size
    angle, phase = rng.uniform(0, 2 * np.pi, size=(2, waves, 1))
    frequency = 2 * np.pi * rng.uniform(0.5, 2.0, size=(waves, 1))
    # A plane wave is the product of a wave along x and one along y: 2 * size exponentials
    # instead of size ** 2 sines.
    along_x = np.exp(1j * (frequency * np.cos(angle) * centres + phase))
    along_y = np.exp(1j * frequency * np.sin(angle) * centres)
    total: Floats = (along_y.T @ along_x).imag
    total *= np.sqrt(2.0 / waves)
    return total


def _warped(rng: np.random.Generator, size: int, strength: float) -> tuple[Floats, Floats]:
    x, y = _grid(size)
    return x + strength * smooth_noise(rng, size), y + strength * smooth_noise(rng, size)


def voronoi(rng: np.random.Generator, size: int, regions: int) -> Regions:
    """Nearest of ``regions`` random points, with bent borders."""
    x, y = _warped(rng, size, 0.04)
    points = rng.uniform(0.1, 0.9, size=(regions, 2))
    squared = [(x - px) ** 2 + (y - py) ** 2 for px, py in points]
    nearest: Regions = np.argmin(np.stack(squared), axis=0).astype(np.int64)
    return nearest


def bands(rng: np.random.Generator, size: int, regions: int) -> Regions:
    """Parallel bands of random direction and unequal width, with bent borders."""
    x, y = _warped(rng, size, 0.05)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    widths = rng.uniform(0.6, 1.4, size=regions)
    # Bands are laid over the central 1.0 of the projection, the outermost ones run on.
    cuts = np.cumsum(widths / widths.sum())[:-1] - 0.5
    band: Regions = np.searchsorted(cuts, along).astype(np.int64)
    return band


def half_planes(rng: np.random.Generator, size: int, regions: int) -> Regions:
    """Repeated cuts: each takes the points beyond a bent line and gives them to a new region."""
    result = np.zeros((size, size), dtype=np.int64)
    for region in range(1, regions):
        x, y = _warped(rng, size, 0.05)
        angle = rng.uniform(0, 2 * np.pi)
        offset = rng.uniform(-0.05, 0.25)
        result[np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) > offset] = region
    return result


def blobs(rng: np.random.Generator, size: int, regions: int) -> Regions:
    """A background with ``regions - 1`` bent ellipses in front of it."""
    result = np.zeros((size, size), dtype=np.int64)
    for region in range(1, regions):
        x, y = _warped(rng, size, 0.06)
        cx, cy = rng.uniform(0.2, 0.8, size=2)
        a, b = rng.uniform(0.2, 0.4, size=2)
        angle = rng.uniform(0, np.pi)
        u = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
        v = np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
        result[(u / a) ** 2 + (v / b) ** 2 < 1] = region
    return result


LAYOUTS: tuple[Callable[[np.random.Generator, int, int], Regions], ...] = (
    voronoi,
    bands,
    half_planes,
    blobs,
)
"""All layouts; a scene draws one of them uniformly."""
