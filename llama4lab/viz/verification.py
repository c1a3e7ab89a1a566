"""Plots of what `lab.verify` finds: how far models are from their reference, layer by layer."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check

LABELS = {
    "relative_error": "relative error of the residual stream",
    "largest_relative_error": "relative error of the worst token",
    "max_abs_difference": "largest difference of a number",
}


def parity(tables: Mapping[str, pd.DataFrame], *, ax: Axes | None = None, value: str = "relative_error") -> Axes:
    """Draws how the distance from a reference grows from layer to layer: a line for each model.

    Args:
        tables: Name of a model -> its `Verification.parity`.
        ax: Where to draw; a new figure by default.
        value: "relative_error" (mean over tokens), "largest_relative_error" or "max_abs_difference".

    Raises:
        ValueError: if there is no table, or a column is missing.
    """
    if not tables:
        raise ValueError("No table was given; give name -> `lab.verify(model, reference=...).parity`.")
    ax = style.axes(ax, 5.8, 3.4)
    for number, (name, table) in enumerate(tables.items()):
        check(table, "layer", value)
        own = table.loc[table["layer"].notna(), :]
        x, y = own["layer"].to_numpy(dtype=int), own[value].to_numpy(dtype=float)
        # What is equal has no place on a scale of logarithms.
        y = np.where(y > 0, y, np.nan)
        marker = style.MARKERS[number % len(style.MARKERS)]
        ax.plot(x, y, color=tuple(expert_color(number)), marker=marker, markersize=4.5, label=str(name))
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="layer", ylabel=LABELS.get(value, value.replace("_", " ")))
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    legend_beside(ax)
    return ax
