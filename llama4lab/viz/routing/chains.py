"""What choices in one layer, or at one token, say about the next."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.heat_map import draw_map, write_values
from llama4lab.viz.routing.panels import panels_in
from llama4lab.viz.token_axis import token_label


def information(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how much the expert of one layer says about that of a later one.

    For a chain of layers, a bar for each pair: what is known (blue) out of what there is to know (the grey entropy of
    the later layer), and a red line at what independent choices would seem to know with so few tokens. For all pairs of
    layers, a map of the known share.

    Args:
        table: As `tables.routing.information` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no line.
    """
    check(table, "from_layer", "to_layer", "mutual_information", "entropy", "normalised", "chance")
    if len(table) > len(np.unique(table["from_layer"])):
        return _information_map(table, ax)
    ax = style.axes(ax, 2.6 + 0.42 * len(table), 3.2)
    place = np.arange(len(table))
    ax.bar(place, table["entropy"], 0.8, color="0.9", label="entropy of the later layer")
    ax.bar(place, table["mutual_information"], 0.8, color=style.BLUE, label="mutual information")
    ax.hlines(table["chance"], place - 0.4, place + 0.4, color=style.LINE, linewidth=1.8, label="chance")
    labels = [f"{before}→{after}" for before, after in zip(table["from_layer"], table["to_layer"], strict=True)]
    turned = style.cell_size(ax, len(table), 1)[0] < 6.5 * max(map(len, labels))
    width = style.cell_size(ax, len(table), 1)[0]
    style.number_ticks(ax.xaxis, place, np.array(labels), room=width / 11 if turned else 1.0)
    ax.tick_params(axis="x", length=0, rotation=90 if turned else 0)
    ax.set(xlabel="layers", ylabel="information (nats)", xlim=(-0.6, len(table) - 0.4))
    style.plain(ax)
    legend_beside(ax)
    return ax


def repetition(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how often consecutive tokens go to the same expert, layer by layer, and how often they would by chance.

    Args:
        table: As `tables.routing.repetition` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no line.
    """
    check(table, "layer", "share", "chance")
    own = table.sort_values("layer")
    ax = style.axes(ax, 3.0 + 0.2 * len(own), 2.8)
    ax.plot(own["layer"], own["share"], color=style.BLUE, marker="o", markersize=3.5, label="same expert")
    ax.plot(own["layer"], own["chance"], color=style.GREY, linestyle="--", marker=".", markersize=3.5, label="chance")
    style.number_ticks(
        ax.xaxis, own["layer"].to_numpy(), own["layer"].to_numpy(), style.cell_size(ax, len(own), 1)[0] / 17
    )
    ax.set(xlabel="layer", ylabel="share of neighbouring tokens")
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    style.plain(ax)
    legend_beside(ax)
    return ax


def paths(table: pd.DataFrame, *, ax: Axes | None = None, most: int = 16) -> Axes:
    """Draws the commonest ways of tokens through the layers: coloured strings of experts, and their shares as bars.

    Several experts of a token in one layer stand side by side. With labels, a bar has the colour of the commonest label
    of its tokens, and beside it is the purity: the share of that label.

    Args:
        table: As `tables.routing.paths` gives it.
        ax: Where to draw; a new figure by default.
        most: The most paths.

    Raises:
        ValueError: if the table has no line, or `most` is less than 1.
    """
    check(table, "path", "tokens", "share")
    if most < 1:
        raise ValueError(f"most={most} paths were to be drawn; at least 1 is.")
    shown = table.sort_values("tokens", ascending=False, kind="stable").head(most)
    experts = np.array(
        [[[int(expert) for expert in step.split("+")] for step in path.split("-")] for path in shown["path"]]
    )
    steps, slots = experts.shape[1:]
    experts = experts.reshape(len(shown), -1)
    wide = float(np.clip(0.3 * experts.shape[1], 1.2, 6.5))
    ax = style.axes(ax, wide + 4.2, 1.2 + 0.27 * len(shown))
    ((strings, bars),) = panels_in(ax, 1, 2, widths=[wide, 2.6])
    _strings(strings, experts, slots)
    layers = np.array(table.attrs.get("layers", range(steps)))
    room = style.cell_size(strings, steps, 1)[0] / 17
    style.number_ticks(strings.xaxis, np.arange(steps) * slots + (slots - 1) / 2, layers, room)
    strings.set(xlabel="layer", ylabel="path")
    _share_bars(bars, shown)
    bars.set_ylim(strings.get_ylim())
    return ax


def _strings(ax: Axes, experts: np.ndarray, slots: int) -> None:
    """A row of coloured cells for each path, with the numbers of the experts where they have room."""
    lines, cells = experts.shape
    ax.imshow(expert_colors(experts), aspect="auto", interpolation="nearest")
    width, height = style.cell_size(ax, cells, lines)
    size = style.number_size(width, height, int(experts.max()))
    for (y, x), expert in np.ndenumerate(experts) if size else ():
        color = style.ink_on(expert_colors(np.array(expert)))
        ax.text(x, y, str(expert), ha="center", va="center", fontsize=size, color=color)
    for border in range(1, lines):
        ax.axhline(border - 0.5, color="white", linewidth=2.0)
    for border in range(slots, cells, slots):
        ax.axvline(border - 0.5, color="white", linewidth=0.6 if slots == 1 else 1.6)
    ax.set_yticks([])
    ax.tick_params(length=0)
    style.plain(ax, keep=())


def _share_bars(ax: Axes, shown: pd.DataFrame) -> None:
    """Shares of paths, coloured by label where there are labels."""
    place, share = np.arange(len(shown)), shown["share"].to_numpy(dtype=float)
    labels = sorted(set(shown["label"])) if "label" in shown else []
    colors = {label: tuple(expert_colors(np.array(number))) for number, label in enumerate(labels)}
    ax.barh(place, share, 0.78, color=[colors[label] for label in shown["label"]] if labels else style.BLUE)
    for y, x, value in zip(place.tolist(), share.tolist(), shown["purity"], strict=True) if "purity" in shown else ():
        ax.text(x, y, f" {value:.0%}", va="center", fontsize=7.5, color="0.35")
    ax.margins(x=0.16 if "purity" in shown else 0.05)
    ax.set_xlim(left=0)
    ax.set_yticks([])
    ax.set_xlabel("share of tokens" + ("\n(number: purity)" if "purity" in shown else ""))
    style.plain(ax, keep=("bottom",))
    if labels:
        patches = [Patch(color=colors[label], label=token_label(str(label), 20)) for label in labels]
        legend_beside(ax, patches, title="commonest label")


def _information_map(table: pd.DataFrame, ax: Axes | None) -> Axes:
    values = table.pivot(index="from_layer", columns="to_layer", values="normalised")
    ax = style.axes(ax, 2.6 + 0.32 * len(values.columns), 1.6 + 0.3 * len(values))
    look = {"cmap": style.SEQUENTIAL, "vmin": 0, "vmax": max(float(np.nanmax(values.to_numpy(dtype=float))), 1e-9)}
    marked = np.zeros(values.shape, dtype=bool)
    picture = draw_map(ax, values, marked=marked, names=("earlier layer", "later layer"), **look)
    write_values(ax, values.to_numpy(dtype=float), picture)
    style.color_bar(ax, picture, "mutual information / entropy\nof the later layer")
    return ax
