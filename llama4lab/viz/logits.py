"""Plots of `llama4lab.tables.logits`."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.token_axis import token_label


def compare(table: pd.DataFrame, *, ax: Axes | None = None, row: int = 0) -> Axes:
    """Draws the probabilities of next tokens before and after: an open and a filled dot for each token.

    The line between them is blue where the probability rose and orange where it fell.

    Args:
        table: As `tables.logits.compare` gives it.
        ax: Where to draw; a new figure by default.
        row: Row of the prompt.

    Raises:
        ValueError: if the table has no such row.
    """
    own = style.only(table, "row", row)
    ax = style.axes(ax, 6.0, 1.1 + 0.32 * len(own))
    height = np.arange(len(own))
    before, after = own["prob_before"].to_numpy(), own["prob_after"].to_numpy()
    color = np.where(after >= before, style.BLUE, style.ORANGE)
    ax.hlines(height, before, after, color=color, linewidth=2.5, zorder=1)
    ax.scatter(before, height, s=42, facecolor="white", edgecolor=style.INK, linewidth=1.2, zorder=2, label="before")
    ax.scatter(after, height, s=42, color=style.INK, zorder=3, label="after")
    ax.set_yticks(height, [token_label(token, longest=20) for token in own["token"]])
    ax.set(xlabel="probability", ylabel="next token", ylim=(len(own) - 0.4, -0.6))
    top = max(before.max(), after.max())
    ax.set_xlim(-0.02 * top, 1.04 * top)
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    legend_beside(ax)
    return ax
