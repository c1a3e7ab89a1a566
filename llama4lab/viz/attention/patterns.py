"""Plots of `llama4lab.tables.attention`."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.token_axis import label_tokens

KINDS = {"rope": "RoPE", "nope": "NoPE"}


def pattern(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws the attention of one head: queries downwards, keys to the right, on a scale from 0 to 1.

    Squares are the chunks, if there are several. In a RoPE layer a query sees only keys inside its square; in a NoPE
    layer the squares are dotted, because it sees past them.

    Args:
        table: As `tables.attention.pattern` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has several layers, heads or rows.
    """
    layer, head, kind = (style.only_one(table, column) for column in ("layer", "head", "kind"))
    style.only_one(table, "row")
    weights = table.pivot(index="query", columns="key", values="weight")
    queries, keys = (table.drop_duplicates(of).sort_values(of).reset_index(drop=True) for of in ("query", "key"))
    side = 0.19 * len(keys)
    ax = style.axes(ax, min(2.4 + side, 9.0), min(1.6 + side * len(queries) / len(keys), 8.0))
    picture = ax.imshow(weights, aspect="auto", interpolation="nearest", cmap=style.SEQUENTIAL, vmin=0, vmax=1)
    chunks = np.intersect1d(queries["query_chunk"], keys["key_chunk"])
    several = len(np.unique(keys["key_chunk"])) > 1
    for chunk in chunks if several else ():
        rows, columns = (np.flatnonzero(side == chunk) for side in (queries["query_chunk"], keys["key_chunk"]))
        square = (columns[0] - 0.5, rows[0] - 0.5), len(columns), len(rows)
        line = ":" if kind == "nope" else "-"
        ax.add_patch(Rectangle(*square, fill=False, edgecolor=style.LINE, linewidth=1.2, linestyle=line))
    width, height = style.cell_size(ax, len(keys), len(queries))
    label_tokens(ax, keys["key_token"].tolist(), keys["key"].tolist(), width)
    label_tokens(ax, queries["query_token"].tolist(), queries["query"].tolist(), height, axis="y")
    ax.set(xlabel="key", ylabel="query", title=f"layer {layer} ({KINDS[str(kind)]}), head {head}")
    style.plain(ax)
    style.color_bar(ax, picture, "attention")
    return ax


def mass(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how much attention each layer spends inside the chunk of the query and how much before it.

    Each layer has one thin bar for each head, from head 0 on the left. NoPE layers are marked.

    Args:
        table: As `tables.attention.mass` gives it.
        ax: Where to draw; a new figure by default.
    """
    layers, heads = np.unique(table["layer"]), np.unique(table["head"])
    ax = style.axes(ax, 2.2 + len(layers) * max(0.45, 0.07 * len(heads)), 3.2)
    width = 0.86 / len(heads)
    place = np.searchsorted(layers, table["layer"]) + (np.searchsorted(heads, table["head"]) + 0.5) * width - 0.43
    gap = 0.9 if len(heads) <= 16 else 1.0
    ax.bar(place, table["own_chunk"], width=gap * width, color="#9cc3de", label="own chunk")
    ax.bar(
        place, table["earlier"], bottom=table["own_chunk"], width=gap * width, color=style.BLUE, label="earlier chunks"
    )
    kinds = dict(zip(table["layer"], table["kind"], strict=True))
    labels = [f"{layer}\nNoPE" if kinds[layer] == "nope" else str(layer) for layer in layers]
    ax.set_xticks(range(len(layers)), labels)
    ax.set(xlabel="layer", ylabel="attention (mean over tokens)", ylim=(0, 1))
    ax.margins(x=0.01)
    style.plain(ax)
    legend_beside(ax, ax.containers[::-1])
    return ax
