"""Which layers have like features."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.heat_map import write_values


def cka(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how like the features of each two hook points are, in the order of the table; 1 is the same up to a turn.

    Args:
        table: As `tables.vision.cka` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if a column is missing or the table is empty.
    """
    check(table, "first", "second", "cka")
    rows, columns = (list(dict.fromkeys(table[name])) for name in ("first", "second"))
    order = list(dict.fromkeys([*rows, *columns])) if set(rows) == set(columns) else None
    values = table.pivot(index="first", columns="second", values="cka").reindex(order or rows, columns=order or columns)
    numbers = values.to_numpy(dtype=float)
    short = [[_short(str(name)) for name in names] for names in (values.index, values.columns)]
    ax = style.axes(ax, 2.6 + 0.45 * numbers.shape[1], 1.8 + 0.4 * len(numbers))
    # Estimates without bias can be a little below zero.
    low = min(0.0, float(np.nanmin(numbers)))
    picture = ax.imshow(numbers, cmap=style.SEQUENTIAL, vmin=low, vmax=1, interpolation="nearest", aspect="equal")
    write_values(ax, numbers, picture)
    ax.set_xticks(range(numbers.shape[1]), short[1], rotation=90)
    ax.set_yticks(range(len(numbers)), short[0])
    ax.tick_params(length=2, labelsize="small")
    style.plain(ax, keep=())
    style.color_bar(ax, picture, "CKA")
    return ax


def _short(name: str) -> str:
    """The name of a hook point without what all of them share: `vision 3`, `layer 5`."""
    parts = name.split(".")
    if parts[-1] == "resid_post" and "layers" in parts:
        return f"{'vision' if parts[0] == 'vision_model' else 'layer'} {parts[parts.index('layers') + 1]}"
    return name.removeprefix("vision_model.").replace("_", " ")
