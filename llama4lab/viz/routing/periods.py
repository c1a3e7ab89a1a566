"""How the load of experts changes along a text."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check

REST = "0.85"


def load_over_time(table: pd.DataFrame, layer: int, *, ax: Axes | None = None, most: int = 12) -> Axes:
    """Draws the load of a layer's experts along the text: a column for each stretch, with the experts' shares stacked.

    Args:
        table: As `tables.routing.load_over_time` gives it.
        layer: The layer.
        ax: Where to draw; a new figure by default.
        most: The most experts, those with the most tokens; the others share a grey band on top.

    Raises:
        ValueError: if the table has no such layer.
    """
    check(table, "layer", "first", "last", "expert", "tokens", "expert_load")
    own = style.only(table, "layer", layer)
    shares = own.pivot(index="first", columns="expert", values="expert_load").fillna(0.0)
    experts, number = np.unique(own["expert"], return_inverse=True)
    totals = np.bincount(number, own["tokens"])
    served = np.argsort(-totals, kind="stable")[: int((totals > 0).sum())]
    shown = sorted(experts[served[:most]].tolist())
    ax = style.axes(ax, 3.2 + 0.42 * len(shares), 3.4)
    place, bottom = np.arange(len(shares)), np.zeros(len(shares))
    for expert in shown:
        share = shares[expert].to_numpy()
        ax.bar(place, share, 0.94, bottom, color=tuple(expert_color(expert)), label=str(expert))
        bottom = bottom + share
    rest = len(served) - len(shown)
    if rest:
        ax.bar(place, 1 - bottom, 0.94, bottom, color=REST, label=f"{rest} other" + ("s" if rest > 1 else ""))
    ends = own.drop_duplicates("first").sort_values("first")
    labels = [
        str(first) if first == last else f"{first}–{last}"
        for first, last in zip(ends["first"], ends["last"], strict=True)
    ]
    turned = max(map(len, labels)) > 4
    width = style.cell_size(ax, len(labels), 1)[0]
    style.number_ticks(ax.xaxis, place, np.array(labels), room=width / (10 if turned else 28))
    ax.tick_params(axis="x", length=0, rotation=90 if turned else 0)
    ax.set(xlabel="place in the text (tokens)", ylabel="share of the tokens", title=f"layer {layer}", ylim=(0, 1))
    ax.margins(x=0.01)
    style.plain(ax)
    handles = [Patch(color=bars.patches[0].get_facecolor(), label=str(bars.get_label())) for bars in ax.containers]  # pyright: ignore
    legend_beside(ax, handles[::-1], title="expert")
    return ax
