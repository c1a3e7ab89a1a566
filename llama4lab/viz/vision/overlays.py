"""A table of places over its picture."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.vision.cells import add_cells, shown_cells, tile_borders, write_numbers
from llama4lab.viz.vision.looks import Kind, Look, look_of
from llama4lab.viz.vision.picture import GROUND, Picture, in_grey


def overlay(
    table: pd.DataFrame,
    image: Picture,
    value: str,
    *,
    ax: Axes | None = None,
    global_tile: bool = False,
    alpha: float | int = 0.6,
    kind: Kind | None = None,
) -> Axes:
    """Draws a picture in grey, and over it one cell for each line of a table, just where that line looks.

    White lines are the borders of tiles. What has no number stays uncovered; weights and effects near zero let more of
    the picture through.

    Args:
        table: Any table of `tables.vision` with the columns left, top, right and bottom, of one image, and with one
            line for each place: choose a layer, head, slot or rank first.
        image: The picture itself, at the size the prompt was given: `prompt.images[0].original`, or an array.
        value: Column to draw.
        ax: Where to draw; a new figure by default.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.
        kind: What the colours mean: "scale", "effects" (orange above zero, blue below, nothing at zero), "classes" (a
            colour for each value) or "experts". By default as the column says.

    Raises:
        KeyError: if there is no column `value`.
        ValueError: if the table has several images, several lines for one place, boxes outside the picture, or the
            picture is none.
    """
    look_of(table, value, kind)  # says what is missing before anything is drawn
    ax, shown = on_picture(table, image, ax, global_tile)
    look = look_of(shown, value, kind)
    cells = paint(ax, shown, look, alpha)
    if look.kind in ("classes", "experts"):
        legend_beside(ax, look.patches(shown[value]), title=look.label)
    else:
        style.color_bar(ax, cells, look.label).ax.set_facecolor(GROUND)
    return ax


def tokens(
    table: pd.DataFrame,
    image: Picture,
    *,
    ax: Axes | None = None,
    value: str = "norm",
    global_tile: bool = False,
    alpha: float | int = 0.5,
) -> Axes:
    """Draws a picture in grey, and over it one cell for each image token, just where the token looks.

    Columns named `expert_...` are drawn in the colours of the experts, with their numbers where there is room; any
    other column on a scale. White lines are the borders of tiles.

    Args:
        table: As `tables.vision.tokens` gives it, of one image.
        image: The picture itself, at the size the prompt was given: `prompt.images[0].original`, or an array.
        ax: Where to draw; a new figure by default.
        value: Column to draw.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        KeyError: if there is no column `value`.
        ValueError: if the table has several images, boxes outside the picture, or the picture is none.
    """
    return overlay(table, image, value, ax=ax, global_tile=global_tile, alpha=alpha)


def on_picture(table: pd.DataFrame, image: Picture, ax: Axes | None, global_tile: bool) -> tuple[Axes, pd.DataFrame]:
    """Draws a picture in grey and gives its axes, with the cells that belong onto it.

    Raises:
        ValueError: if they cannot be drawn there; see `overlay`.
    """
    picture = in_grey(image)
    height, width = picture.shape
    shown = shown_cells(table, width, height, global_tile)
    ax = style.axes(ax, 7.0, 6.0 * height / width + 0.4)
    # Pixel (0, 0) reaches from 0 to 1, as boxes count.
    ax.imshow(picture, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlim=(0, width), ylim=(height, 0), xlabel="pixel", ylabel="pixel")
    style.plain(ax)
    return ax, shown


def paint(ax: Axes, shown: pd.DataFrame, look: Look, alpha: float | int) -> PolyCollection:
    """Draws cells in their colours over the picture of an axes.

    Raises:
        ValueError: if a place has several lines, which would cover each other.
    """
    _check_places(shown)
    known = shown.loc[shown[look.value].notna(), :]
    if look.norm is not None:
        cells = add_cells(ax, known, None)
        cells.set(array=known[look.value].to_numpy(dtype=float), cmap=look.color_map(alpha), norm=look.norm)
    else:
        cells = add_cells(ax, known, alpha)
        cells.set_facecolor([tuple(color) for color in look.colors(known[look.value])])
        if look.kind == "experts":
            write_numbers(ax, known, known[look.value].to_numpy(dtype=int))
    tile_borders(ax, shown)
    return cells


def _check_places(shown: pd.DataFrame) -> None:
    places = ["left", "top", "right", "bottom", *(["tile"] if "tile" in shown else [])]
    if np.any(shown.duplicated(places)):
        several = [
            str(name)
            for name in ("layer", "head", "slot", "rank", "word", "hook_point", "source", "row")
            if name in shown and shown[name].nunique() > 1
        ]
        raise ValueError(
            "The table has several lines for one place of the picture"
            + (f", with several values of {', '.join(several)}." if several else ".")
            + f'\nChoose one: table[table["{several[0] if several else "layer"}"] == ...].'
        )
