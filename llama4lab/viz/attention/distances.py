"""Plots of how far back attention goes."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from llama4lab.viz import style
from llama4lab.viz.attention.patterns import KINDS
from llama4lab.viz.legend import legend_beside


def mass_at_distance(table: pd.DataFrame, *, layer: int | None = None, ax: Axes | None = None) -> Axes:
    """Draws how much attention is spent at which distance.

    There is one line for each layer, the mean of its heads: blue for RoPE layers, orange and dashed for NoPE layers,
    darker the later. For one layer there is one line for each head. A line ends with the last bin that has anything.

    Args:
        table: As `tables.attention.mass_at_distance` gives it.
        layer: The layer; all by default.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table does not have the layer.
    """
    own = table if layer is None else style.only(table, "layer", layer)
    by = "layer" if layer is None else "head"
    lines = own.pivot_table(index=by, columns=["nearest", "farthest"], values="mass", aggfunc="mean")
    kinds = dict(zip(own[by], own["kind"], strict=True))
    ax = style.axes(ax, min(2.8 + 0.5 * lines.shape[1], 9.0), 3.2)
    handles = []
    for name, color in zip(lines.index, _colors([str(kinds[name]) for name in lines.index]), strict=True):
        values = lines.loc[name].to_numpy(dtype=float)
        stop = int(np.flatnonzero(values > 0).max(initial=0)) + 1
        nope = kinds[name] == "nope"
        label = f"{by} {name}" + (" (NoPE)" if nope and by == "layer" else "")
        look = {"color": color, "linestyle": "--" if nope else "-", "label": label}
        handles += ax.plot(np.arange(stop), values[:stop], marker="o", markersize=3, linewidth=1.4, **look)
    labels = [str(near) if near == far else f"{near}–{far}" for near, far in lines.columns]
    ax.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor")
    ax.set(xlabel="distance from the query back to the key (tokens)", ylabel="attention (mean over tokens)")
    ax.set_ylim(bottom=0)
    if layer is not None:
        ax.set_title(f"layer {layer} ({KINDS[str(style.only_one(own, 'kind'))]})")
    style.plain(ax)
    legend_beside(ax, handles)
    return ax


def _colors(kinds: list[str]) -> list[tuple[float, float, float]]:
    """A tint for each line: lines of layers have the colour of their kind, and darken from first to last."""
    maps = {"rope": ("#b5d3e7", "#0b3c6f"), "nope": ("#f2b56b", "#9a4a00")}
    tints = []
    for index, kind in enumerate(kinds):
        same = [place for place, other in enumerate(kinds) if other == kind]
        share = same.index(index) / max(len(same) - 1, 1)
        first, last = (np.array(to_rgb(color)) for color in maps[kind])
        tints.append(tuple((1 - share) * first + share * last))
    return tints
