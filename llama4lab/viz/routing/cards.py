"""All about one expert in one figure."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.tables.routing.cards import ExpertCard
from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color, faded
from llama4lab.viz.routing.expert_vocabulary import draw_bars
from llama4lab.viz.routing.panels import panels_in, title_above
from llama4lab.viz.token_axis import token_label

SIDES = {"embedding": "embeddings", "unembedding": "output rows"}


def expert_card(card: ExpertCard, *, ax: Axes | None = None) -> Axes:
    """Draws what is known about one expert in four panels, all in its colour.

    They are: the tokens that it gets, the tokens that its mean write promotes, its strongest neurons with the tokens
    that each promotes, and the tokens along its router row: those whose embedding points there, and, paler, those that
    the direction would promote. A panel without lines says why.

    Args:
        card: As `tables.routing.expert_card` gives it.
        ax: Where to draw; a new figure by default.
    """
    longest = max(len(card.inputs), len(card.promoted), 3)
    second = max(len(card.neurons), len(card.direction) + 1, 3)
    ax = style.axes(ax, 8.4, 2.2 + 0.19 * (longest + second))
    grid = panels_in(ax, 2, 2, heights=[longest + 2.0, second + 2.0])
    (upper, lower), color = grid, expert_color(card.expert)
    for panel, table, column, title, label in (
        (upper[0], card.inputs, "npmi", "tokens that it gets", "nPMI"),
        (upper[1], card.promoted, "score", "tokens that it promotes", "logit above the mean"),
    ):
        panel.set_title(title, fontsize="medium")
        if table.empty:
            _empty(panel, "no tokens counted" if column == "npmi" else "no token went to it")
            continue
        draw_bars(panel, table["token"].tolist(), table[column].to_numpy(dtype=float), color=tuple(color))
        panel.set(xlabel=label, ylim=(longest - 0.4, -0.6))
    _neurons(lower[0], card.neurons, color)
    _direction(lower[1], card.direction, color)
    title_above(grid, f"layer {card.layer}, expert {card.expert}: {card.tokens:,} tokens")
    return ax


def _neurons(ax: Axes, table: pd.DataFrame, color: np.ndarray) -> None:
    """Bars by neuron, with what each promotes written beside it."""
    ax.set_title("strongest neurons", fontsize="medium")
    if table.empty:
        _empty(ax, "no neurons")
        return
    known = bool(table["activation"].notna().any())
    column = "activation" if known else "norm"
    names, values = [str(neuron) for neuron in table["neuron"]], table[column].to_numpy(dtype=float)
    draw_bars(ax, names, values, color=tuple(faded(color, 0.5)))
    for y, promoted in enumerate(table["promoted"]):
        text = "  ".join(token_label(token, 9) for token in promoted[:4])
        ax.annotate(text, (0, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set(ylabel="neuron", ylim=(max(len(table), 3) - 0.4, -0.6))
    ax.set_xlabel("mean size of the activation" if known else "norm of what it writes")


def _direction(ax: Axes, table: pd.DataFrame, color: np.ndarray) -> None:
    """Tokens along the router row: first those of the embedding, then those of the unembedding."""
    ax.set_title("direction of the router", fontsize="medium")
    if table.empty:
        _empty(ax, "no direction")
        return
    side = table["side"].to_numpy()
    place = np.arange(len(table)) + (side == "unembedding")
    gates = np.where(side == "unembedding", 0.25, 1.0)
    ax.barh(place, table["score"], 0.78, color=faded(np.tile(color, (len(table), 1)), gates))
    ax.set_yticks(place, [token_label(token, 14) for token in table["token"]], fontsize=7.5)
    ax.tick_params(axis="x", labelsize=7.5)
    ax.tick_params(axis="y", length=0)
    for name, label in SIDES.items():
        own = place[side == name]
        if len(own):
            where = {"transform": ax.get_yaxis_transform(), "rotation": 90, "ha": "left", "va": "center"}
            ax.text(1.02, own.mean(), label, color="0.35", fontsize=8, **where)
    ax.axvline(0, color=style.INK, linewidth=0.8)
    ax.set(xlabel="standard deviations above the mean token", ylim=(place[-1] + 0.6, -0.6))
    style.plain(ax, keep=("bottom",))


def _empty(ax: Axes, reason: str) -> None:
    ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", color="0.4", fontsize=9)
    ax.set(xticks=[], yticks=[])
    style.plain(ax, keep=())
