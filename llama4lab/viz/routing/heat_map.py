"""Maps whose rows and columns have numbers or names."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from llama4lab.viz import style

LEAST_MARK = 2.5  # points; smaller crosses would only be a pattern


def draw_map(
    ax: Axes, values: pd.DataFrame, *, marked: np.ndarray | None = None, names: tuple[str, str], **look: Any
) -> AxesImage:
    """Draws a table of values as a map: the first row at the bottom, if rows have numbers, otherwise at the top.

    Args:
        ax: Where to draw.
        values: The values; its index and columns are written beside the map, as far as there is room.
        marked: Cells that get a grey ×, if they have room; by default those without a value.
        names: What rows and columns are.
        look: Colour map and range, as for `imshow`.
    """
    numbered = not any(isinstance(name, str) for name in values.index)
    numbers = values.to_numpy(dtype=float)
    picture = ax.imshow(
        numbers, aspect="auto", origin="lower" if numbered else "upper", interpolation="nearest", **look
    )
    width, height = style.cell_size(ax, numbers.shape[1], len(numbers))
    y, x = np.nonzero(np.isnan(numbers) if marked is None else marked)
    size = min(5.0, 0.5 * width, 0.5 * height)
    if len(y) and size >= LEAST_MARK:
        ax.scatter(x, y, size**2, color=style.GREY if size > 4 else "0.75", marker="x", linewidth=min(1.0, 0.25 * size))
    style.number_ticks(ax.yaxis, np.arange(len(numbers)), np.array(values.index, dtype=object), room=height / 11)
    longest = max(len(str(name)) for name in values.columns)
    style.number_ticks(
        ax.xaxis, np.arange(numbers.shape[1]), np.array(values.columns, dtype=object), room=width / (5 + 6 * longest)
    )
    ax.set(ylabel=names[0], xlabel=names[1], xlim=(-0.5, numbers.shape[1] - 0.5))
    style.plain(ax)
    return picture


def write_values(ax: Axes, values: np.ndarray, picture: AxesImage, form: str = "{:.2f}") -> None:
    """Writes numbers into the cells of a map, if they have room."""
    width, height = style.cell_size(ax, values.shape[1], len(values))
    longest = max((len(form.format(value)) for value in values[np.isfinite(values)]), default=1)
    size = min(8.5, 0.62 * height, 1.5 * width / longest)
    for (y, x), value in np.ndenumerate(values) if size >= 5.0 else ():
        if np.isfinite(value):
            color = style.ink_on(picture.to_rgba(value)[:3])
            ax.text(x, y, form.format(value), ha="center", va="center", fontsize=size, color=color)
