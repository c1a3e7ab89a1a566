"""What experts write: how much of it, and what it does to a logit."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.logit_attribution import measure
from llama4lab.viz.routing.checking import check
from llama4lab.viz.token_axis import token_label

NORMS = {"routed_norm": "routed experts", "shared_norm": "shared expert", "attention_norm": "attention"}
COLORS = {"routed_norm": style.ORANGE, "shared_norm": "#7a5195", "attention_norm": style.BLUE}


def contributions(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how much each part of a layer writes: lines are medians over tokens, bands the middle half of them.

    Args:
        table: As `tables.routing.contributions` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no line, or no norms.
    """
    shown = [name for name in NORMS if name in table and bool(table[name].notna().any())]
    check(table, "layer", *(shown or ["routed_norm"]))
    layers = np.unique(table["layer"])
    ax = style.axes(ax, 3.4 + 0.2 * len(layers), 3.0)
    for name in shown:
        groups = table.groupby("layer")[name]
        low, high = (groups.quantile(share).to_numpy(dtype=float) for share in (0.25, 0.75))
        ax.fill_between(layers, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
        ax.plot(layers, groups.median(), color=COLORS[name], marker="o", markersize=3.5, label=NORMS[name])
    style.number_ticks(ax.xaxis, layers, layers, room=style.cell_size(ax, len(layers), 1)[0] / 17)
    ax.set(xlabel="layer", ylabel="norm of what is written (median)")
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    legend_beside(ax)
    return ax


def expert_attribution(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws what the experts of each layer add to a logit at one position: routed bars left, shared bars right.

    Routed bars have the colours and the numbers of the experts, shared ones are grey.

    Args:
        table: As `tables.routing.expert_attribution` gives it, of one row and position.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has several rows or positions.
    """
    check(table, "row", "position", "layer", "kind", "expert", "contribution")
    for column in ("row", "position"):
        style.only_one(table, column)
    layers = np.unique(table["layer"])
    routed, shared = (table.loc[table["kind"] == kind, :] for kind in ("routed", "shared"))
    ax = style.axes(ax, 3.0 + 0.42 * len(layers), 3.2)
    slot = routed.groupby("layer").cumcount().to_numpy()
    slots = int(slot.max(initial=0)) + 1
    width = 0.84 / (slots + 1)
    numbers = routed["expert"].to_numpy(dtype=int)
    x = np.searchsorted(layers, routed["layer"]) - 0.42 + (slot + 0.5) * width
    heights = routed["contribution"].to_numpy(dtype=float)
    ax.bar(x, heights, width, color=expert_colors(numbers))
    ax.bar(np.searchsorted(layers, shared["layer"]) + 0.42 - 0.5 * width, shared["contribution"], width, color="0.7")
    room = style.cell_size(ax, len(layers), 1)[0] * width
    size = min(8.0, 1.5 * room / len(str(numbers.max(initial=0))))
    for left, height, number in zip(x, heights, numbers, strict=True) if size >= 5.0 else ():
        up = height >= 0
        offset = (0, 2 if up else -2)
        ax.annotate(
            str(number), (left, height), offset, textcoords="offset points",
            ha="center", va="bottom" if up else "top", fontsize=size,
        )  # fmt: skip
    ax.axhline(0, color=style.INK, linewidth=0.8)
    style.number_ticks(ax.xaxis, np.arange(len(layers)), layers, room=style.cell_size(ax, len(layers), 1)[0] / 17)
    line = table.iloc[0]
    if "token" in table:
        ax.set_title(f"{token_label(line['token'])} at position {line['position']}", fontsize="medium")
    ax.set(xlabel="layer", ylabel=f"contribution to {measure(table)}", xlim=(-0.6, len(layers) - 0.4))
    ax.margins(y=0.1)
    style.plain(ax, keep=("left",))
    ax.tick_params(axis="x", length=0)
    colors = (tuple(expert_colors(numbers[:1])[0]) if len(numbers) else style.ORANGE, "0.7")
    names = ("routed (by expert)", "shared expert")
    legend_beside(ax, [Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)])
    return ax
