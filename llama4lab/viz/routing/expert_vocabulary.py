"""Which tokens each expert is for."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.panels import panels_in, title_above
from llama4lab.viz.token_axis import token_label

MOST = 8  # experts, where none are chosen
LABELS = {"npmi": "nPMI of token and expert", "share": "share of the token's choices", "tokens": "tokens"}


def vocabulary(
    table: pd.DataFrame,
    layer: int,
    *,
    ax: Axes | None = None,
    experts: int | Sequence[int] | None = None,
    k: int = 8,
    column: str = "npmi",
) -> Axes:
    """Draws the tokens of each expert of a layer: a panel for each expert, with the first tokens as bars.

    Args:
        table: As `tables.routing.vocabulary` gives it.
        layer: The layer.
        ax: Where to draw; a new figure by default.
        experts: An expert or several; None for the eight with the most tokens.
        k: How many tokens of each.
        column: What the bars are, and what tokens are sorted by: "npmi", "share" or "tokens".

    Raises:
        ValueError: if the table has no such layer or expert, or `k` is less than 1.
    """
    if k < 1 or column not in LABELS:
        raise ValueError(
            f"k={k} tokens by column={column!r} were to be drawn; k is at least 1, columns are npmi, share, tokens."
        )
    check(table, "layer", "expert", "token", "tokens", column)
    own = style.only(table, "layer", layer)
    if experts is None:
        known, place = np.unique(own["expert"], return_inverse=True)
        totals = np.bincount(place, own["tokens"])
        chosen = sorted(known[np.argsort(-totals, kind="stable")[:MOST]].tolist())
    else:
        chosen = [experts] if isinstance(experts, int) else list(experts)
    tops = [style.only(own, "expert", expert).nlargest(k, column) for expert in chosen]
    columns = min(4, len(chosen))
    lines = -(-len(chosen) // columns)
    ax = style.axes(ax, 0.4 + 2.5 * columns, 0.5 + lines * (0.75 + 0.19 * k))
    grid = panels_in(ax, lines, columns)
    values = [top[column].to_numpy(dtype=float) for top in tops]
    right = max(float(own.max()) for own in values)
    for panel, expert, top, sizes in zip(grid.flat, chosen, tops, values, strict=False):
        draw_bars(panel, top["token"].tolist(), sizes, color=tuple(expert_color(expert)))
        panel.set(xlim=(min(0.0, float(sizes.min())), 1.05 * right), ylim=(k - 0.4, -0.6))
        panel.set_title(f"expert {expert}", fontsize="medium")
    for panel in grid.flat[len(chosen) :]:
        panel.set_axis_off()
    for panel in grid.flat[max(len(chosen) - columns, 0) : len(chosen)]:
        panel.set_xlabel(LABELS[column])
    title_above(grid, f"layer {layer}")
    return ax


def draw_bars(ax: Axes, tokens: Sequence[str], values: np.ndarray, *, color) -> None:
    """Draws tokens as horizontal bars, the first on top."""
    place = np.arange(len(tokens))
    ax.barh(place, values, 0.78, color=color)
    ax.set_yticks(place, [token_label(token, 14) for token in tokens], fontsize=7.5)
    ax.tick_params(axis="x", labelsize=7.5)
    ax.tick_params(axis="y", length=0)
    ax.axvline(0, color=style.INK, linewidth=0.8)
    style.plain(ax, keep=("bottom",))
