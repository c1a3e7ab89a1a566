"""Which expert each token went to."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import expert_patches, gate_patches, legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.token_axis import label_tokens

MISSING = 0.93  # light grey


def decisions(table: pd.DataFrame, *, ax: Axes | None = None, row: int = 0) -> Axes:
    """Draws which expert each token went to: layers with a router upwards, tokens to the right.

    The colour is the expert, its lightness the gate: the weaker, the lighter. Where cells are large enough they have
    the expert's number, otherwise a legend names the colours. Slots of a token lie above each other, the first on top.

    Args:
        table: As `tables.routing.decisions` gives it; layers or tokens may have been left out.
        ax: Where to draw; a new figure by default.
        row: Row of the prompt.

    Raises:
        ValueError: if the table has no such row.
    """
    check(table, "row", "layer", "position", "slot", "token", "expert", "gate")
    own = style.only(table, "row", row)
    layers, positions = np.unique(own["layer"]), np.unique(own["position"])
    chosen = np.unique(own["slot"])
    slots = len(chosen)
    column = np.searchsorted(positions, own["position"])
    line = np.searchsorted(layers, own["layer"]) * slots + slots - 1 - np.searchsorted(chosen, own["slot"])
    picture = np.full((len(layers) * slots, len(positions), 3), MISSING)
    picture[line, column] = expert_colors(own["expert"].to_numpy(), own["gate"].to_numpy())

    ax = style.axes(ax, 1.8 + 0.25 * len(positions), 1.4 + 0.25 * len(picture))
    ax.imshow(picture, aspect="auto", origin="lower", interpolation="nearest")
    width, height = style.cell_size(ax, len(positions), len(picture))
    size = style.number_size(width, height, int(np.max(own["expert"])))
    numbered = size > 0
    if numbered:
        for x, y, expert in zip(column, line, own["expert"], strict=True):
            ax.text(x, y, str(expert), ha="center", va="center", fontsize=size, color=style.ink_on(picture[y, x]))
    for border in range(1, len(layers)):
        ax.axhline(border * slots - 0.5, color="white", linewidth=1.0 if slots == 1 else 2.5)
    for border in range(1, len(positions) if numbered else 0):
        ax.axvline(border - 0.5, color="white", linewidth=0.6)
    tokens = own.drop_duplicates("position").sort_values("position")["token"].tolist()
    label_tokens(ax, tokens, positions.tolist(), width)
    middle = np.arange(len(layers)) * slots + (slots - 1) / 2
    style.number_ticks(ax.yaxis, middle, layers, room=height * slots / 11)
    ax.set(xlabel="token", ylabel="layer")
    style.plain(ax, keep=())
    named = [] if numbered else expert_patches(own["expert"].to_numpy())
    legend_beside(ax, [*named, *gate_patches()], title="expert" if named else None)
    return ax
