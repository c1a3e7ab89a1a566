"""Plots of `llama4lab.tables.logit_lens`."""

from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.token_axis import label_tokens, token_label

ORDER = ("embed", "embed_merged", "resid_pre", "resid_mid", "resid_post", "final_norm")
WHOLE = {"embed": "embed", "embed_merged": "embed", "final_norm": "norm"}
MEASURES = {
    "prob": "probability\nof the best token",
    "log_prob": "log probability\nof the best token",
    "entropy": "entropy (nats)",
    "kl": "divergence from\nthe model (nats)",
}
SCORES = {"rank": "rank", "prob": "probability", "log_prob": "log probability", "logit": "logit"}
DASHES = {"logit": "-", "tuned": (0, (3, 1.5))}
SMALL, LARGE, LONGEST = 5.0, 8.0, 9  # points of the text of a cell; its characters where all have room


def top_tokens(table: pd.DataFrame, *, column: str = "prob", ax: Axes | None = None, row: int = 0) -> Axes:
    """Draws the most probable token of each place and position: layers upwards, tokens of the prompt to the right.

    Args:
        table: As `tables.logit_lens.top_tokens` gives it, of one lens; of several ranks the best is drawn.
        column: What the colours are: "prob", "log_prob", "entropy" or "kl".
        ax: Where to draw; a new figure by default.
        row: Row of the prompt.

    Raises:
        ValueError: if the table has no such column or row, or is of several lenses.
    """
    own = _best(table, column, row)
    lens = style.only_one(own, "lens")
    places, positions = hook_points(own), np.unique(own["position"])
    values = own.pivot(index="hook_point", columns="position", values=column).reindex(places, columns=positions)
    tokens = own.pivot(index="hook_point", columns="position", values="token").reindex(places, columns=positions)
    ax = style.axes(ax, 2.2 + 0.62 * len(positions), max(2.2, 1.3 + 0.26 * len(places)))
    norm = scale(own, column)
    picture = ax.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest", cmap=style.SEQUENTIAL, norm=norm
    )
    width, height = style.cell_size(ax, len(positions), len(places))
    _write(ax, tokens, picture, width, height)
    texts = dict(zip(own["position"], own["input"], strict=True))
    label_tokens(ax, [texts[position] for position in positions], positions.tolist(), width)
    labels = np.array(place_labels(places))
    style.number_ticks(ax.yaxis, np.arange(len(places)), labels, room=height / 11)
    ax.set(xlabel="token", ylabel=places_label(places), title=f"{lens} lens")
    style.plain(ax)
    style.color_bar(ax, picture, MEASURES[column])
    return ax


def trajectories(table: pd.DataFrame, *, column: str = "rank", ax: Axes | None = None) -> Axes:
    """Draws how chosen tokens fare from place to place, at one position: a line for each token.

    Of a table of two lenses (joined with `pandas.concat`), the lines of the tuned lens are dashed.

    Args:
        table: As `tables.logit_lens.trajectories` gives it, of one row and position.
        column: What is drawn: "rank" (the best token, rank 0, is at the top), "prob", "log_prob" or "logit".
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no such column, or several rows or positions.
    """
    _check_column(table, column, SCORES)
    for each in ("row", "position"):
        style.only_one(table, each)
    places = hook_points(table)
    ax = style.axes(ax, 2.6 + 0.26 * len(places), 3.2)
    tokens, lenses = list(dict.fromkeys(table["token"])), list(dict.fromkeys(table["lens"]))
    for token, lens in product(tokens, lenses):
        line = table.loc[(table["token"] == token) & (table["lens"] == lens), :]
        values = line.set_index("hook_point")[column].reindex(places)
        color = tuple(expert_color(tokens.index(token)))
        ax.plot(np.arange(len(places)), values, color=color, linestyle=DASHES[lens], marker="o", markersize=3.5)
    if column == "rank":
        worst = max(1, int(table["rank"].to_numpy().max()))
        ax.set_yscale("symlog", linthresh=1, linscale=0.5)
        ticks = [0, *(10**power for power in range(int(np.log10(worst)) + 1))]
        ax.set_yticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_ylim(1.5 * worst, -0.3)
    _label_places(ax, places)
    ax.set_ylabel(SCORES[column])
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    handles = [
        Line2D([], [], color=tuple(expert_color(index)), marker="o", markersize=3.5, label=token_label(token, 20))
        for index, token in enumerate(tokens)
    ]
    legend_beside(ax, handles + (_lens_handles(lenses) if len(lenses) > 1 else []))
    return ax


