"""What an expert answers to a stronger or weaker gate."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.panels import panels_in
from llama4lab.viz.token_axis import token_label

MOST = 10  # curves that a reader can follow


def gate_curve(table: pd.DataFrame, *, ax: Axes | None = None, column: str = "value") -> Axes:
    """Draws what an expert answers along the gate, in two panels: the size of what it writes, and the metric.

    A dot is the gate that the router gave. For one place, thin lines in the upper panel show what a gate on the output
    would do (proportional), and the answer of a gated MLP to small inputs (quadratic).

    Args:
        table: As `tables.routing.gate_curve` gives it, of one place or a few; of several the colours tell the experts.
        ax: Where to draw; a new figure by default.
        column: What the lower panel has: "value", "effect" or "cosine".

    Raises:
        ValueError: if there is no such column, or more than 10 curves.
    """
    check(table, "row", "layer", "position", "token", "expert", "gate", "own", "gain", column)
    keys = [name for name in ("row", "layer", "position", "slot") if name in table]
    curves = [curve.sort_values("gate") for _, curve in table.groupby(keys)]
    if len(curves) > MOST:
        raise ValueError(
            f"The table has {len(curves)} curves; {MOST} at most can be told apart.\n"
            'Choose a place: table[(table["layer"] == 3) & (table["position"] == 5)].'
        )
    ax = style.axes(ax, 5.2 if len(curves) == 1 else 6.4, 4.6)
    (upper,), (lower,) = panels_in(ax, 2)
    handles = []
    for number, curve in enumerate(curves):
        color = tuple(expert_color(int(curve["expert"].iloc[0])))
        dashes = ("-", (0, (5, 1)), (0, (1, 1)), "-.")[_earlier(curves[:number], curve) % 4]
        for panel, name in ((upper, "gain"), (lower, column)):
            panel.plot(curve["gate"], curve[name], color=color, linestyle=dashes, linewidth=1.8)
            own = curve.loc[curve["own"].to_numpy(dtype=bool), :]
            panel.scatter(own["gate"], own[name], 36, color=color, edgecolor="white", linewidth=1.0, zorder=4)
        handles.append(Line2D([], [], color=color, linestyle=dashes, marker="o", label=_name(curve, len(curves))))
    handles += _references(upper, curves[0]) if len(curves) == 1 else []
    upper.set_ylabel("size of what it writes\n(own gate: 1)")
    upper.set_ylim(bottom=0)
    upper.tick_params(labelbottom=False)
    metric = table.attrs.get("metric", "metric")
    labels = {"value": metric, "effect": f"effect on {metric}", "cosine": "cosine to what it writes\nby its own gate"}
    lower.ticklabel_format(axis="y", useOffset=False)
    lower.set(xlabel="gate (factor on the expert's input)", ylabel=labels.get(column, column))
    for panel in (upper, lower):
        panel.set_xlim(upper.get_xlim())
        panel.grid(color="0.93", linewidth=0.8)
        panel.set_axisbelow(True)
        style.plain(panel)
    legend_beside(upper, handles)
    if len(curves) == 1:
        line = curves[0].iloc[0]
        upper.set_title(
            f"{token_label(line['token'])} at position {line['position']}, layer {line['layer']}", fontsize="medium"
        )
    return ax


def _name(curve: pd.DataFrame, curves: int) -> str:
    line = curve.iloc[0]
    name = f"expert {line['expert']}"
    return name if curves == 1 else f"{token_label(line['token'])} [{line['position']}], layer {line['layer']}, {name}"


def _earlier(before: list[pd.DataFrame], curve: pd.DataFrame) -> int:
    """How many curves before have the same expert."""
    return sum(int(other["expert"].iloc[0] == curve["expert"].iloc[0]) for other in before)


def _references(ax: Axes, curve: pd.DataFrame) -> list[Line2D]:
    """The answers of a gate on the output, and of a gated MLP to small inputs."""
    own = curve.loc[curve["own"].to_numpy(dtype=bool), "gate"]
    if own.empty or float(own.iloc[0]) <= 0:
        return []
    gates = np.linspace(0.0, float(curve["gate"].to_numpy().max()), 60)
    relative, top = gates / float(own.iloc[0]), ax.get_ylim()[1]
    lines = []
    for power, name, dots in ((1, "proportional", "--"), (2, "quadratic", ":")):
        lines += ax.plot(gates, relative**power, color=style.GREY, linestyle=dots, linewidth=1.2, label=name, zorder=1)
    ax.set_ylim(0, top)
    return lines
