"""Plots of `llama4lab.tables.generation`."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from llama4lab.viz import style
from llama4lab.viz.attention.patterns import KINDS
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing import choices
from llama4lab.viz.routing.checking import check
from llama4lab.viz.token_axis import label_tokens

NAMES = {
    "own_chunk": "attention to the own chunk",
    "earlier": "attention to earlier chunks",
    "first_token": "attention to the first token",
    "itself": "attention to itself",
    "distance": "mean distance in tokens",
    "entropy": "entropy of attention in nats",
}
SHARES = ("own_chunk", "earlier", "first_token", "itself")
TINY = 1e-3  # nats; a bar as thin as this is no bar


def tokens(table: pd.DataFrame, *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws how each token was chosen: bars are its surprisal, dots the entropy of what it was chosen from.

    A bar above its dot is a token that the model found less likely than what it expects of itself. Tokens that were not
    the most probable ones are orange.

    Args:
        table: As `tables.generation.tokens` gives it.
        row: Row of the prompt.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no such row.
    """
    check(table, "row", "position", "token", "log_prob", "entropy", "rank")
    own = style.only(table, "row", row).sort_values("position")
    ax = style.axes(ax, 2.6 + 0.27 * len(own), 2.9)
    places, best = np.arange(len(own)), own["rank"].to_numpy() == 0
    surprisal = -own["log_prob"].to_numpy(dtype=float)
    for kept, color, name in ((best, style.BLUE, "most probable token"), (~best, style.ORANGE, "another token")):
        if kept.any():
            ax.bar(places[kept], np.maximum(surprisal[kept], 0), width=0.8, color=color, label=name)
    ax.plot(places, own["entropy"], "o", color=style.INK, markersize=3.5, label="entropy")
    ax.set_xlim(-0.6, len(own) - 0.4)
    ax.set_ylim(0, None)
    ax.set(xlabel="generated token", ylabel="surprisal in nats")
    legend_beside(ax)
    label_tokens(ax, own["token"].tolist(), own["position"].tolist(), style.cell_size(ax, len(own), 1)[0])
    style.plain(ax)
    return ax


def experts(table: pd.DataFrame, *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws which expert each generated token went to: layers upwards, tokens to the right.

    It is `viz.routing.decisions` of these tokens.

    Args:
        table: As `tables.generation.experts` gives it.
        row: Row of the prompt.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no such row.
    """
    ax = choices.decisions(table, ax=ax, row=row)
    ax.set_xlabel("generated token")
    return ax


def attention(table: pd.DataFrame, value: str = "earlier", *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws where each generated token looked, as means over heads: layers upwards, tokens to the right.

    Args:
        table: As `tables.generation.attention` gives it; heads may have been left out.
        value: Which column: "own_chunk", "earlier", "first_token", "itself", "distance" or "entropy".
        row: Row of the prompt.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if there is no such value, or the table has no such row.
    """
    if value not in NAMES:
        raise ValueError(f"value={value!r} was to be drawn; choose from {', '.join(NAMES)}.")
    check(table, "row", "layer", "kind", "position", "token", value)
    own = style.only(table, "row", row)
    cells = own.pivot_table(index="layer", columns="position", values=value, aggfunc="mean")
    kinds = dict(zip(own["layer"], own["kind"], strict=True))
    text = dict(zip(own["position"], own["token"], strict=True))
    ax = style.axes(ax, 2.8 + 0.25 * cells.shape[1], 1.5 + 0.25 * len(cells))
    values = cells.to_numpy(dtype=float)
    norm = Normalize(0, 1 if value in SHARES else max(float(np.nanmax(values)), TINY))
    picture = ax.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest", cmap=style.SEQUENTIAL, norm=norm
    )
    style.color_bar(ax, picture, NAMES[value])
    width, height = style.cell_size(ax, *values.shape[::-1])
    label_tokens(ax, [text[position] for position in cells.columns], cells.columns.tolist(), width)
    labels = np.array([f"{layer} {KINDS['nope']}" if kinds[layer] == "nope" else str(layer) for layer in cells.index])
    style.number_ticks(ax.yaxis, np.arange(len(values)), labels, room=height / 11)
    heads = len(np.unique(own["head"])) if "head" in own else 1
    ax.set(xlabel="generated token", ylabel="layer")
    ax.set_title(f"mean of {heads} heads" if heads > 1 else "", loc="left", fontsize="medium")
    style.plain(ax, keep=())
    return ax
