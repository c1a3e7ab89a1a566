"""Features of image patches, over their picture: components, segments, neighbours, lengths."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.vision.cells import add_cells, boxes, frame, tile_borders
from llama4lab.viz.vision.overlays import on_picture, overlay
from llama4lab.viz.vision.picture import Picture, in_grey
from llama4lab.viz.vision.picture_panels import bare, best_columns, empty_panels

CHANNELS = ("red", "green", "blue")


def pca(
    table: pd.DataFrame,
    images: Picture | Sequence[Picture],
    *,
    ax: Axes | None = None,
    global_tile: bool = False,
    alpha: float | int = 0.9,
) -> Axes:
    """Draws the first components of features as colours: like colours are like features, in all pictures alike.

    Args:
        table: As `tables.vision.pca` gives it, with the columns red, green and blue.
        images: The picture; of a table of several images their pictures, in the order of the images' numbers. Of a
            table of several runs the images of the first run come first.
        ax: Where to draw; a new figure by default.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column is missing, or there are not as many pictures as images.
    """
    check(table, "image", *CHANNELS)
    pictures = [images] if isinstance(images, Picture) else list(images)
    which = ["source", "image"] if "source" in table else ["image"]
    own = [(numbers, part) for numbers, part in table.groupby(which, sort=True)]
    if len(pictures) != len(own):
        raise ValueError(
            f"There are {len(pictures)} pictures; the table is of {len(own)} images.\n"
            "Pass one picture for each, in the order of their numbers."
        )
    if len(own) == 1:
        return _colored(table, pictures[0], ax, global_tile, alpha)
    height, width = in_grey(pictures[0]).shape
    ax, axes = empty_panels(ax, len(own), best_columns(len(own), pictures[0]), height / width)
    for panel, (numbers, part), picture in zip(axes, own, pictures, strict=True):
        _colored(part, picture, panel, global_tile, alpha)
        bare(panel, ", ".join(f"{name} {number}" for name, number in zip(which, numbers, strict=True)))
        if panel.get_legend() is not None and panel is not axes[-1]:
            panel.get_legend().remove()  # the basis is one for all
    return ax


def segments(
    table: pd.DataFrame,
    image: Picture,
    *,
    ax: Axes | None = None,
    global_tile: bool = False,
    alpha: float | int = 0.6,
) -> Axes:
    """Draws groups of like features, each in a colour of its own; the largest has number 0.

    Args:
        table: As `tables.vision.segments` gives it, of one image.
        image: The picture.
        ax: Where to draw; a new figure by default.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column is missing or the cells do not fit the picture.
    """
    check(table, "segment")
    return overlay(table, image, "segment", ax=ax, global_tile=global_tile, alpha=alpha, kind="classes")


def similarity(
    table: pd.DataFrame,
    image: Picture,
    *,
    ax: Axes | None = None,
    global_tile: bool = False,
    alpha: float | int = 0.6,
) -> Axes:
    """Draws how like each feature is to that of a chosen place, which has a frame.

    Args:
        table: As `tables.vision.similarity` gives it, of one image.
        image: The picture.
        ax: Where to draw; a new figure by default.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column is missing or the cells do not fit the picture.
    """
    check(table, "cosine", "chosen")
    ax = overlay(table, image, "cosine", ax=ax, global_tile=global_tile, alpha=alpha)
    # The place may be in a tile of the other kind: its box is in the picture all the same.
    for box in boxes(table.loc[table["chosen"].to_numpy(dtype=bool), :]).T:
        frame(ax, tuple(box), color=style.ORANGE, linewidth=2.0)
    ax.set_title("likeness to the framed place", fontsize="medium")
    return ax


def norms(
    table: pd.DataFrame,
    image: Picture,
    *,
    ax: Axes | None = None,
    value: str = "norm",
    global_tile: bool = False,
    alpha: float | int = 0.6,
) -> Axes:
    """Draws the length of each feature; a cross marks one that is unlike the others, as registers are.

    Args:
        table: As `tables.vision.norms` gives it, of one image.
        image: The picture.
        ax: Where to draw; a new figure by default.
        value: "norm", or "score": how far from the median, with zero in the middle of the scale.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column is missing or the cells do not fit the picture.
    """
    check(table, "outlier", value)
    ax = overlay(table, image, value, ax=ax, global_tile=global_tile, alpha=alpha)
    height, width = in_grey(image).shape
    inside = table.loc[table["outlier"].to_numpy(dtype=bool) & _of_kind(table, global_tile), :]
    left, top, right, bottom = boxes(inside.loc[(inside["right"] > inside["left"]), :])
    for color, size, line in ((style.INK, 8.0, 3.4), ("white", 7.0, 1.6)):
        ax.plot((left + right) / 2, (top + bottom) / 2, "x", color=color, markersize=size, markeredgewidth=line)
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_title(f"{len(left)} unlike the others" if len(left) else "none unlike the others", fontsize="medium")
    return ax


def _of_kind(table: pd.DataFrame, global_tile: bool) -> np.ndarray:
    """Which lines are in the kind of tile that is drawn."""
    is_global = table["is_global"].to_numpy(dtype=bool)
    return np.full(len(table), True) if is_global.all() else is_global == global_tile


def _colored(table: pd.DataFrame, image: Picture, ax: Axes | None, global_tile: bool, alpha: float | int) -> Axes:
    """Cells in the colours that the table has for them."""
    ax, shown = on_picture(table, image, ax, global_tile)
    cells = add_cells(ax, shown, alpha)
    cells.set_facecolor([tuple(color) for color in shown[list(CHANNELS)].to_numpy(dtype=float).clip(0, 1)])
    tile_borders(ax, shown)
    explained = table.attrs.get("explained")
    if explained is not None:
        handles = [
            Line2D([], [], color=color, marker="s", linestyle="", label=f"component {number}: {share:.0%}")
            for number, (color, share) in enumerate(zip(CHANNELS, explained, strict=False), start=1)
        ]
        legend_beside(ax, handles, title="share of variance")
    return ax
