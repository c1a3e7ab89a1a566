"""Plots of circuits: `Circuit.table` as a graph, and faithfulness curves."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from llama4lab.viz import style
from llama4lab.viz.circuit_layout import HEIGHTS, Spot, key_of, spots, ties
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.legend import legend_beside

NAMES = {"embed": "embedding", "logits": "logits", "router": "router", "shared_expert": "shared", "mlp": "MLP"}
FILLS = {"mlp": "#e4e4e4", "shared_expert": "#e4e4e4", "router": "#ffffff", "k": "#ffffff", "v": "#ffffff"}
HALF = 0.085  # half the height of a node, in layers
DASHES = ("-", "--", ":", "-.")


def graph(table: pd.DataFrame, *, ax: Axes | None = None, limit: float | int | None = None) -> Axes:
    """Draws a circuit: layers upwards, a node for each part with an edge, the edges coloured and widened by score.

    Layers without a node are left out. Heads are circles named layer.head. An edge into a query ends at its head; one
    into a key or a value ends at the KV head (`k0`, `v0`), from where a grey line goes to every drawn head that shares
    it. Experts have their own colours; a grey line ties them to their router. Orange edges raise the metric when they
    are swapped, blue ones lower it.

    Args:
        table: As `Circuit.table` gives it. A hundred edges can be read, five hundred hardly.
        ax: Where to draw; a new figure by default.
        limit: The score of the strongest colour; by default the largest of the table.

    Raises:
        ValueError: if the table has no edge.
    """
    if table.empty:
        raise ValueError("A circuit was to be drawn, but it has no edge.\nTake more edges: attribution.top(100).")
    placed = spots(table)
    places = np.array([(spot.x, spot.y) for spot in placed.values()])
    low, high = float(places[:, 1].min()), float(places[:, 1].max())
    width = float(np.ptp(places[:, 0]))
    ax = style.axes(ax, 2.8 + 1.0 * width, 0.8 + 0.98 * (high - low))
    norm = style.centred(table["score"].to_numpy() if limit is None else np.array([float(limit)]))
    for first, second in ties(table, placed):
        ax.plot([first.x, second.x], [first.y, second.y], color=style.GREY, linewidth=0.7, zorder=1.5)
    strongest = norm.vmax or 1.0
    order = np.argsort(np.abs(table["score"].to_numpy()), kind="stable")
    lines = table.iloc[order].to_dict("records")
    for rank, edge in enumerate(lines):
        path = _curve(placed[key_of(edge, "sender")], placed[key_of(edge, "receiver")])
        share = min(abs(edge["score"]) / strongest, 1.0)
        # White is no effect; weak edges keep enough colour to be seen.
        color = style.DIVERGING(0.5 + 0.5 * np.sign(edge["score"]) * (0.3 + 0.7 * share**0.5))
        line = {"edgecolor": color, "linewidth": 0.5 + 5.0 * share**0.5, "zorder": 1 + 0.4 * rank / len(lines)}
        ax.add_patch(PathPatch(path, facecolor="none", capstyle="round", **line))
    for spot in placed.values():
        _node(ax, spot)
    _frame(ax, placed, places)
    metric = table.attrs.get("metric", "metric")
    shown = ScalarMappable(norm, _edge_colors())
    style.color_bar(ax, shown, f"estimated effect on the {metric}")
    return ax


def faithfulness(
    curves: pd.DataFrame | Mapping[str, pd.DataFrame], *, ax: Axes | None = None, share: float | int | None = 0.8
) -> Axes:
    """Draws how much of the way from the corrupted to the clean run circuits of growing size go.

    Args:
        curves: As `faithfulness` gives it, or several by their labels.
        ax: Where to draw; a new figure by default.
        share: A level to mark, with the number of edges that first reach it; None for none.

    Raises:
        ValueError: if there is no curve.
    """
    several = curves if isinstance(curves, Mapping) else {"": curves}
    if not several:
        raise ValueError("Faithfulness was to be drawn, but there is no curve.")
    ax = style.axes(ax, 7.4, 3.2)
    for level in (0.0, 1.0):
        ax.axhline(level, color=style.GREY, linewidth=0.8, zorder=0)
    colors = [style.BLUE, style.ORANGE, style.INK, style.LINE]
    for number, (label, curve) in enumerate(several.items()):
        curve = curve.sort_values("edges", kind="stable")
        reached = curve.loc[curve["faithfulness"] >= share, "edges"] if share is not None else curve["edges"][:0]
        note = f"{share:.0%} with {reached.min()} edges" if len(reached) else ""
        ax.plot(
            curve["edges"],
            curve["faithfulness"],
            color=colors[number % len(colors)],
            linestyle=DASHES[number // len(colors) % len(DASHES)],
            marker="o",
            markersize=3.5,
            linewidth=1.8,
            label=": ".join(filter(None, (label, note))) or "_circuit",
        )
    if share is not None:
        ax.axhline(share, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    # No edge at all has its place too, left of the smallest circuit.
    sizes = np.concatenate([curve["edges"].to_numpy() for curve in several.values()])
    smallest = float(sizes[sizes > 0].min()) if (sizes > 0).any() else 1.0
    ax.set_xscale("symlog", linthresh=smallest, linscale=0.4)
    ax.set_xlim(0 if (sizes == 0).any() else 0.9 * smallest, 1.1 * max(float(sizes.max()), smallest))
    ticks = [0, *(tick for tick in (1, 10, 100, 1000, 10**4, 10**5, 10**6, 10**7) if smallest <= tick <= sizes.max())]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="edges in the circuit", ylabel="faithfulness")
    style.plain(ax)
    if any(not str(label).startswith("_") for label in ax.get_legend_handles_labels()[1]):
        legend_beside(ax)
    return ax


def _edge_colors():
    """The diverging map as edges use it: without the palest colours in the middle."""
    sides = [0.5 + 0.5 * sign * (0.3 + 0.7 * np.linspace(0, 1, 128) ** 0.5) for sign in (-1, 1)]
    places = np.concatenate([sides[0][::-1], sides[1]])
    return style.DIVERGING.from_list("llama4lab_edges", style.DIVERGING(places), N=256)


def _curve(start: Spot, end: Spot) -> Path:
    """From the top of the sender to the foot of the receiver; long edges bow outwards, past the nodes between."""
    low, high = start.y + HALF, end.y - HALF
    reach = high - low
    side = 1.0 if start.x + end.x >= 0 else -1.0
    bow = side * 0.28 * max(reach - 0.9, 0.0) ** 0.75 if abs(start.x - end.x) < 1.5 else 0.0
    points = [(start.x, low), (start.x + bow, low + 0.45 * reach), (end.x + bow, high - 0.45 * reach), (end.x, high)]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _node(ax: Axes, spot: Spot) -> None:
    fill: Any = FILLS.get(spot.part, "#ffffff")
    text = NAMES.get(spot.part, f"{spot.part}{spot.index}")
    shape = "round,pad=0.28,rounding_size=0.25"
    if spot.part == "head":
        text, shape = f"{spot.layer}.{spot.index}", "round,pad=0.3,rounding_size=0.9"
    elif spot.part == "expert":
        text, fill = f"{spot.index}", tuple(expert_color(spot.index))
    elif spot.part in ("embed", "logits"):
        fill = style.INK
    box = {"boxstyle": shape, "facecolor": fill, "edgecolor": style.INK, "linewidth": 0.8}
    small = spot.part in ("k", "v", "router")
    ax.text(
        *(spot.x, spot.y, text),
        ha="center",
        va="center",
        fontsize=6.5 if small else 8,
        color=style.ink_on(fill),
        bbox=box,
        zorder=3,
    )


def _frame(ax: Axes, placed: Mapping, places: np.ndarray) -> None:
    foot = {spot.layer: spot.y - HEIGHTS[spot.part] for spot in placed.values() if spot.part not in ("embed", "logits")}
    layers = sorted(foot)
    ax.set_xlim(places[:, 0].min() - 1.1, places[:, 0].max() + 1.1)
    ax.set_ylim(places[:, 1].min() - 0.25, places[:, 1].max() + 0.25)
    ax.set_yticks([foot[layer] + 0.4 for layer in layers], [str(layer) for layer in layers])
    for layer in layers[::2]:
        ax.axhspan(foot[layer] - 0.12, foot[layer] + 0.92, color="0.965", zorder=0, linewidth=0)
    ax.set_xticks([])
    ax.set_ylabel("layer")
    style.plain(ax, keep=())
    ax.tick_params(axis="y", length=0)
