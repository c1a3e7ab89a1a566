"""Needle curves: what is still found, by distance."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside

INKS = (style.INK, style.BLUE, style.ORANGE, "#5b8c3a", "#8a5fb0", "#b9893c", "#3fa7a0", style.GREY)
DASHES = ("-", "--", ":", "-.")
MARKS = "osD^v"
VALUES = {
    "accuracy": "share of right answers",
    "guessed": "share of right answers without the fact",
    "log_prob": "log probability of the answer",
}


def needle(table: pd.DataFrame, *, value: str = "accuracy", ax: Axes | None = None) -> Axes:
    """Draws what is found against the distance: a colour for each ablation, a kind of line for each border.

    Args:
        table: As `tables.attention.needle` gives it.
        value: "accuracy", "guessed" or "log_prob".
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if there is no such value, the table has no lines, or more borders than kinds of lines.
    """
    if value not in VALUES or table.empty:
        raise ValueError(f"value={value!r} of {len(table)} lines was to be drawn; it is {' or '.join(VALUES)}.")
    ablated = list(dict.fromkeys(table["ablated"]))
    place = table["border"].astype(object).where(table["border"].notna(), None)
    borders = list(dict.fromkeys(place))
    if len(borders) > len(DASHES):
        raise ValueError(
            f"{len(borders)} borders were to be drawn; {len(DASHES)} can be told apart.\n"
            'Choose some, for example table[table["border"] == -1].'
        )
    ax = style.axes(ax, 6.5, 3.4)
    for number, group in enumerate(ablated):
        for kind, border in enumerate(borders):
            meant = (table["ablated"] == group) & np.array([each == border for each in place])
            own = table.loc[meant, :].sort_values("distance")
            look: dict[str, Any] = {"color": INKS[number % len(INKS)], "linestyle": DASHES[kind], "marker": MARKS[kind]}
            ax.plot(own["distance"], own[value], markersize=4, linewidth=1.5, clip_on=False, **look)
    ax.set(xlabel="tokens between fact and answer", ylabel=VALUES[value])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if value != "log_prob":
        ax.set(ylim=(0, 1), yticks=np.linspace(0, 1, 5))
    style.plain(ax)
    _legend(ax, ablated, borders)
    return ax


def _legend(ax: Axes, ablated: list[str], borders: list[int | None]) -> None:
    handles = []
    for number, group in enumerate(ablated):
        label = "all layers" if group == "none" else f"{group} barred"
        handles.append(Line2D([], [], color=INKS[number % len(INKS)], label=label))
    if borders != [None]:
        for kind, border in enumerate(borders):
            look = {"color": style.GREY, "linestyle": DASHES[kind], "marker": MARKS[kind], "markersize": 4}
            handles.append(Line2D([], [], label=_border(border), **look))
    legend_beside(ax, handles)


def _border(border: int | None) -> str:
    if border is None:
        return "text from position 0"
    if border < 0:
        return f"fact {-border} before a border"
    return f"fact {border + 1} behind a border"
