"""Cells over a picture: which are drawn, and what is drawn of each."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from llama4lab.viz import style
from llama4lab.viz.token_axis import token_label

SIDES = ["left", "top", "right", "bottom"]


def shown_cells(table: pd.DataFrame, width: int, height: int, global_tile: bool) -> pd.DataFrame:
    """Gives the cells to draw on a picture of that size: without filling, and of one kind of tile.

    An image of one tile has only the global one, and a table without `is_global` has no tiles; all of it is drawn.

    Raises:
        ValueError: if the table is of several images, lacks the boxes, or has boxes outside the picture.
    """
    if missing := [side for side in SIDES if side not in table]:
        raise ValueError(
            f"Cells were to be drawn over a picture, but the table has no column {missing[0]!r}.\n"
            "Take a table of tables.vision, which says where each cell lies."
        )
    style.only_one(table, "image")
    shown = table.loc[(table["right"] > table["left"]) & (table["bottom"] > table["top"]), :]
    if shown.empty:
        raise ValueError("There is nothing to draw: all cells show only the filling beside the picture.")
    reach = shown[["right", "bottom"]].to_numpy().max(axis=0)
    if reach[0] > width + 0.5 or reach[1] > height + 0.5:
        raise ValueError(
            f"The boxes of the cells reach to {reach[0]:.0f} x {reach[1]:.0f}, but the picture is "
            f"{width} x {height} pixels.\nPass the picture at the size the prompt was given."
        )
    if "is_global" not in shown or np.all(shown["is_global"]):
        return shown
    return style.only(shown, "is_global", global_tile)


def boxes(shown: pd.DataFrame) -> np.ndarray:
    """Left, top, right and bottom, each of shape [cell]."""
    return shown[SIDES].to_numpy(dtype=float).T


def add_cells(ax: Axes, shown: pd.DataFrame, alpha: float | int | None) -> PolyCollection:
    """Adds cells, in one colour until they get others; without `alpha` their colours say how opaque they are."""
    left, top, right, bottom = boxes(shown)
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]]).transpose(2, 0, 1)
    # Without anti-aliasing, neighbouring cells leave no seam.
    cells = PolyCollection(list(corners), antialiaseds=False, linewidths=0, alpha=alpha)
    ax.add_collection(cells)
    return cells


def points_a_pixel(ax: Axes) -> float:
    """How many points a pixel of the picture takes."""
    return min(style.cell_size(ax, *map(round, (ax.get_xlim()[1], ax.get_ylim()[0]))))


def write_numbers(ax: Axes, shown: pd.DataFrame, numbers: np.ndarray) -> None:
    """Writes whole numbers into the cells, if they have room; none into cells that the border cuts short."""
    left, top, right, bottom = boxes(shown)
    scale = points_a_pixel(ax)
    size = style.number_size(scale * (right - left).max(), scale * (bottom - top).max(), int(numbers.max()))
    room = scale * np.minimum(right - left, bottom - top)
    for x, y, number in zip((left + right) / 2, (top + bottom) / 2, np.where(room > size, numbers, -1), strict=True):
        if size and number >= 0:
            _written(ax, x, y, str(number), size)


def write_tokens(ax: Axes, shown: pd.DataFrame, tokens: list[str]) -> None:
    """Writes tokens into the cells, as much of each as has room; nothing where not even two characters have."""
    left, top, right, bottom = boxes(shown)
    scale = points_a_pixel(ax)
    size = min(8.5, 0.5 * scale * (bottom - top).max(), scale * (right - left).max() / 2.4)
    if size < 4.5:
        return
    for x, y, wide, token in zip((left + right) / 2, (top + bottom) / 2, right - left, tokens, strict=True):
        longest = int(scale * wide / (0.6 * size))
        if longest >= 2:
            _written(ax, x, y, token_label(token.strip() or token, longest), size)


def tile_borders(ax: Axes, shown: pd.DataFrame) -> None:
    """Draws a line around the cells of each tile."""
    for _, tile in shown.groupby("tile") if "tile" in shown else ():
        left, top, right, bottom = boxes(tile)
        frame(ax, (left.min(), top.min(), right.max(), bottom.max()), color="white", linewidth=1.6)


def frame(ax: Axes, box: Sequence[float | int] | np.ndarray, *, color: str, linewidth: float | int = 1.8) -> None:
    """Draws a line around a box of the picture, with a dark rim, so that it shows on any colour."""
    left, top, right, bottom = box
    border = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=linewidth)
    border.set_path_effects([withStroke(linewidth=linewidth + 1.4, foreground=style.INK)])
    ax.add_patch(border)


def _written(ax: Axes, x: float, y: float, text: str, size: float) -> None:
    label = ax.text(x, y, text, ha="center", va="center", fontsize=size, color="white", clip_on=True)
    label.set_path_effects([withStroke(linewidth=2.0, foreground=style.INK)])