def divergence(table: pd.DataFrame, *, column: str = "kl", ax: Axes | None = None) -> Axes:
    """Draws how far a lens is from the model at each place: the mean over all tokens, and the middle half of them.

    Args:
        table: As `tables.logit_lens.top_tokens` gives it; of two lenses if they are joined with `pandas.concat`.
        column: "kl", or "entropy".
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no such column, or no number in it.
    """
    _check_column(table, column, MEASURES)
    own = table.loc[(table["rank"] == 0) & table[column].notna(), :]
    if own.empty:
        raise ValueError(f"column={column!r} was to be drawn, but it has no number: the run has no logits there.")
    places, lenses = hook_points(own), list(dict.fromkeys(own["lens"]))
    ax = style.axes(ax, 2.2 + 0.26 * len(places), 3.0)
    x = np.arange(len(places))
    for lens, color in zip(lenses, (style.BLUE, style.ORANGE), strict=False):
        groups = own.loc[own["lens"] == lens, :].groupby("hook_point")[column]
        low, high = (groups.quantile(share).reindex(places).to_numpy(dtype=float) for share in (0.25, 0.75))
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ax.plot(x, groups.mean().reindex(places), color=color, marker="o", markersize=3.5, label=f"{lens} lens")
    _label_places(ax, places)
    ax.set_ylabel(MEASURES[column])
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    if len(lenses) > 1:
        legend_beside(ax)
    return ax


def hook_points(table: pd.DataFrame) -> list[str]:
    """The hook points of a table in the order of the forward pass."""
    own = table.drop_duplicates("hook_point")
    layers = own["layer"].astype(float).where(own["kind"] != "final_norm", np.inf).fillna(-1.0)
    keys = zip(layers, [ORDER.index(kind) for kind in own["kind"]], own["hook_point"], strict=True)
    return [name for _, _, name in sorted(keys)]


def place_labels(places: list[str]) -> list[str]:
    """Short names of hook points: the layer, with the kind where there are several kinds."""
    kinds = {name.rsplit(".", 1)[-1] for name in places if name.startswith("layers.")}
    labels = []
    for name in places:
        layer, _, kind = name.removeprefix("layers.").partition(".")
        short = layer if len(kinds) == 1 else f"{layer} {kind.removeprefix('resid_')}"
        labels.append(WHOLE.get(name, short))
    return labels


def places_label(places: list[str]) -> str:
    """What the hook points are: `layer (resid_post)` if they are of one kind."""
    kinds = {name.rsplit(".", 1)[-1] for name in places if name.startswith("layers.")}
    return f"layer ({kinds.pop()})" if len(kinds) == 1 else "place in the residual stream"


def scale(table: pd.DataFrame, column: str) -> Normalize:
    """The range of the colours: probabilities from 0 to 1, the others from or to 0."""
    values = table[column].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    if column == "prob":
        return Normalize(0.0, 1.0)
    low, high = (float(values.min()), 0.0) if column == "log_prob" else (0.0, float(values.max(initial=0.0)))
    return Normalize(low, high) if low < high else Normalize(low, low + 1.0)


def _best(table: pd.DataFrame, column: str, row: int) -> pd.DataFrame:
    _check_column(table, column, MEASURES)
    own = style.only(table, "row", row)
    return own.loc[own["rank"] == 0, :]


def _check_column(table: pd.DataFrame, column: str, known: dict[str, str]) -> None:
    if column not in known or column not in table:
        found = ", ".join(name for name in known if name in table) or "none"
        raise ValueError(f"column={column!r} was to be drawn; the table has {found}.")


def _write(ax: Axes, tokens: pd.DataFrame, picture, width: float, height: float) -> None:
    """Writes the tokens into their cells, all of one size, where there is room for some characters."""
    values = np.asarray(picture.get_array())
    size = min(LARGE, 0.62 * height, max(SMALL, width / (0.6 * LONGEST)))
    longest = int(width / (0.6 * size))
    if size < SMALL or longest < 3:
        return
    for (y, x), token in np.ndenumerate(tokens.to_numpy()):
        if isinstance(token, str):
            color, label = (
                style.ink_on(picture.to_rgba(values[y, x])[:3]),
                token_label(token, min(longest, 2 * LONGEST)),
            )
            ax.text(x, y, label, ha="center", va="center", fontsize=size, color=color, clip_on=True)


def _label_places(ax: Axes, places: list[str]) -> None:
    labels = np.array(place_labels(places))
    width = style.cell_size(ax, len(places), 1)[0]
    longest = max(map(len, labels))
    turned = longest > 5
    room = width / (9 if turned else 6 + 5.0 * longest)
    style.number_ticks(ax.xaxis, np.arange(len(places)), labels, room=room)
    ax.tick_params(axis="x", rotation=90 if turned else 0)
    ax.set(xlabel=places_label(places), xlim=(-0.4, len(places) - 0.6))


def _lens_handles(lenses: list[str]) -> list[Line2D]:
    return [Line2D([], [], color=style.INK, linestyle=DASHES[lens], label=f"{lens} lens") for lens in lenses]
