"""What heads read and write, in words of the vocabulary."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from llama4lab.viz import style
from llama4lab.viz.attention.patterns import KINDS
from llama4lab.viz.token_axis import token_label

MOST = 24  # tokens, one below the other
LABELS = {
    "own_first": "share of tokens that raise themselves most",
    "own_rank": "mean rank of the token itself",
    "eigenvalues": "eigenvalues: sum by sum of sizes",
}


def ov(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws what a head writes: a line for each token that it looks at, with the tokens that it raises, the first left.

    A framed cell is the token itself. Of many tokens, those with the highest scores are drawn.

    Args:
        table: As `tables.attention.ov` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has several layers or heads.
    """
    names = ("in_id", "token_in", "out_id", "token_out")
    return _words(table, names, ax, title="writes", left="token looked at", right="added to the logit")


def qk(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws what a head looks for: a line for each token that looks, with the keys of the highest scores.

    A framed cell is the token itself. Of many tokens, those with the highest scores are drawn.

    Args:
        table: As `tables.attention.qk` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has several layers, heads or distances.
    """
    distance = style.only_one(table, "distance")
    names = ("query_id", "query_token", "key_id", "key_token")
    title = "looks for" if style.only_one(table, "kind") == "nope" else f"looks for, {distance} tokens back"
    return _words(table, names, ax, title=title, left="token that looks", right="score")


def copying(table: pd.DataFrame, column: str = "eigenvalues", *, ax: Axes | None = None) -> Axes:
    """Draws how far each head copies: layers upwards, heads to the right. NoPE layers are marked.

    Args:
        table: As `tables.attention.copying` gives it.
        column: "eigenvalues" (from -1 to 1), "own_first" (from 0 to 1) or "own_rank".
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if there is no such column.
    """
    if column not in LABELS:
        raise ValueError(f"column={column!r} was to be drawn; columns are {', '.join(LABELS)}.")
    values = table.pivot(index="layer", columns="head", values=column)
    ax = style.axes(ax, 2.6 + 0.36 * len(values.columns), max(2.6, 1.2 + 0.3 * len(values)))
    signed = column == "eigenvalues"
    low, high = {"eigenvalues": (-1, 1), "own_first": (0, 1)}.get(column, (0, float(np.nanmax(values))))
    picture = ax.imshow(
        values,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=style.DIVERGING if signed else style.SEQUENTIAL,
        vmin=low,
        vmax=high,
    )
    width, height = style.cell_size(ax, len(values.columns), len(values))
    for y, x in np.argwhere(values.isna().to_numpy()):
        ax.text(x, y, "×", ha="center", va="center", fontsize=min(9.0, width, height), color=style.GREY)
    kinds = dict(zip(table["layer"], table["kind"], strict=True))
    labels = np.array([f"NoPE {layer}" if kinds[layer] == "nope" else str(layer) for layer in values.index])
    style.number_ticks(ax.yaxis, np.arange(len(values)), labels, room=height / 11)
    style.number_ticks(ax.xaxis, np.arange(len(values.columns)), values.columns.to_numpy(), room=width / 17)
    ax.set(xlabel="head", ylabel="layer", title="copying")
    style.plain(ax)
    style.color_bar(ax, picture, LABELS[column])
    return ax


def _words(
    table: pd.DataFrame, names: tuple[str, str, str, str], ax: Axes | None, *, title: str, left: str, right: str
) -> Axes:
    """A grid of tokens on the colour of their scores."""
    layer, head, kind = (style.only_one(table, column) for column in ("layer", "head", "kind"))
    asked, asked_text, found, found_text = names
    best = table.groupby(asked, sort=False)["score"].max()
    shown = best.index if len(best) <= MOST else best.nlargest(MOST).index
    scores, texts, ids = (
        table.drop_duplicates([asked, "rank"]).pivot(index=asked, columns="rank", values=column).loc[shown]
        for column in ("score", found_text, found)
    )
    numbers = scores.to_numpy(dtype=float)
    ax = style.axes(ax, 2.6 + 0.85 * numbers.shape[1], 1.3 + 0.27 * len(numbers))
    picture = ax.imshow(
        numbers, aspect="auto", interpolation="nearest", cmap=style.DIVERGING, norm=style.centred(numbers)
    )
    width, height = style.cell_size(ax, numbers.shape[1], len(numbers))
    size = min(8.5, 0.62 * height)
    for (y, x), score in np.ndenumerate(numbers):
        own = ids.iat[y, x] == shown[y]
        label = token_label(str(texts.iat[y, x]), max(3, int(width / (0.62 * size))))
        color = style.ink_on(picture.to_rgba(score)[:3])
        ax.text(x, y, label, ha="center", va="center", fontsize=size, color=color)
        if own:
            frame = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor=style.LINE, linewidth=1.6)
            ax.add_patch(frame)
    own_text = dict(zip(table[asked], table[asked_text], strict=True))
    ax.set_yticks(range(len(shown)), [token_label(str(own_text[number])) for number in shown], fontsize=size)
    ax.set_xticks(range(numbers.shape[1]), [str(rank) for rank in scores.columns])
    ax.tick_params(length=0)
    some = f" ({len(shown)} of {len(best):,} tokens)" if len(shown) < len(best) else ""
    ax.set(xlabel="rank", ylabel=left)
    ax.set_title(f"layer {layer} ({KINDS[str(kind)]}), head {head} {title}{some}", fontsize="medium")
    style.plain(ax, keep=())
    style.color_bar(ax, picture, right)
    return ax
