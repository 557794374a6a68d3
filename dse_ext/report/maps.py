"""Cluster maps: what the clusters that DSE is made of look like on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dse_ext.report.style import MUTED, RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL, _GAP = 256, 10
"""Size of a picture in a column and of the gap below it, in pixels."""

IntMap = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MapColumn:
    """One column of the map figure.

    Attributes:
        title: Heading.
        maps: One picture per image: RGB ``(H, W, 3)`` uint8, or labels ``(h, w)`` int64.
        kind: ``"image"``, ``"classes"`` (colours from the legend) or ``"clusters"``.
    """

    title: str
    maps: Sequence[npt.NDArray[np.uint8] | IntMap]
    kind: str


def cluster_map_figure(columns: Sequence[MapColumn], classes: Sequence[str]) -> Figure:
    """Images, true labels and cluster maps side by side.

    Args:
        columns: The columns, all with the same number of maps.
        classes: Class names for the legend; empty without labels.

    Returns:
        A figure with one row per image.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = len(columns[0].maps)
    side = 1.45
    with matplotlib.rc_context(RC):
        figure = Figure(
            figsize=(side * len(columns), side * rows + (0.75 if classes else 0.3)),
            layout="constrained",
        )
        axes = figure.subplots(1, len(columns), squeeze=False)[0]
        for axis, column in zip(axes, columns, strict=True):
            axis.set_axis_off()
            axis.set_title(column.title, fontsize=8, loc="center")
            axis.imshow(_stacked(column), interpolation="nearest")
        if classes:
            figure.legend(
                handles=[
                    Patch(color=colour / 255, label=name)
                    for name, colour in zip(classes, palette(len(classes)), strict=True)
                ],
                loc="outside lower center",
                ncols=min(len(classes), 6),
                fontsize=8,
                labelcolor=MUTED,
            )
    return figure


def _stacked(column: MapColumn) -> npt.NDArray[np.uint8]:
    """The pictures of a column below each other: one artist is drawn far faster than many axes."""
    pictures = [_colours(picture, column.kind) for picture in column.maps]
    cells = []
    for picture in pictures:
        rows = np.arange(_CELL) * picture.shape[0] // _CELL
        columns = np.arange(_CELL) * picture.shape[1] // _CELL
        cells += [picture[rows][:, columns], np.full((_GAP, _CELL, 3), 255, dtype=np.uint8)]
    return np.concatenate(cells[:-1])


def _colours(picture: npt.NDArray[np.uint8] | IntMap, kind: str) -> npt.NDArray[np.uint8]:
    if kind == "image":
        return picture.astype(np.uint8)
    count = int(picture.max()) + 1
    colours = palette(max(count, 12)) if kind == "classes" else palette(max(count, 3), shift=0.05)
    return colours[picture]


def palette(count: int, shift: float = 0.0) -> npt.NDArray[np.uint8]:
    """Distinct colours: hues by the golden angle, lightness in three turns.

    Args:
        count: Number of colours.
        shift: Rotation of the hues, in turns.

    Returns:
        RGB colours of shape ``(count, 3)``.
    """
    from matplotlib.colors import hsv_to_rgb

    index = np.arange(count)
    hue = (shift + index * 0.61803398875) % 1.0
    saturation = np.array([0.55, 0.75, 0.4])[index % 3]
    value = np.array([0.9, 0.7, 0.55])[(index // 2) % 3]
    rgb = hsv_to_rgb(np.stack([hue, saturation, value], axis=1))
    return np.asarray(np.rint(rgb * 255), dtype=np.uint8)
