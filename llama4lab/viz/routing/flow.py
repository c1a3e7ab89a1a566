"""How tokens flow from the experts of one layer to those of later ones."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.patheffects import withStroke

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.flow_layout import OTHER, Flow, lay_out

BAR = 0.045  # half the width of an expert's bar; layers are 1 apart
REST = "0.72"  # of the experts that are merged


def transitions(table: pd.DataFrame, *, ax: Axes | None = None, most: int = 16, least: float = 0.005) -> Axes:
    """Draws how tokens flow from layer to layer: a bar for each expert, and ribbons in the colour of their source.

    Bars and ribbons are as high as their share of the layer's tokens. In each layer, experts are ordered so that
    ribbons cross little. Small experts share one grey bar, and weak ribbons are left out; the text below says how much.

    Args:
        table: As `tables.routing.transitions` gives it, of layers that form a chain.
        ax: Where to draw; a new figure by default.
        most: The most experts of a layer that have a bar of their own.
        least: Ribbons with a smaller share of the tokens are left out.

    Raises:
        ValueError: if the layers form no chain, or there are no tokens.
    """
    check(table, "from_layer", "to_layer", "from_expert", "to_expert", "tokens")
    if most < 1 or not 0 <= least < 1:
        raise ValueError(f"most={most} and least={least} were given; most is at least 1, least a share from 0 to 1.")
    flow = lay_out(table, most, least)
    bars = max(len(own) for own in flow.nodes)
    ax = style.axes(ax, 1.2 + (1.9 if len(flow.layers) <= 6 else 1.2) * (len(flow.layers) - 1), 2.8 + 0.14 * bars)
    for link in flow.links.sort_values("tokens", ascending=False).to_dict("records"):
        ends = (link["step"] + BAR, link["step"] + 1 - BAR)
        ax.add_patch(_ribbon(ends, (link["from_top"], link["to_top"]), link["height"], link["from_expert"]))
    _bars(ax, flow)
    ax.set(xlim=(-0.16, len(flow.layers) - 0.84), ylim=(1.01, -0.01))
    ax.set_xticks(range(len(flow.layers)), [str(layer) for layer in flow.layers])
    ax.set_yticks([])
    ax.set_xlabel("layer" + _note(flow, least))
    ax.set_ylabel("share of tokens, by expert")
    ax.tick_params(axis="x", length=0)
    style.plain(ax, keep=())
    return ax


def _ribbon(x: tuple[float, float], top: tuple[float, float], height: float, expert: int) -> PathPatch:
    """A band that leaves and arrives level."""
    middle = sum(x) / 2
    upper = [(x[0], top[0]), (middle, top[0]), (middle, top[1]), (x[1], top[1])]
    lower = [(across, down + height) for across, down in reversed(upper)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    color = REST if expert == OTHER else tuple(expert_color(expert))
    alpha = 0.3 if expert == OTHER else 0.55
    return PathPatch(Path([*upper, *lower, upper[0]], codes), facecolor=color, alpha=alpha, linewidth=0)


def _bars(ax: Axes, flow: Flow) -> None:
    """The bars of the experts, with their numbers to the left where there is room."""
    points = style.cell_size(ax, 1, 1)[1]
    for step, nodes in enumerate(flow.nodes):
        written = -np.inf
        for node in nodes.to_dict("records"):
            color = REST if node["expert"] == OTHER else tuple(expert_color(node["expert"]))
            ax.add_patch(Rectangle((step - BAR, node["top"]), 2 * BAR, node["height"], facecolor=color, linewidth=0))
            middle = (node["top"] + node["height"] / 2) * points
            if middle - written < 7.0:
                continue
            written = middle
            name = "other" if node["expert"] == OTHER else str(node["expert"])
            text = ax.text(step - BAR - 0.015, middle / points, name, ha="right", va="center", fontsize=7.5)
            text.set_path_effects([withStroke(linewidth=1.8, foreground="white", alpha=0.7)])


def _note(flow: Flow, least: float) -> str:
    """What is merged and left out, as text below the plot."""
    parts = []
    merged = [own.loc[own["expert"] == OTHER, "tokens"].sum() for own in flow.nodes]
    if max(merged) > 0:
        parts.append(f"other: the smaller experts, up to {max(merged):.0%} of a layer's tokens")
    if flow.left_out > 0:
        parts.append(f"left out: ribbons below {least:.1%}, together {flow.left_out:.0%} of the tokens")
    return "".join(f"\n{part}" for part in parts)
