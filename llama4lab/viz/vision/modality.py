"""Where experts are chosen in a picture, and how far they split image from text."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.heat_map import draw_map, write_values
from llama4lab.viz.routing.panels import panels_in, shared_scale
from llama4lab.viz.vision.picture import Picture
from llama4lab.viz.vision.picture_panels import by_layer, painted_panels


def experts(
    table: pd.DataFrame,
    image: Picture,
    layers: Sequence[int] | None = None,
    *,
    ax: Axes | None = None,
    slot: int = 0,
    global_tile: bool = False,
    alpha: float | int = 0.7,
) -> Axes:
    """Draws the expert that each image token went to: a panel for each layer, with the experts' own colours.

    Args:
        table: As `tables.vision.experts` gives it, of one image.
        image: The picture.
        layers: The layers to draw, in this order; all by default.
        ax: Where to draw; a new figure by default.
        slot: Which of a token's choices, from 0.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column, layer or slot is missing, or the cells do not fit the picture.
    """
    check(table, "layer", "expert")
    own = style.only(table, "slot", slot) if "slot" in table else table
    panels = by_layer(own, layers)
    return painted_panels(panels, image, "expert", ax=ax, global_tile=global_tile, alpha=alpha)[0]


def modality_shares(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws which experts serve image and which text: a panel for each, layers upwards and experts to the right.

    Args:
        table: As `tables.vision.modality_shares` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if a column is missing or the table is empty.
    """
    check(table, "layer", "modality", "expert", "share")
    kinds = list(dict.fromkeys(table["modality"]))
    count, layers = len(np.unique(table["expert"])), len(np.unique(table["layer"]))
    wide, high = float(np.clip(0.38 * count, 2.4, 6.0)), float(np.clip(0.3 * layers, 1.6, 5.0))
    if ax is None:
        ax = plt.subplots(figsize=(1.6 + len(kinds) * wide, 0.9 + high), layout="constrained")[1]
    grid = panels_in(ax, 1, len(kinds))
    norm = Normalize(0.0, max(float(np.nanmax(table["share"])), 1e-9))
    for place, (panel, kind) in enumerate(zip(grid[0], kinds, strict=True)):
        own = style.only(table, "modality", kind)
        values = own.pivot(index="layer", columns="expert", values="share")
        idle = ~(values.to_numpy(dtype=float) > 0)
        picture = draw_map(panel, values, marked=idle, names=("layer", "expert"), cmap=style.SEQUENTIAL, norm=norm)
        write_values(panel, values.mask(idle).to_numpy(dtype=float), picture)
        panel.set_title(str(kind), fontsize="medium")
        if place:
            panel.set_ylabel("")
    shared_scale(ax, grid, ScalarMappable(norm, style.SEQUENTIAL), "share of tokens")
    return ax


def modality_information(table: pd.DataFrame, *, ax: Axes | None = None, value: str = "information") -> Axes:
    """Draws how much the chosen expert says about whether a token is of an image or of text: a bar for each layer.

    The line is what is there to say; the dots, what chance alone would give.

    Args:
        table: As `tables.vision.modality_information` gives it.
        ax: Where to draw; a new figure by default.
        value: "information" in nats, or "share_of_entropy", from 0 to 1.

    Raises:
        ValueError: if a column is missing or the table is empty.
    """
    check(table, "layer", value)
    own = table.sort_values("layer")
    place = np.arange(len(own))
    entropy = own["entropy"].to_numpy(dtype=float) if "entropy" in own else np.full(len(own), np.nan)
    scale = entropy if value == "share_of_entropy" else np.ones(len(own))
    ax = style.axes(ax, 2.8 + 0.45 * len(own), 3.0)
    ax.bar(place, own[value], 0.7, color=style.BLUE, label="of the expert")
    if np.isfinite(entropy).all():
        for x, top in zip(place, entropy / scale, strict=True):
            ax.plot([x - 0.42, x + 0.42], [top, top], color=style.INK, linewidth=1.4, label="_")
        ax.plot([], [], color=style.INK, linewidth=1.4, label="all there is")
    if "chance" in own and np.isfinite(scale).all():
        ax.plot(place, own["chance"] / scale, "o", color=style.ORANGE, markersize=5, label="by chance")
    ax.set_xticks(place, [str(layer) for layer in own["layer"]])
    label = "information (nats)" if value == "information" else value.replace("_", " ")
    ax.set(xlabel="layer", ylabel=label, ylim=(0, None))
    style.plain(ax)
    legend_beside(ax)
    return ax
