"""Plots of `llama4lab.run.routes.content`."""

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside

PARTS = {"route_effect": "route", "content_effect": "content", "interaction": "interaction"}
COLORS = {"route_effect": style.ORANGE, "content_effect": style.BLUE, "interaction": style.GREY}


def effects(
    table: pd.DataFrame, *, ax: Axes | None = None, share: bool = False, spread: Literal["std", "none"] = "std"
) -> Axes:
    """Draws the effect of each layer in its parts: a bar each for route, content and interaction, a line for the total.

    The three bars of a layer add up to its total.

    Args:
        table: As `route_and_content` gives it, of one position and, with rows, of one row.
        ax: Where to draw; a new figure by default.
        share: Whether effects are shares of the way from the base run to the source run, not units of the metric.
        spread: "std" for a thin line one standard deviation up and down, where the table has several rows.

    Raises:
        ValueError: if the table has several positions or rows, or a share is one of no difference.
    """
    for column in ("position", "row"):
        if column in table:
            style.only_one(table, column)
    if share and bool((table["source"] == table["none"]).any()):
        raise ValueError("Shares of the way to the source run were asked for, but there is no difference to it.")
    unit = (table["source"] - table["none"]).to_numpy() if share else np.ones(len(table))
    layers = table["layer"].tolist()
    ax = style.axes(ax, 2.6 + 0.6 * len(layers), 3.2)
    place, width = np.arange(len(layers)), 0.27
    several = spread == "std" and "pairs" in table and bool((table["pairs"] > 1).any())
    for index, (column, label) in enumerate(PARTS.items()):
        error = np.abs(table[f"{column}_std"].to_numpy() / unit) if several else None
        ax.bar(
            place + (index - 1) * width,
            table[column].to_numpy() / unit,
            width=0.92 * width,
            color=COLORS[column],
            yerr=error,
            error_kw={"elinewidth": 0.8, "ecolor": style.INK},
            label=label,
        )
    total = table["total_effect"].to_numpy() / unit
    ax.hlines(total, place - 0.42, place + 0.42, color=style.INK, linewidth=1.8, label="total")
    ax.axhline(0, color=style.INK, linewidth=0.8)
    effect = f"effect on the {table.attrs.get('metric', 'metric')}"
    step = next((step for step in (1, 2, 4, 8) if len(layers) / step <= 40), 16)
    ax.set_xticks(place[::step], [str(layer) for layer in layers[::step]])
    ax.set(xlabel="layer", ylabel="share of the way to the source run" if share else effect)
    ax.margins(x=0.01)
    style.plain(ax, keep=("left",))
    ax.tick_params(axis="x", length=0)
    legend_beside(ax)
    return ax
