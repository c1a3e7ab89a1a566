"""How the experts are loaded."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import legend_beside

LOAD_COLUMNS = ("layer", "expert", "tokens", "expert_load", "uniform")


def expert_load(table: pd.DataFrame, *, ax: Axes | None = None, layer: int | None = None) -> Axes:
    """Draws how the experts are loaded: a map of layers and experts, or the bars of one layer.

    In the map, × marks an expert without any token, and the scale has a line at the share that all experts would have
    if they had the same; among the bars that share is a dashed line. A table counted `by` something has one bar for
    each group; for a map, choose one group.

    Args:
        table: As `tables.routing.expert_load` gives it.
        ax: Where to draw; a new figure by default.
        layer: Layer whose bars to draw; None for the map.

    Raises:
        ValueError: if the table has no such layer, or several groups where a map is to be drawn.
    """
    group = next((column for column in table if column not in LOAD_COLUMNS), None)
    if layer is None:
        if group is not None:
            style.only_one(table, str(group))
        return _load_map(table, ax)
    own = style.only(table, "layer", layer)
    return _load_bars(own, ax, layer, None if group is None else str(group))


def _load_map(table: pd.DataFrame, ax: Axes | None) -> Axes:
    shares = table.pivot(index="layer", columns="expert", values="expert_load")
    ax = style.axes(ax, 2.2 + 0.28 * len(shares.columns), max(2.6, 1.2 + 0.28 * len(shares)))
    picture = ax.imshow(shares, aspect="auto", origin="lower", interpolation="nearest", cmap=style.SEQUENTIAL, vmin=0)
    width, height = style.cell_size(ax, len(shares.columns), len(shares))
    for y, x in np.argwhere(shares.to_numpy() == 0):
        ax.text(x, y, "×", ha="center", va="center", fontsize=min(9.0, width, height), color=style.GREY)
    style.number_ticks(ax.yaxis, np.arange(len(shares)), shares.index.to_numpy(), room=height / 11)
    style.number_ticks(ax.xaxis, np.arange(len(shares.columns)), shares.columns.to_numpy(), room=width / 17)
    ax.set(xlabel="expert", ylabel="layer")
    style.plain(ax)
    bar = style.color_bar(ax, picture, "share of the layer's tokens\n(red line: uniform)")
    bar.ax.axhline(table["uniform"].iloc[0], color=style.LINE, linewidth=2.0)
    return ax


def _load_bars(own: pd.DataFrame, ax: Axes | None, layer: int, group: str | None) -> Axes:
    experts = np.unique(own["expert"])
    ax = style.axes(ax, 1.5 + 0.3 * len(experts), 3.2)
    if group is None:
        own = own.sort_values("expert")
        ax.bar(own["expert"], own["expert_load"], width=0.8, color=expert_colors(experts))
    else:
        names = sorted(own[group].unique())
        width = 0.84 / len(names)
        for index, name in enumerate(names):
            bars = style.only(own, group, name).sort_values("expert")
            shade = style.SEQUENTIAL(0.3 + 0.6 * index / max(len(names) - 1, 1))
            offset = (index - (len(names) - 1) / 2) * width
            ax.bar(bars["expert"] + offset, bars["expert_load"], width=width, color=shade, label=str(name))
    uniform = ax.axhline(own["uniform"].iloc[0], color=style.INK, linestyle="--", linewidth=1.0, label="uniform")
    ax.margins(x=0.02)
    room = style.cell_size(ax, len(experts), 1)[0] / 17
    style.number_ticks(ax.xaxis, experts, experts, room)
    ax.set(xlabel="expert", ylabel="share of the layer's tokens", title=f"layer {layer}")
    style.plain(ax)
    legend_beside(ax, [*(ax.containers if group else []), uniform], title=group)
    return ax
