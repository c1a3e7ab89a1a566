"""Which parts of a picture an answer depends on: grey boxes, patched places, and other maps beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.patching import measure_label, wrapped
from llama4lab.viz.routing.checking import check
from llama4lab.viz.vision.cells import frame
from llama4lab.viz.vision.looks import look_of
from llama4lab.viz.vision.overlays import on_picture, overlay, paint
from llama4lab.viz.vision.picture import GROUND, Picture, in_grey
from llama4lab.viz.vision.picture_panels import bare, best_columns, by_layer, empty_panels, painted_panels

MEASURES = ("normalised", "effect", "weight", "prob", "cosine", "norm")
Box = tuple[float | int, float | int, float | int, float | int]


def occlusion(
    table: pd.DataFrame, image: Picture, *, ax: Axes | None = None, value: str = "effect", alpha: float | int = 0.75
) -> Axes:
    """Draws what hiding each part of a picture did: at the middle of each hidden box a cell as wide as a step.

    Args:
        table: As `tables.vision.occlusion` gives it, of one image.
        image: The picture.
        ax: Where to draw; a new figure by default.
        value: The measure: "effect" or "patched".
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column is missing or the boxes do not fit the picture.
    """
    check(table, "left", "top", "right", "bottom", value)
    return overlay(narrowed(table, image), image, value, ax=ax, alpha=alpha)


def sweep_places(
    table: pd.DataFrame,
    image: Picture,
    layers: Sequence[int] | None = None,
    *,
    ax: Axes | None = None,
    value: str = "normalised",
    global_tile: bool = False,
    alpha: float | int = 0.75,
) -> Axes:
    """Draws what patching each place of a picture did: a panel for each layer, with one scale.

    Args:
        table: As `tables.vision.sweep_places` gives it, of one image.
        image: The picture.
        layers: The layers to draw, in this order; all by default.
        ax: Where to draw; a new figure by default.
        value: "normalised", "effect" or "patched".
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column or layer is missing, or the cells do not fit the picture.
    """
    check(table, value)
    if "layer" not in table:
        return overlay(table, image, value, ax=ax, global_tile=global_tile, alpha=alpha)
    panels = by_layer(table, layers)
    return painted_panels(panels, image, value, ax=ax, global_tile=global_tile, alpha=alpha)[0]


def side_by_side(
    tables: Mapping[str, pd.DataFrame],
    image: Picture,
    *,
    ax: Axes | None = None,
    box: Box | None = None,
    global_tile: bool = False,
    alpha: float | int = 0.75,
) -> Axes:
    """Draws several maps of one picture beside each other, each with a scale of its own: rollout beside occlusion.

    Of each table the first of the columns normalised, effect, weight, prob, cosine and norm is drawn.

    Args:
        tables: For each title a table with one line for each place.
        image: The picture.
        ax: Where to draw; a new figure by default.
        box: Left, top, right and bottom of a part of the picture that gets a frame in every map, such as the shape that
            was asked for.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if there is no table, or one has nothing that can be drawn.
    """
    if not tables:
        raise ValueError("There is nothing to draw: no table was given.")
    height, width = in_grey(image).shape
    ax, axes = empty_panels(ax, len(tables), best_columns(len(tables), image), height / width, wide=3.2)
    for panel, (title, table) in zip(axes, tables.items(), strict=True):
        value = next(
            (name for name in MEASURES if name in table and np.isfinite(table[name].to_numpy(dtype=float)).any()), None
        )
        if value is None:
            raise ValueError(f"The map {title!r} has none of the columns {', '.join(MEASURES)}.")
        own = table if "tile" in table else narrowed(table, image)
        _, shown = on_picture(own, image, panel, global_tile)
        look = look_of(shown, value)
        cells = paint(panel, shown, look, alpha)
        bare(panel, title)
        style.color_bar(panel, cells, look.label).ax.set_facecolor(GROUND)
        if box is not None:
            frame(panel, box, color=style.LINE)
    return ax


def narrowed(table: pd.DataFrame, image: Picture) -> pd.DataFrame:
    """Gives boxes that slide over a picture as cells that touch: half a step to each side of the middle of its box."""
    height, width = in_grey(image).shape
    cells = table.copy()
    for low, high, end in (("left", "right", width), ("top", "bottom", height)):
        middles = (table[low].to_numpy(dtype=float) + table[high].to_numpy(dtype=float)) / 2
        places, own = np.unique(middles, return_inverse=True)
        edges = np.concatenate([[0.0], (places[1:] + places[:-1]) / 2, [float(end)]])
        cells[low], cells[high] = edges[own], edges[own + 1]
    return cells


def region_effects(table: pd.DataFrame, *, ax: Axes | None = None, value: str = "normalised") -> Axes:
    """Draws through which hook points a region works: a line for each region, along the road from pixel to answer.

    Args:
        table: As `tables.vision.region_effects` gives it.
        ax: Where to draw; a new figure by default.
        value: "normalised", "effect" or "patched".

    Raises:
        ValueError: if a column is missing or the table is empty.
    """
    check(table, "region", "hook_point", value)
    places = list(dict.fromkeys(table["hook_point"]))
    kinds = {place.rpartition(".")[2] for place in places if "layers." in place}
    ax = style.axes(ax, 3.2 + 0.34 * len(places), 3.6)
    for number, (region, own) in enumerate(table.groupby("region", sort=False)):
        line = own.set_index("hook_point")[value].reindex(places)
        look: dict[str, Any] = {"color": expert_color(number), "marker": style.MARKERS[number % len(style.MARKERS)]}
        ax.plot(range(len(places)), line, markersize=5, label=str(region), **look)
    ax.set_xticks(range(len(places)), [_short(place, len(kinds) > 1) for place in places], rotation=90)
    if value != "patched":
        ax.axhline(0.0, color=style.INK, linewidth=0.8, zorder=0)
    if value == "normalised":
        ax.axhline(1.0, color=style.INK, linewidth=0.8, linestyle=":", zorder=0)
    where = f"hook point ({kinds.pop()})" if len(kinds) == 1 else "hook point"
    ax.set(xlabel=where, ylabel=wrapped(measure_label(table, value)))
    style.plain(ax)
    legend_beside(ax)
    return ax


def _short(hook_point: str, kinds: bool) -> str:
    """A hook point's name for an axis: `vision 3`, with its kind `layer 5 z`; outside layers the name itself."""
    start, layers, rest = hook_point.partition("layers.")
    if not layers:
        return hook_point.removeprefix("vision_model.")
    layer, _, kind = rest.partition(".")
    return f"{'vision' if start else 'layer'} {layer}" + (f" {kind.rpartition('.')[2]}" if kinds else "")
