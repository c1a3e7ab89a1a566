"""How far one token reaches, drawn."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside

SHADES = {0: style.ORANGE, 1: style.BLUE, 2: "#5fa3d0", 3: "#b9d7ea"}
NOTHING = "0.93"
MOST_BORDERS = 150  # of one layer; more would be a grey area


def horizon(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws what one token can reach: layers upwards, positions to the right, what is reached in colour.

    Each layer shows the residual stream behind it; lighter blue was carried in more steps. Upright lines are the
    borders of chunks, where there are not too many; layers without RoPE are marked.

    Args:
        table: As `tables.attention.horizon` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no lines.
    """
    if table.empty:
        raise ValueError("The table has no lines; give what tables.attention.horizon gave.")
    layers, length = np.unique(table["layer"]), int(table["stop"].to_numpy().max())
    ax = style.axes(ax, 7.5, 0.9 + 0.3 * len(layers))
    table = table.assign(steps=table["hops"].fillna(-1).astype(int).clip(upper=max(SHADES)))
    for place, layer in enumerate(layers):
        own = style.only(table, "layer", layer)
        for start, stop, steps in zip(own["start"], own["stop"], own["steps"], strict=True):
            color = SHADES.get(int(steps), NOTHING)
            # A single token of a long text would be thinner than any pixel.
            width = max(stop - start, length / 250) if steps == 0 else stop - start
            ax.barh(place, width, 0.86, start - 0.5, color=color, linewidth=0, zorder=3 if steps == 0 else 2)
        size = own["chunk_size"].tolist()[0]
        if not pd.isna(size) and length / int(size) <= MOST_BORDERS:
            borders = np.arange(size, length, size) - 0.5
            ax.vlines(borders, place - 0.5, place + 0.5, color=style.LINE, linewidth=0.9, zorder=4)
    kinds = dict(zip(table["layer"], table["kind"], strict=True))
    labels = [f"NoPE  {layer}" if kinds[layer] == "nope" else str(layer) for layer in layers]
    ax.set_yticks(range(len(layers)), labels)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="position", ylabel="layer", xlim=(-0.5, length - 0.5), ylim=(-0.6, len(layers) - 0.4))
    ax.tick_params(axis="y", length=0)
    style.plain(ax, keep=("bottom",))
    _legend(ax, sorted(set(table["steps"])))
    return ax


def _legend(ax: Axes, steps: list[int]) -> None:
    names = {-1: "not reached", 0: "the token", 1: "reached in 1 step", 2: "in 2 steps", 3: "in 3 steps or more"}
    legend_beside(ax, [Patch(color=SHADES.get(step, NOTHING), label=names[step]) for step in steps if step in names])
