"""How near tokens are to another expert."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.token_axis import label_tokens

LABELS = {
    "relative": "distance to a flip /\nnorm of the input",
    "distance": "distance to a flip\n(norm)",
    "margin": "margin of the choice\n(router logits)",
}


def flip_distance(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    row: int | None = None,
    column: str = "relative",
) -> Axes:
    """Draws how far tokens are from being sent elsewhere: their spread by layer, or a map of the tokens of one row.

    Of the spread, the line is the median, the dark band the middle half and the light band the middle nine tenths of
    the tokens. In the map, layers go upwards and tokens to the right; pale tokens are near to a flip, and where cells
    have room they have the number of the nearest other expert. Tokens without a distance are left out, or grey.

    Args:
        table: As `tables.routing.flip_distance` gives it.
        ax: Where to draw; a new figure by default.
        row: Row of the prompt whose map to draw; None for the spread of all.
        column: The distance: "relative" to the norm of what the router reads, as "distance", or as "margin".

    Raises:
        ValueError: if the table has no such row or column.
    """
    if column not in LABELS:
        raise ValueError(f"column={column!r} was to be drawn; choose one of {', '.join(LABELS)}.")
    check(table, "row", "layer", "position", "token", "nearest", column)
    if not np.isfinite(table[column].to_numpy(dtype=float)).any():
        raise ValueError(
            f"column={column!r} was to be drawn, but it has no number.\n"
            'For "relative", record layers.*.resid_mid, too; or draw column="distance".'
        )
    return _spread(table, ax, column) if row is None else _map(style.only(table, "row", row), ax, column)


def _spread(table: pd.DataFrame, ax: Axes | None, column: str) -> Axes:
    layers, groups = np.unique(table["layer"]), table.groupby("layer")[column]
    ax = style.axes(ax, 3.4 + 0.2 * len(layers), 3.0)
    for low, high, alpha in ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3)):
        bottom, top = (groups.quantile(share).to_numpy(dtype=float) for share in (low, high))
        label = f"{high - low:.0%} of the tokens"
        ax.fill_between(layers, bottom, top, color=style.BLUE, alpha=alpha, linewidth=0, label=label)
    ax.plot(layers, groups.median(), color=style.BLUE, marker="o", markersize=3.5, label="median")
    style.number_ticks(ax.xaxis, layers, layers, room=style.cell_size(ax, len(layers), 1)[0] / 17)
    ax.set(xlabel="layer", ylabel=LABELS[column])
    if float(np.nanmin(table[column].to_numpy(dtype=float))) >= 0:
        ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    legend_beside(ax, ax.get_legend_handles_labels()[0][::-1])
    return ax


def _map(own: pd.DataFrame, ax: Axes | None, column: str) -> Axes:
    layers, positions = np.unique(own["layer"]), np.unique(own["position"])
    known = own.loc[own[column].notna(), :]
    x = np.searchsorted(positions, known["position"])
    y = np.searchsorted(layers, known["layer"])
    values = np.full((len(layers), len(positions)), np.nan)
    values[y, x] = known[column]
    ax = style.axes(ax, 2.4 + 0.27 * len(positions), max(2.8, 1.6 + 0.26 * len(layers)))
    ax.set_facecolor("0.93")
    top = float(max(known[column].max(), 1e-9)) if len(known) else 1.0
    picture = ax.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest", cmap=style.SEQUENTIAL, vmin=0, vmax=top
    )
    width, height = style.cell_size(ax, len(positions), len(layers))
    nearest = known["nearest"].to_numpy(dtype=int)
    size = style.number_size(width, height, int(nearest.max(initial=0)))
    for right, up, expert in zip(x, y, nearest, strict=True) if size else ():
        color = style.ink_on(picture.to_rgba(values[up, right])[:3])
        ax.text(right, up, str(expert), ha="center", va="center", fontsize=size, color=color)
    tokens = own.drop_duplicates("position").sort_values("position")["token"].tolist()
    label_tokens(ax, tokens, positions.tolist(), width)
    style.number_ticks(ax.yaxis, np.arange(len(layers)), layers, room=height / 11)
    ax.set(xlabel="token", ylabel="layer")
    style.plain(ax)
    note = "\n(number: nearest expert)" if size else ""
    style.color_bar(ax, picture, LABELS[column] + note)
    return ax
