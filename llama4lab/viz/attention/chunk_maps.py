"""Plots of attention from chunk to chunk."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from llama4lab.viz import style
from llama4lab.viz.attention.patterns import KINDS
from llama4lab.viz.routing.heat_map import write_values


def chunk_map(table: pd.DataFrame, *, layer: int, head: int | None = None, ax: Axes | None = None) -> Axes:
    """Draws the attention of a layer from chunk to chunk: queries downwards, keys to the right.

    The scale goes from 0 to 1 by square roots, because far chunks get little each.
    A RoPE layer has nothing beside the diagonal. What a NoPE layer has there comes from before the chunk.

    Args:
        table: As `tables.attention.chunk_map` gives it.
        layer: The layer.
        head: The head; the mean over all heads by default.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table does not have the layer or the head.
    """
    own = style.only(table, "layer", layer)
    own = own if head is None else style.only(own, "head", head)
    kind = KINDS[str(style.only_one(own, "kind"))]
    mass = own.pivot_table(index="query_chunk", columns="key_chunk", values="mass", aggfunc="mean")
    side = 0.42 * len(mass)
    ax = style.axes(ax, min(2.4 + side, 8.0), min(1.6 + side, 7.0))
    values = mass.to_numpy(dtype=float)
    picture = ax.imshow(
        values, aspect="auto", interpolation="nearest", cmap=style.SEQUENTIAL, norm=PowerNorm(0.5, 0, 1)
    )
    # A line where the future begins: white above it is no attention of 0.
    edge = np.arange(len(mass) + 1) - 0.5
    ax.step(edge, np.append(edge[:-1], edge[-2]), where="post", color=style.GREY, linewidth=0.8)
    width, height = style.cell_size(ax, *values.shape[::-1])
    style.number_ticks(ax.xaxis, np.arange(values.shape[1]), mass.columns.to_numpy(), room=width / 16)
    style.number_ticks(ax.yaxis, np.arange(len(values)), mass.index.to_numpy(), room=height / 11)
    write_values(ax, values, picture)
    found = np.unique(own["head"])
    heads = f"head {found[0]}" if len(found) == 1 else f"mean of {len(found)} heads"
    ax.set(xlabel="chunk of the key", ylabel="chunk of the query", title=f"layer {layer} ({kind}), {heads}")
    style.plain(ax)
    style.color_bar(ax, picture, "attention")
    return ax
