"""Whether two runs choose the same experts."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check


def saturation(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how many choices two runs have in common, layer by layer, and how many they would have by chance.

    Args:
        table: As `tables.routing.saturation` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no line.
    """
    check(table, "layer", "agreement", "chance")
    own = table.sort_values("layer")
    ax = style.axes(ax, 3.0 + 0.2 * len(own), 2.8)
    ax.plot(own["layer"], own["agreement"], color=style.BLUE, marker="o", markersize=3.5, label="agreement")
    ax.plot(own["layer"], own["chance"], color=style.GREY, linestyle="--", marker=".", markersize=3.5, label="chance")
    layers = own["layer"].to_numpy()
    style.number_ticks(ax.xaxis, layers, layers, room=style.cell_size(ax, len(own), 1)[0] / 17)
    ax.set(xlabel="layer", ylabel="share of common choices", ylim=(-0.02, 1.02))
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    legend_beside(ax)
    return ax


def drift(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how many choices two runs have in common, by how sure the router was: a line for each layer.

    Later layers are darker. A dot is larger the more tokens it stands for.

    Args:
        table: As `tables.routing.drift` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no line.
    """
    check(table, "layer", "margin", "tokens", "agreement")
    layers = np.unique(table["layer"])
    ax = style.axes(ax, 5.2, 3.4)
    most = float(table["tokens"].to_numpy().max())
    for number, layer in enumerate(layers):
        own = style.only(table, "layer", layer).sort_values("margin")
        color = tuple(style.SEQUENTIAL(0.3 + 0.7 * number / max(len(layers) - 1, 1)))
        x, y = own["margin"].to_numpy(dtype=float), own["agreement"].to_numpy(dtype=float)
        ax.plot(x, y, color=color, linewidth=1.2, label=str(layer))
        ax.scatter(x, y, 6 + 44 * own["tokens"] / most, color=color, linewidth=0)
    # Where runs differ only by rounding, all that happens is at the smallest margins.
    ax.set_xscale("log", nonpositive="clip")
    ax.set(xlabel="margin of the choice (router logits)", ylabel="share of common choices")
    ax.set_ylim(top=1 + 0.04 * (1 - min(ax.get_ylim()[0], 0.99)))
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    step = -(-len(layers) // 12)
    legend_beside(ax, ax.lines[::step], title="layer")
    return ax
