"""How much experts matter: what their ablation does, and what cheaper scores say."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import expert_patches, legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.heat_map import draw_map, write_values

NAMES = {
    "zero": "writes nothing",
    "mean": "writes its mean",
    "runner_up": "tokens to the runner-up",
    "shared_only": "shared expert only",
    "frequency": "share of tokens",
    "reap": "REAP: mean |f(gate x)|",
    "ean_sum": "EAN: sum of |f(x)|",
    "ean_mean": "EAN: mean |f(x)|",
}
SCORES = ("frequency", "reap", "ean_sum", "ean_mean", "tokens")
APART = np.array([20.0, 9.0])  # points between labels, to the right and upwards
LABELLED = 12  # of many experts, only those with the largest effects have labels


def importance(
    table: pd.DataFrame, *, x: str = "reap", y: str = "zero", ax: Axes | None = None, layer: int | None = None
) -> Axes:
    """Draws one measure of the experts' importance against another: a dot for each expert, larger with more tokens.

    Colours are those of the experts. Labels say `layer.expert`, or the expert alone for one layer; of many experts,
    those with the largest effects have labels. Experts without a token are left out.

    Args:
        table: As `tables.routing.importance` gives it.
        x: The measure to the right, by default a score that costs no ablation.
        y: The measure upwards, by default the effect of an ablation.
        ax: Where to draw; a new figure by default.
        layer: The layer; None for all.

    Raises:
        ValueError: if the table has no such measure or layer, or no expert with tokens.
    """
    check(table, "layer", "expert", "tokens", "frequency", x, y)
    own = table if layer is None else style.only(table, "layer", layer)
    own = own.loc[(own["tokens"] > 0) & own[x].notna() & own[y].notna(), :]
    if own.empty:
        raise ValueError("There is nothing to draw: no expert of the table serves a token.")
    ax = style.axes(ax, 5.4, 4.0)
    experts, frequency = own["expert"].to_numpy(), own["frequency"].to_numpy(dtype=float)
    size = (18 if len(own) <= 256 else 7) + 160 * frequency / frequency.max() * (1.0 if len(own) <= 64 else 0.4)
    ax.scatter(
        own[x], own[y], size, color=expert_colors(experts), edgecolor="white", linewidth=0.4, alpha=0.9, zorder=2
    )
    ax.margins(0.1)
    _label(ax, own, x, y, several=len(np.unique(own["layer"])) > 1)
    metric = table.attrs.get("metric", "metric")
    ax.set(xlabel=_axis_label(x, metric), ylabel=_axis_label(y, metric))
    for name, line in ((x, ax.axvline), (y, ax.axhline)):
        if name not in SCORES:
            line(0, color="0.85", linewidth=0.8, zorder=0)
    style.plain(ax)
    if layer is not None:
        ax.set_title(f"layer {layer}")
    legend_beside(ax, expert_patches(experts), title="expert")
    return ax


def rank_correlation(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how far measures of importance agree: Spearman's rank correlation of every two.

    Args:
        table: As `tables.routing.rank_correlation` gives it.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table is empty.
    """
    check(table)
    ax = style.axes(ax, 2.8 + 0.62 * len(table), 1.7 + 0.48 * len(table))
    values = table.rename(index=_spoken, columns=_spoken)
    picture = draw_map(ax, values, names=("", ""), cmap=style.DIVERGING, vmin=-1, vmax=1)
    places = np.arange(len(table))
    ax.set_xticks(places, list(values.columns), rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(places, list(values.index))
    write_values(ax, table.to_numpy(dtype=float), picture)
    style.color_bar(ax, picture, "rank correlation")
    return ax


def _spoken(name: str) -> str:
    return {"reap": "REAP", "ean_sum": "EAN sum", "ean_mean": "EAN mean"}.get(name, name.replace("_", " "))


def _axis_label(name: str, metric: str) -> str:
    words = NAMES.get(name, name.replace("_", " "))
    return words if name in SCORES else f"effect on {metric}\n({words})"


def _label(ax: Axes, own: pd.DataFrame, x: str, y: str, several: bool) -> None:
    order = np.argsort(-own[y].abs().to_numpy(dtype=float))
    shown = own.iloc[order[: len(own) if len(own) <= 20 else LABELLED]]
    columns = (shown[name] for name in ("layer", "expert", x, y))
    taken: list[np.ndarray] = []
    for layer, expert, right, up in zip(*columns, strict=True):
        place = ax.transData.transform((right, up)) * 72 / ax.figure.dpi
        if any((np.abs(place - other) < APART).all() for other in taken):
            continue  # its label would lie on that of a more important expert
        taken.append(place)
        name = f"{layer}.{expert}" if several else str(expert)
        text = ax.annotate(name, (right, up), (5, 4), textcoords="offset points", fontsize=7.5, zorder=3)
        text.set_path_effects([withStroke(linewidth=2.0, foreground="white")])
