"""How much NoPE layers sharpen attention at far positions."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside

DASHES = ("-", "--", ":", "-.")


def temperature(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws the factor on the scores of layers by position, in steps; layers of one curve are one line.

    Args:
        table: As `tables.attention.temperature` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table is empty.
    """
    if table.empty:
        raise ValueError("There is nothing to draw: the table has no layer with a temperature.")
    curves: dict[tuple, list[int]] = {}
    for layer, own in table.sort_values("position").groupby("layer"):
        curve = (tuple(own["position"]), tuple(own["temperature"]))
        curves.setdefault(curve, []).append(int(layer))  # pyright: ignore[reportArgumentType]
    ax = style.axes(ax, 6.2, 3.0)
    for number, ((positions, factors), layers) in enumerate(curves.items()):
        names = ", ".join(map(str, layers)) if len(layers) <= 4 else f"{layers[0]}, {layers[1]}, … {layers[-1]}"
        color = style.BLUE if number % 2 == 0 else style.ORANGE
        ax.plot(
            np.array(positions),
            np.array(factors),
            drawstyle="steps-post",
            color=color,
            linestyle=DASHES[number // 2 % 4],
            marker="o" if len(positions) == 1 else None,
            label=f"layer {names}" if len(layers) == 1 else f"layers {names}",
        )
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set(xlabel="position", ylabel="factor on scores")
    style.plain(ax)
    legend_beside(ax)
    return ax
