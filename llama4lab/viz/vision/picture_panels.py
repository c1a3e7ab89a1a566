"""Several overlays of one picture side by side, with one scale."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.panels import panels_in, shared_scale
from llama4lab.viz.vision.looks import look_of
from llama4lab.viz.vision.overlays import on_picture, paint
from llama4lab.viz.vision.picture import GROUND, Picture, in_grey

MOST_COLUMNS = 8
Panel = tuple[str, pd.DataFrame]


def best_columns(count: int, image: Picture) -> int:
    """Gives how many panels stand beside each other, so that all together are about as wide as two pages are high."""
    height, width = in_grey(image).shape
    ideal = (2.0 * count * height / width) ** 0.5
    near = [
        columns for columns in range(1, min(count, MOST_COLUMNS) + 1) if abs(columns - ideal) <= max(1.5, 0.3 * ideal)
    ]
    # Full rows rather than the best proportions.
    return min(near or [min(count, MOST_COLUMNS)], key=lambda columns: (-count % columns, abs(columns - ideal)))


def empty_panels(
    ax: Axes | None, count: int, columns: int, aspect: float, wide: float | None = None
) -> tuple[Axes, np.ndarray]:
    """Makes room for panels, `aspect` times as high as wide, in the place of an axes or in a new figure.

    Args:
        ax: Where to draw; None for a new figure.
        count: How many panels.
        columns: How many beside each other.
        aspect: Their height as a share of their width.
        wide: Their width in inches in a new figure; by default what fits a page.

    Returns:
        The frame, which is not seen, and as many panels as were wanted.
    """
    rows = -(-count // columns)
    wide = float(np.clip(11.0 / columns, 1.5, 3.4)) if wide is None else wide
    if ax is None:
        size = 1.0 + columns * (wide + 0.1), rows * (wide * aspect + 0.27) + 0.1
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    grid = panels_in(ax, rows, columns)
    for unused in grid.flat[count:]:
        unused.set_axis_off()
    return ax, grid.ravel()[:count]


def painted_panels(
    panels: Sequence[Panel],
    image: Picture,
    value: str,
    *,
    ax: Axes | None,
    columns: int | None = None,
    global_tile: bool = False,
    alpha: float | int = 0.6,
    label: str | None = None,
) -> tuple[Axes, np.ndarray]:
    """Draws an overlay for each table, under its title; all have one scale, with its label.

    Returns:
        The frame, which is not seen, and the panels.

    Raises:
        ValueError: if there is no panel, or one cannot be drawn; see `overlay`.
    """
    if not panels:
        raise ValueError("There is nothing to draw: the table has no line.")
    columns = best_columns(len(panels), image) if columns is None else columns
    height, width = in_grey(image).shape
    ax, axes = empty_panels(ax, len(panels), columns, height / width)
    shown = [on_picture(own, image, panel, global_tile)[1] for panel, (_, own) in zip(axes, panels, strict=True)]
    look = look_of(pd.concat(shown), value)
    cells = [paint(panel, own, look, alpha) for panel, own in zip(axes, shown, strict=True)]
    for panel, (title, _) in zip(axes, panels, strict=True):
        bare(panel, title)
    if look.norm is not None:
        shared_scale(ax, axes, cells[0], label or look.label).ax.set_facecolor(GROUND)
    else:
        patches = look.patches(pd.concat(shown)[value])
        legend_beside(axes[min(columns, len(axes)) - 1], patches, title=look.label)
    return ax, axes


def bare(panel: Axes, title: str) -> None:
    """Takes ticks and frame from a small picture, and writes a title above it."""
    panel.set(xticks=[], yticks=[], xlabel="", ylabel="")
    panel.set_title(title, fontsize="small", pad=3)
    style.plain(panel, keep=())


def by_layer(table: pd.DataFrame, layers: Sequence[int] | None = None) -> list[Panel]:
    """Gives the lines of each layer, under its name; layer -1 is what enters the first one.

    Raises:
        ValueError: if the table lacks one of the layers that are asked for.
    """
    wanted = np.unique(table["layer"]).tolist() if layers is None else list(layers)
    return [(layer_name(layer), style.only(table, "layer", layer)) for layer in wanted]


def layer_name(layer: int) -> str:
    """The name of a layer; -1 is what enters the first one."""
    return "input" if layer == -1 else f"layer {layer}"
