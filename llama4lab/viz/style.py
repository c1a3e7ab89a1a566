"""What all plots share: colour maps, a figure where none is given, and small marks. Nothing here is global."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure

# White is nothing; lightness falls evenly, so the map reads in grey and for every kind of colour blindness.
SEQUENTIAL = LinearSegmentedColormap.from_list("llama4lab", ["#ffffff", "#b9d7ea", "#5fa3d0", "#23669f", "#0b2447"])
# Orange and blue stay apart in all common kinds of colour blindness; white is zero.
DIVERGING = LinearSegmentedColormap.from_list(
    "llama4lab_diverging", ["#0b3c6f", "#6aa5d1", "#ffffff", "#eda24f", "#8a3b00"]
)
BLUE, ORANGE, GREY, INK = "#23669f", "#e08a1e", "#9a9a9a", "#222222"
MARKERS = "osD^vPX*"  # of lines, so that they are told apart without colour
LINE = "#c4366f"  # borders of chunks and tiles: on neither map


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Gives `ax`, or the axes of a new figure.

    Args:
        ax: Where to draw; None for a new figure.
        width: Width of a new figure in inches, brought between 3.5 and 15.
        height: Height of a new figure in inches, brought between 1.8 and 15.
    """
    if ax is not None:
        return ax
    size = float(np.clip(width, 3.5, 15)), float(np.clip(height, 1.8, 15))
    return plt.subplots(figsize=size, layout="compressed")[1]


def centred(values: np.ndarray) -> Normalize:
    """The range of a diverging map: symmetric, with zero in the middle."""
    finite = np.abs(values[np.isfinite(values)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    return TwoSlopeNorm(0.0, -limit, limit)


def color_bar(ax: Axes, mappable: ScalarMappable, label: str) -> Colorbar:
    """A slim scale to the right of the axes."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    bar = figure.colorbar(mappable, ax=ax, label=label, pad=0.015, fraction=0.05, aspect=24)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - a spine, typed as a collection of them
    return bar


def ink_on(color: object) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = (channel**2.2 for channel in to_rgb(color))  # pyright: ignore[reportArgumentType]
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.3 else INK


def cell_size(ax: Axes, columns: int, rows: int) -> tuple[float, float]:
    """Width and height in points of a cell of a map that fills the axes."""
    box, points = ax.get_window_extent(), 72 / ax.figure.dpi
    return box.width * points / columns, box.height * points / rows


def number_size(width: float, height: float, largest: int) -> float:
    """Font size in points of a number in a cell; 0 if the cell is too small for numbers up to `largest`."""
    size = min(8.5, 0.62 * height, 1.2 * width / len(str(largest)))
    return size if size >= 5.5 else 0.0


def number_ticks(axis: Axis, places: np.ndarray, numbers: np.ndarray, room: float) -> None:
    """Labels the cells of an axis with numbers, as many as have room.

    Args:
        axis: The x or y axis.
        places: Where the cells are.
        numbers: What to write.
        room: Width of a cell as a share of the width that one label needs.
    """
    step = next((step for step in (1, 2, 4, 8, 16) if step * room >= 1), 32)
    axis.set_ticks(places[::step], [str(number) for number in numbers[::step]])


def plain(ax: Axes, *, keep: Sequence[str] = ("left", "bottom")) -> None:
    """Takes away the frame, except for the sides in `keep`."""
    for side, spine in ax.spines.items():
        spine.set_visible(side in keep)


def only(table: pd.DataFrame, column: str, value: Any) -> pd.DataFrame:
    """The lines in which a column has a value.

    Raises:
        ValueError: if there are none.
    """
    own = table.loc[table[column] == value, :]
    if own.empty:
        found = ", ".join(map(str, np.unique(table[column]))) or "none"
        raise ValueError(f"{column}={value!r} was to be drawn; the table has {column} {found}.")
    return own


def only_one(table: pd.DataFrame, column: str) -> int | str:
    """The one value that a column has.

    Raises:
        ValueError: if it has none or several.
    """
    values = np.unique(table[column]).tolist()
    if len(values) != 1:
        found = ", ".join(map(str, values[:8])) or "none"
        raise ValueError(
            f"One {column} can be drawn at a time; the table has {found}.\n"
            f'Choose one: table[table["{column}"] == {values[0] if values else 0!r}].'
        )
    return values[0]
