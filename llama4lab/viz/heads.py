"""Plots of `llama4lab.tables.heads`."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style


def scores(table: pd.DataFrame, score: str = "induction", *, ax: Axes | None = None) -> Axes:
    """Draws one score of every head: layers upwards, heads to the right, on a scale from 0 to 1.

    NoPE layers are marked. A cross marks a head for which no token had anything to look at.

    Args:
        table: As `tables.heads.scores` gives it.
        score: Which score, for example "previous_token".
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no such score.
    """
    known = [column.removesuffix("_queries") for column in table if str(column).endswith("_queries")]
    if score not in known:
        raise ValueError(f"score={score!r} was to be drawn; the table has {', '.join(known) or 'none'}.")
    values = table.pivot(index="layer", columns="head", values=score)
    ax = style.axes(ax, 2.4 + 0.34 * len(values.columns), max(2.6, 1.2 + 0.3 * len(values)))
    picture = ax.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest", cmap=style.SEQUENTIAL, vmin=0, vmax=1
    )
    width, height = style.cell_size(ax, len(values.columns), len(values))
    for y, x in np.argwhere(values.isna().to_numpy()):
        ax.text(x, y, "×", ha="center", va="center", fontsize=min(9.0, width, height), color=style.GREY)
    _numbers(ax, values, picture, min(width / 3.2, 0.62 * height, 8.5))
    kinds = dict(zip(table["layer"], table["kind"], strict=True))
    labels = np.array([f"NoPE {layer}" if kinds[layer] == "nope" else str(layer) for layer in values.index])
    style.number_ticks(ax.yaxis, np.arange(len(values)), labels, room=height / 11)
    style.number_ticks(ax.xaxis, np.arange(len(values.columns)), values.columns.to_numpy(), room=width / 17)
    ax.set(xlabel="head", ylabel="layer", title=f"{score.replace('_', ' ')} score")
    style.plain(ax)
    style.color_bar(ax, picture, "attention to targets (mean)")
    return ax


def _numbers(ax: Axes, values: pd.DataFrame, picture, size: float) -> None:
    """Writes the larger scores into their cells, where they have room."""
    if size < 5.5:
        return
    for (y, x), value in np.ndenumerate(values.to_numpy()):
        if value >= 0.1:
            color = style.ink_on(picture.to_rgba(value)[:3])
            ax.text(x, y, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=size, color=color)
