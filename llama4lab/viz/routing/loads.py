"""How the experts are loaded."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.heat_map import draw_map

BALANCE = {
    "gini": "Gini coefficient (0: even)",
    "entropy": "entropy (1: even)",
    "max_violation": "largest load / mean − 1",
    "cv2": "squared variation of loads",
    "dead": "experts without a token",
    "coverage_50": "experts with half of the tokens",
    "balancedness": "mean load / largest, over devices",
    "utilization": "use of the devices",
}
SHARES = ("gini", "entropy", "balancedness", "utilization")
LOAD_COLUMNS = ("layer", "expert", "tokens", "expert_load", "uniform")


def expert_load(table: pd.DataFrame, *, ax: Axes | None = None, layer: int | None = None) -> Axes:
    """Draws how the experts are loaded: a map of layers and experts, or the bars of one layer.

    In the map, × marks an expert without any token, where there is room, and the scale has a line at the share that
    all experts would have
    if they had the same; among the bars that share is a dashed line. A table counted `by` something has one bar for
    each group; for a map, choose one group.

    Args:
        table: As `tables.routing.expert_load` gives it.
        ax: Where to draw; a new figure by default.
        layer: Layer whose bars to draw; None for the map.

    Raises:
        ValueError: if the table has no such layer, or several groups where a map is to be drawn.
    """
    check(table, *LOAD_COLUMNS)
    group = next((column for column in table if column not in LOAD_COLUMNS), None)
    if layer is None:
        if group is not None:
            style.only_one(table, str(group))
        return _load_map(table, ax)
    own = style.only(table, "layer", layer)
    return _load_bars(own, ax, layer, None if group is None else str(group))


def balance(
    table: pd.DataFrame, measures: str | Sequence[str] = ("gini", "entropy"), *, ax: Axes | None = None
) -> Axes:
    """Draws how even the load is in each layer: a line for each measure, or for each group of one measure.

    Args:
        table: As `tables.routing.balance` gives it.
        measures: What is drawn, measures on one scale: "gini" and "entropy" go from 0 to 1, others have units of their
            own and are better drawn alone: "max_violation", "cv2", "dead", "coverage_50", "balancedness",
            "utilization". A table with several groups takes one measure.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no such measure, or several measures of several groups are asked for.
    """
    chosen = [measures] if isinstance(measures, str) else list(measures)
    check(table, "layer", *chosen)
    group = next((str(column) for column in table if column not in (*BALANCE, "layer", "tokens")), None)
    names = list(dict.fromkeys(table[group])) if group else [None]
    if len(names) > 1 and len(chosen) > 1:
        raise ValueError(f"{len(chosen)} measures of {len(names)} groups were to be drawn; choose one measure.")
    layers = np.unique(table["layer"])
    ax = style.axes(ax, 3.2 + 0.2 * len(layers), 3.0)
    number = 0
    for name in names:
        own = (table if name is None else style.only(table, str(group), name)).sort_values("layer")
        for measure in chosen:
            label = BALANCE.get(measure, measure) if len(chosen) > 1 else str(name)
            color = tuple(expert_colors(np.array(number)))
            ax.plot(own["layer"], own[measure], color=color, marker="o", markersize=3.5, label=label)
            number += 1
    style.number_ticks(ax.xaxis, layers, layers, room=style.cell_size(ax, len(layers), 1)[0] / 17)
    ax.set(xlabel="layer", ylabel="balance of the load" if len(chosen) > 1 else BALANCE.get(chosen[0], chosen[0]))
    if all(measure in SHARES for measure in chosen):
        ax.set_ylim(-0.02, 1.02)
    else:
        ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    if number > 1:
        legend_beside(ax, title=group if len(chosen) == 1 else None)
    return ax


def _load_map(table: pd.DataFrame, ax: Axes | None) -> Axes:
    shares = table.pivot(index="layer", columns="expert", values="expert_load")
    room = 0.28 if len(shares.columns) <= 32 else 0.11
    ax = style.axes(ax, 2.2 + room * len(shares.columns), max(2.6, 1.2 + room * len(shares)))
    look = {"cmap": style.SEQUENTIAL, "vmin": 0, "vmax": max(float(np.nanmax(shares.to_numpy(dtype=float))), 1e-9)}
    picture = draw_map(ax, shares, marked=shares.to_numpy() == 0, names=("layer", "expert"), **look)
    bar = style.color_bar(ax, picture, "share of the layer's tokens\n(red line: uniform)")
    bar.ax.axhline(table["uniform"].iloc[0], color=style.LINE, linewidth=2.0)
    return ax


def _load_bars(own: pd.DataFrame, ax: Axes | None, layer: int, group: str | None) -> Axes:
    experts = np.unique(own["expert"])
    ax = style.axes(ax, 1.5 + (0.3 if len(experts) <= 32 else 0.1) * len(experts), 3.2)
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
