"""Which experts serve which groups of tokens."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize

from llama4lab.viz import style
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.heat_map import draw_map, write_values
from llama4lab.viz.routing.panels import panels_in, shared_scale

MEASURES = {"share": "share of the group's tokens\n(red line: uniform)", "lift": "lift: share / share of all tokens"}
KNOWN = ("layer", "expert", "tokens", "share", "uniform", "lift", "group_tokens")
MOST_LIFT = 4.0  # doublings, up or down, at the ends of the scale


def specialization(
    table: pd.DataFrame,
    layer: int | None = None,
    *,
    ax: Axes | None = None,
    column: str = "share",
) -> Axes:
    """Draws which experts serve which groups of tokens: groups downwards and experts to the right, for one layer.

    Without a layer there is one panel for each group, with all layers: layers upwards and experts to the right. All
    panels have one scale. Where cells have room, × marks an expert without any token of the group (of lifts: without
    any at all).

    Args:
        table: As `tables.routing.specialization` gives it.
        layer: The layer; None for all.
        ax: Where to draw; a new figure by default.
        column: "share" of the group's tokens that the expert gets, with a line on the scale at the share that all
            experts would have if they had the same; or "lift", that share divided by the share of all tokens that the
            expert gets: orange is more often than others, blue less often. Its scale is logarithmic and ends at 16.

    Raises:
        ValueError: if the table has no such layer or column.
    """
    if column not in MEASURES:
        raise ValueError(f"column={column!r} was to be drawn; choose share or lift.")
    check(table, "layer", "expert", "tokens", "uniform", column)
    group = next((str(name) for name in table if name not in KNOWN), None)
    if group is None:
        raise ValueError("The table has no column of groups, such as group or modality.")
    own = table if layer is None else style.only(table, "layer", layer)
    shown = own.assign(shown=_logarithm(own["lift"].to_numpy(dtype=float)) if column == "lift" else own["share"])
    experts, groups = len(np.unique(shown["expert"])), len(set(shown[group]))
    look = _look(shown["shown"].to_numpy(dtype=float), column)
    if layer is None:
        ax, bar = _panels(shown, group, ax, look, column)
    else:
        ax = style.axes(ax, 2.6 + (0.42 if experts <= 32 else 0.1) * experts, 1.5 + 0.32 * groups)
        values, idle = _values(shown, group), _idle(shown, group, column)
        picture = draw_map(ax, values, marked=idle, names=(group, "expert"), **look)
        if column == "share":
            write_values(ax, values.mask(idle).to_numpy(), picture)
        ax.set_title(f"layer {layer}")
        bar = style.color_bar(ax, picture, MEASURES[column])
    _mark(bar, look, column, float(own["uniform"].iloc[0]))
    return ax


def risk_difference(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how much more often each expert is active in one corpus than in another: layers upwards, experts right.

    Orange experts are more active in the first (`a`), blue ones in the second (`b`).

    Args:
        table: As `tables.routing.risk_difference` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has no line.
    """
    check(table, "layer", "expert", "risk_difference")
    values = table.pivot(index="layer", columns="expert", values="risk_difference")
    ax = style.axes(
        ax, 2.4 + (0.3 if len(values.columns) <= 32 else 0.1) * len(values.columns), 1.6 + 0.28 * len(values)
    )
    norm = style.centred(values.to_numpy(dtype=float))
    picture = draw_map(ax, values, names=("layer", "expert"), cmap=style.DIVERGING, norm=norm)
    style.color_bar(ax, picture, "risk difference\n(rate in a − rate in b)")
    return ax


def _logarithm(lift: np.ndarray) -> np.ndarray:
    """Lift in doublings, as far as the scale goes."""
    with np.errstate(divide="ignore"):
        return np.log2(lift).clip(-MOST_LIFT, MOST_LIFT)


def _look(values: np.ndarray, column: str) -> dict[str, Any]:
    """Colours and range that all panels share."""
    if column == "lift":
        return {"cmap": style.DIVERGING, "norm": style.centred(values)}
    return {"cmap": style.SEQUENTIAL, "norm": Normalize(0.0, max(float(np.nanmax(values)), 1e-9))}


def _values(own: pd.DataFrame, rows: str, column: str = "shown") -> pd.DataFrame:
    return own.pivot(index=rows, columns="expert", values=column)


def _idle(own: pd.DataFrame, rows: str, column: str) -> np.ndarray:
    """The cells with a cross: experts without tokens of the group; of lifts, those without any."""
    return (_values(own, rows, "tokens") == 0 if column == "share" else _values(own, rows).isna()).to_numpy()


def _panels(
    shown: pd.DataFrame, group: str, ax: Axes | None, look: dict[str, Any], column: str
) -> tuple[Axes, Colorbar]:
    names, experts, layers = (np.unique(shown[name]) for name in (group, "expert", "layer"))
    columns = min(len(names), 3 if len(experts) <= 32 else 2)
    lines = -(-len(names) // columns)
    wide, high = float(np.clip(0.16 * len(experts), 2.2, 5.5)), float(np.clip(0.2 * len(layers), 1.3, 4.0))
    ax = style.axes(ax, 1.6 + columns * wide, 0.8 + lines * (high + 0.5))
    grid = panels_in(ax, lines, columns)
    for place, panel in enumerate(grid.flat):
        if place >= len(names):
            panel.set_axis_off()
            continue
        own = style.only(shown, group, names[place])
        draw_map(panel, _values(own, "layer"), marked=_idle(own, "layer", column), names=("layer", "expert"), **look)
        panel.set_title(str(names[place]), fontsize="medium")
        if place % columns:
            panel.set_ylabel("")
        if place + columns < len(names):
            panel.set_xlabel("")
    return ax, shared_scale(ax, grid, ScalarMappable(look["norm"], look["cmap"]), MEASURES[column])


def _mark(bar: Colorbar, look: dict[str, Any], column: str, uniform: float) -> None:
    if column == "share":
        bar.ax.axhline(uniform, color=style.LINE, linewidth=2.0)
        return
    reach = int(look["norm"].vmax)
    step = max(1, reach // 2)
    ticks = [*range(-step * (reach // step), 0, step), 0, *range(step, reach + 1, step)]
    bar.set_ticks(ticks, labels=[f"{2**tick}" if tick >= 0 else f"1/{2**-tick}" for tick in ticks])
