"""What attention scores are made of: angles, content and position, bands of RoPE."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.attention.patterns import KINDS
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.token_axis import label_tokens, token_label

WIDTHS = {(0.0, 1.0): (0.8, "all"), (0.05, 0.95): (2.5, "5 % to 95 %"), (0.25, 0.75): (5.0, "25 % to 75 %")}


def angles(table: pd.DataFrame, *, column: str = "cosine", ax: Axes | None = None) -> Axes:
    """Draws what angles between queries and keys each head has: all, nine tenths and half of them, and the median.

    Heads stand side by side in their layer, from head 0 on the left. NoPE layers are marked.

    Args:
        table: As `tables.attention.angles` gives it, with its own quantiles.
        column: "cosine", "angle" (in degrees) or "score".
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if there is no such column, or a quantile is missing.
    """
    labels = {"cosine": "cosine of query and key", "angle": "angle of query and key (degrees)", "score": "score"}
    if column not in labels:
        raise ValueError(f"column={column!r} was to be drawn; columns are {', '.join(labels)}.")
    wide = table.pivot(index=["layer", "kind", "head"], columns="quantile", values=column).sort_index()
    asked = sorted({share for pair in WIDTHS for share in pair} | {0.5})
    if missing := [share for share in asked if share not in wide]:
        raise ValueError(f"The table has no quantile {missing[0]:g}; {', '.join(map(str, asked))} are drawn.")
    layers, heads = (np.unique(wide.index.get_level_values(name)) for name in ("layer", "head"))
    ax = style.axes(ax, 2.4 + len(wide) * 0.11 + 0.15 * len(layers), 3.2)
    width = 0.8 / len(heads)
    found = wide.index.to_frame()
    place = np.searchsorted(layers, found["layer"]) + (np.searchsorted(heads, found["head"]) + 0.5) * width - 0.4
    for (low, high), (line, label) in WIDTHS.items():
        color = style.GREY if low == 0 else style.BLUE
        ax.vlines(place, wide[low], wide[high], color=color, linewidth=line, alpha=0.55 if low else 1, label=label)
    ax.plot(place, wide[0.5], "o", color=style.INK, markersize=2.5, label="median")
    kinds = dict(zip(found["layer"], found["kind"], strict=True))
    ax.set_xticks(range(len(layers)), [f"{layer}\nNoPE" if kinds[layer] == "nope" else str(layer) for layer in layers])
    ax.set(xlabel="layer", ylabel=labels[column])
    if column != "angle":
        ax.axhline(0, color=style.INK, linewidth=0.6)
    style.plain(ax)
    legend_beside(ax)
    return ax


def score_split(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws the scores of one query: for each key a bar of content and a bar of position, and the score as a dot.

    Args:
        table: Lines of one query of what `tables.attention.score_split` gives.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has several layers, heads, rows or queries.
    """
    title = _title(table)
    table = table.sort_values("key")
    ax = style.axes(ax, 2.8 + 0.26 * len(table), 3.4)
    place = np.arange(len(table))
    ax.bar(place - 0.2, table["content"], 0.4, color=style.BLUE, label="content")
    ax.bar(place + 0.2, table["positional"], 0.4, color=style.ORANGE, label="position")
    ax.plot(place, table["score"], "o", color=style.INK, markersize=3.5, label="score")
    ax.axhline(0, color=style.INK, linewidth=0.8)
    ax.set_xlim(-0.6, len(table) - 0.4)
    width, _ = style.cell_size(ax, len(table), 1)
    label_tokens(ax, table["key_token"].tolist(), table["key"].tolist(), width)
    ax.set(xlabel="key", ylabel="score", title=title)
    style.plain(ax)
    legend_beside(ax)
    return ax


def score_bands(table: pd.DataFrame, *, column: str = "contribution", ax: Axes | None = None) -> Axes:
    """Draws the scores of one query by bands of RoPE: keys to the right, the slowest band on top.

    Args:
        table: Lines of one query of what `tables.attention.score_bands` gives.
        column: "contribution", "content" or "positional".
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if there is no such column, or the table has several layers, heads, rows or queries.
    """
    if column not in ("contribution", "content", "positional"):
        raise ValueError(f"column={column!r} was to be drawn; columns are contribution, content, positional.")
    title = _title(table)
    values = table.pivot(index="band", columns="key", values=column).sort_index()
    keys = table.drop_duplicates("key").sort_values("key")
    lengths = dict(zip(table["band"], table["wavelength"], strict=True))
    ax = style.axes(ax, 3.0 + 0.22 * len(keys), min(1.8 + 0.17 * len(values), 7))
    numbers = values.to_numpy(dtype=float)
    picture = ax.imshow(
        numbers,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=style.DIVERGING,
        norm=style.centred(numbers),
    )
    width, height = style.cell_size(ax, len(keys), len(values))
    label_tokens(ax, keys["key_token"].tolist(), keys["key"].tolist(), width)
    names = np.array([_tokens(lengths[band]) for band in values.index])
    style.number_ticks(ax.yaxis, np.arange(len(values)), names, room=height / 10)
    ax.set(xlabel="key", ylabel="wavelength (tokens)", title=title)
    style.plain(ax)
    style.color_bar(ax, picture, "part of the score" if column == "contribution" else f"part of the score, {column}")
    return ax


def _title(table: pd.DataFrame) -> str:
    layer, head, kind, query = (style.only_one(table, column) for column in ("layer", "head", "kind", "query"))
    style.only_one(table, "row")
    token = token_label(str(table["query_token"].iloc[0]))
    return f"layer {layer} ({KINDS[str(kind)]}), head {head}, query {query} {token}"


def _tokens(length: float) -> str:
    """A wavelength in few characters: `6.3`, `353`, `19.9k`, `3.1M`."""
    if not np.isfinite(length):
        return "∞"
    for size, unit in ((1e6, "M"), (1e3, "k"), (1.0, "")):
        if length >= size:
            return f"{length / size:.{1 if length < 100 * size else 0}f}{unit}"
    return f"{length:.2f}"
