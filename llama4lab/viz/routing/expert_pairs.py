"""How alike experts are, and which are chosen together: matrices of the experts of a layer."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.heat_map import draw_map, write_values


def similarity(table: pd.DataFrame, layer: int, *, ax: Axes | None = None) -> Axes:
    """Draws how alike the experts of a layer are: cosines of all pairs. The scale is that of different experts.

    Args:
        table: As `tables.routing.similarity` gives it.
        layer: The layer.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no such layer.
    """
    values = _matrix(table, layer, "cosine")
    kind = table.attrs.get("kind")
    look = {"cmap": style.DIVERGING, "norm": style.centred(values.to_numpy(dtype=float))}
    return _drawn(values, layer, ax, look, ("expert", "expert"), "cosine" + (f" ({kind})" if kind else ""))


def coactivation(table: pd.DataFrame, layer: int, *, ax: Axes | None = None) -> Axes:
    """Draws which experts of a layer get the same tokens: of the tokens of each expert (row), the share of the other.

    Args:
        table: As `tables.routing.coactivation` gives it.
        layer: The layer.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no such layer.
    """
    values = _matrix(table, layer, "share")
    values = values.fillna(0.0).mask(np.eye(len(values), dtype=bool))  # only pairs with tokens are in the table
    top = float(np.nanmax(values.to_numpy(dtype=float), initial=1e-9))
    look = {"cmap": style.SEQUENTIAL, "vmin": 0, "vmax": top}
    return _drawn(
        values, layer, ax, look, ("expert", "other expert"), "share of the expert's tokens\nthat the other gets, too"
    )


def _matrix(table: pd.DataFrame, layer: int, column: str) -> pd.DataFrame:
    """Values of all pairs; an expert with itself is left out."""
    check(table, "layer", "expert", "other", column)
    own = style.only(table, "layer", layer)
    known = table.attrs.get("num_experts")
    experts = np.union1d(own["expert"], own["other"]) if known is None else np.arange(known)
    values = own.pivot(index="expert", columns="other", values=column).reindex(index=experts, columns=experts)
    return values.mask(np.eye(len(experts), dtype=bool))


def _drawn(
    values: pd.DataFrame, layer: int, ax: Axes | None, look: dict[str, Any], names: tuple[str, str], label: str
) -> Axes:
    side = (0.36 if len(values) <= 20 else 0.06) * len(values)
    ax = style.axes(ax, 2.2 + side, 1.2 + side)
    ax.set_facecolor("0.9")
    picture = draw_map(ax, values, marked=np.zeros(values.shape, dtype=bool), names=names, **look)
    ax.invert_yaxis()
    write_values(ax, values.to_numpy(dtype=float), picture)
    ax.set_title(f"layer {layer}")
    style.color_bar(ax, picture, label)
    return ax
