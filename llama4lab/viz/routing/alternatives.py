"""What would have followed if a token had gone to another expert."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.routing.checking import check
from llama4lab.viz.token_axis import label_tokens, token_label

PLACE = ("row", "layer", "position", "slot")
ROUNDING = 1e-5


def counterfactual(table: pd.DataFrame, *, ax: Axes | None = None, most: int = 24) -> Axes:
    """Draws what one token's other experts would have changed: a bar for each expert, the best for the metric on top.

    The chosen expert has a frame and bold letters. Beside each bar is the next token that the model would have put
    first. Of many experts, the best, the worst and the chosen are drawn, and a line says how many are left out.

    Args:
        table: As `tables.routing.counterfactual` gives it, of one row, layer, position and slot.
        ax: Where to draw; a new figure by default.
        most: The most experts to draw.

    Raises:
        ValueError: if the table has several places (draw their `regret`), or `most` is less than 3.
    """
    check(table, *PLACE, "expert", "chosen", "effect", "token")
    if most < 3:
        raise ValueError(f"most={most} experts were to be drawn; at least 3 are.")
    for column in PLACE:
        style.only_one(table, column)
    lower = table.attrs.get("lower_is_better")
    order = table.sort_values(["effect", "expert"], ascending=[bool(lower), True], ignore_index=True)
    shown, gap = _shown(order, most)
    ax = style.axes(ax, 6.4, 1.3 + 0.23 * len(shown))
    place = np.arange(len(shown)) + np.where(np.arange(len(shown)) >= gap, 1.0, 0.0)
    effect, chosen = shown["effect"].to_numpy(dtype=float), shown["chosen"].to_numpy(dtype=bool)
    bars = ax.barh(place, effect, height=0.76, color=expert_colors(shown["expert"].to_numpy()))
    ax.axvline(0, color=style.INK, linewidth=0.8)
    _label_bars(ax, shown, place, chosen)
    for bar, own in zip(bars, chosen, strict=True):
        bar.set(edgecolor=style.INK if own else "none", linewidth=1.4)
    if chosen.any():  # its bar has no length: a mark says where it stands
        ax.scatter(effect[chosen], place[chosen], 28, color=style.INK, zorder=3, marker="D")
    if gap < len(shown):
        text = f"… {len(order) - len(shown)} others between them"
        ax.text(0.5, gap, text, transform=ax.get_yaxis_transform(), ha="center", va="center", color="0.4", fontsize=8)
        ax.texts[-1].set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    ax.set_ylim(place[-1] + 0.6, -0.6)
    ax.margins(x=0.06)
    if np.abs(effect).max() < ROUNDING:
        ax.set_xlim(-ROUNDING, ROUNDING)  # nothing but rounding, which is to look like nothing
    line = table.iloc[0]
    ax.set_title(
        f"{token_label(line['token'])} at position {line['position']}, layer {line['layer']}", fontsize="medium"
    )
    good = "" if lower is None else f" ({'negative' if lower else 'positive'}: better)"
    ax.set(xlabel=f"effect on {table.attrs.get('metric', 'metric')}{good}", ylabel="expert")
    ax.grid(axis="x", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax, keep=("bottom",))
    return ax


def regret(table: pd.DataFrame, *, ax: Axes | None = None, row: int = 0) -> Axes:
    """Draws how much better the best expert would have been: layers upwards, tokens to the right.

    White is a choice that no other expert beats. Where cells have room, they say which expert would have been best.
    Slots of a token lie above each other, the first on top.

    Args:
        table: As `tables.routing.regret` gives it.
        ax: Where to draw; a new figure by default.
        row: Row of the prompt.

    Raises:
        ValueError: if the table has no such row.
    """
    check(table, *PLACE, "token", "expert", "best", "regret")
    own = style.only(table, "row", row)
    layers, positions, slots = (np.unique(own[column]) for column in ("layer", "position", "slot"))
    x = np.searchsorted(positions, own["position"])
    up = len(slots) - 1 - np.searchsorted(slots, own["slot"])
    y = np.searchsorted(layers, own["layer"]) * len(slots) + up
    values = np.full((len(layers) * len(slots), len(positions)), np.nan)
    values[y, x] = own["regret"]
    ax = style.axes(ax, 2.4 + 0.27 * len(positions), max(2.8, 1.6 + 0.26 * len(values)))
    ax.set_facecolor("0.93")
    top = max(float(np.nanmax(values)), 1e-9)
    picture = ax.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest", cmap=style.SEQUENTIAL, vmin=0, vmax=top
    )
    width, height = style.cell_size(ax, len(positions), len(values))
    size = style.number_size(width, height, int(own["best"].to_numpy().max()))
    better = own["best"].to_numpy() != own["expert"].to_numpy()
    for column, line, best in zip(x[better], y[better], own["best"].to_numpy()[better], strict=True) if size else ():
        color = style.ink_on(picture.to_rgba(values[line, column])[:3])
        ax.text(column, line, str(best), ha="center", va="center", fontsize=size, color=color)
    for border in range(1, len(layers)):
        ax.axhline(border * len(slots) - 0.5, color="0.85", linewidth=0.6 if len(slots) == 1 else 1.8)
    tokens = own.drop_duplicates("position").sort_values("position")["token"].tolist()
    label_tokens(ax, tokens, positions.tolist(), width)
    middle = np.arange(len(layers)) * len(slots) + (len(slots) - 1) / 2
    style.number_ticks(ax.yaxis, middle, layers, room=height * len(slots) / 11)
    ax.set(xlabel="token", ylabel="layer")
    style.plain(ax)
    metric = table.attrs.get("metric", "metric")
    style.color_bar(ax, picture, f"regret: {metric}" + ("\n(number: best expert)" if size else ""))
    return ax


def _shown(order: pd.DataFrame, most: int) -> tuple[pd.DataFrame, int]:
    """The lines to draw, and before which of them lines are left out."""
    if len(order) <= most:
        return order, len(order)
    first, last = (most - 1) // 2 + (most - 1) % 2, (most - 1) // 2
    place = int(np.argmax(order["chosen"].to_numpy(dtype=bool)))  # the first, if none is marked
    kept = sorted({*range(first), place, *range(len(order) - last, len(order))})
    # A chosen expert in the middle is drawn above the gap.
    return order.iloc[kept], first + int(first <= place < len(order) - last)


def _label_bars(ax: Axes, shown: pd.DataFrame, place: np.ndarray, chosen: np.ndarray) -> None:
    ax.set_yticks(place, [str(expert) for expert in shown["expert"]])
    for label, own in zip(ax.get_yticklabels(), chosen, strict=True):
        label.set_fontweight("bold" if own else "normal")
    ax.tick_params(axis="y", length=0)
    if "top_token" not in shown:
        return
    side = ax.get_yaxis_transform()
    for y, own, token, prob in zip(place, chosen, shown["top_token"], shown["top_prob"], strict=True):
        text = f"{token_label(token, 16)}  {prob:.2f}" + ("  (chosen)" if own else "")
        weight = "bold" if own else "normal"
        ax.text(1.02, y, text, transform=side, va="center", fontsize=8, fontweight=weight, clip_on=False)
    ax.text(1.02, -1.0, "next token", transform=side, va="center", fontsize=8, color="0.4")
