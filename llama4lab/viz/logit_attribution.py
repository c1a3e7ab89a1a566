"""Plots of `llama4lab.tables.logit_attribution`."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.token_axis import token_label

OTHERS = ("expert", "shared_expert", "mlp", "bias")  # the columns beside the heads
NAMES = {
    "embed": "embedding",
    "head": "head",
    "expert": "expert",
    "shared_expert": "shared expert",
    "mlp": "MLP",
    "bias": "attention bias",
    "rounding": "rounding",
}
COLORS = {"head": style.BLUE, "expert": style.ORANGE, "shared_expert": "#7a5195", "mlp": "#2a9d8f"}


def contributions(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws what each part adds to a logit at one position: layers upwards, heads to the right, then the experts.

    White is nothing, and grey a part that the layer does not have. The cells of the routed experts have the numbers of
    those that the token visited. The title has the whole, and what the embedding brings.

    Args:
        table: As `tables.logit_attribution.contributions` gives it, of one row and position.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has several rows or positions.
    """
    _check_one(table)
    parts = table.loc[table["layer"].notna(), :]
    numbers = parts["head"].astype("object").where(parts["part"] == "head", parts["part"])
    cells = parts.assign(column=numbers).pivot_table(
        index="layer", columns="column", values="contribution", aggfunc="sum"
    )
    heads = sorted(column for column in cells if not isinstance(column, str))
    others = [part for part in OTHERS if part in cells]
    cells = cells[[*heads, *others]]
    wide = 2.0 if len(heads) > 12 else 1.0  # cells with the numbers of experts need more room than those of many heads
    edges = np.cumsum([-0.5, *[1.0] * len(heads), *[wide] * len(others)])
    ax = style.axes(ax, 2.4 + 0.42 * edges[-1], max(2.8, 1.9 + 0.3 * len(cells)))
    values = cells.to_numpy(dtype=float)
    ax.set_facecolor("0.93")
    lines = np.arange(len(cells) + 1) - 0.5
    picture = ax.pcolormesh(edges, lines, values, cmap=style.DIVERGING, norm=style.centred(values), rasterized=True)
    ax.axvline(len(heads) - 0.5, color=style.GREY, linewidth=0.8)
    width, height = style.cell_size(ax, int(np.ceil(edges[-1] + 0.5)), len(cells))
    _label(ax, cells, edges, len(heads), width, height)
    if "expert" in others:
        column = len(heads) + others.index("expert")
        middle = (edges[column] + edges[column + 1]) / 2
        _name_experts(ax, parts, cells["expert"], middle, picture, (wide * width, height))
    ax.set_title(_title(table), fontsize="medium")
    style.plain(ax, keep=())
    style.color_bar(ax, picture, "contribution")
    return ax


def largest(table: pd.DataFrame, k: int = 12, *, ax: Axes | None = None) -> Axes:
    """Draws the parts that add or take most, as bars, and the sum of all others.

    Args:
        table: As `tables.logit_attribution.contributions` gives it, of one row and position.
        k: How many parts.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: if the table has several rows or positions, or `k` is less than 1.
    """
    _check_one(table)
    if k < 1:
        raise ValueError(f"k={k} parts were to be drawn; k is at least 1.")
    order = np.argsort(-table["contribution"].abs().to_numpy(dtype=float), kind="stable")
    shown, rest = table.iloc[order[:k]], table["contribution"].iloc[order[k:]]
    labels = [_name(line) for line in shown.to_dict("records")]
    values, colors = shown["contribution"].tolist(), [COLORS.get(part, style.GREY) for part in shown["part"]]
    if len(rest):
        labels, values, colors = [*labels, f"{len(rest)} others"], [*values, rest.sum()], [*colors, "0.8"]
    ax = style.axes(ax, 5.6, 1.2 + 0.24 * len(values))
    place = np.arange(len(values))
    ax.barh(place, values, height=0.78, color=colors)
    ax.axvline(0, color=style.INK, linewidth=0.8)
    ax.set_yticks(place, labels)
    ax.set(xlabel=f"contribution to {measure(table)}", ylim=(len(values) - 0.4, -0.6))
    ax.grid(axis="x", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    style.plain(ax)
    kinds = [part for part in COLORS if part in set(shown["part"])]
    legend_beside(ax, [Patch(color=COLORS[part], label=NAMES[part]) for part in kinds])
    return ax


def measure(table: pd.DataFrame) -> str:
    """What was split: `logit of ·Paris`, or `logit difference ·Paris − ·Rome`."""
    what, of, minus = (table.attrs.get(name) for name in ("measure", "of", "minus"))
    if of is None or (minus is None and what == "logit difference"):
        return str(what or "logit")
    names = [token_label(token, 20) for token in (of, minus) if token is not None]
    return f"logit of {names[0]}" if len(names) == 1 else f"logit difference {names[0]} − {names[1]}"


def _check_one(table: pd.DataFrame) -> None:
    for column in ("row", "position"):
        style.only_one(table, column)


def _title(table: pd.DataFrame) -> str:
    embedding = table.loc[table["part"] == "embed", "contribution"].sum()
    return f"{measure(table)}: {table['contribution'].sum():.2f}\n(embedding {embedding:.2f})"


def _name(line: dict) -> str:
    """A part in words: `layer 5, expert 1`."""
    name = NAMES[line["part"]]
    if line["part"] in ("head", "expert"):
        name = f"{name} {line[line['part']]}"
    return name if pd.isna(line["layer"]) else f"layer {line['layer']}, {name}"


def _label(ax: Axes, cells: pd.DataFrame, edges: np.ndarray, heads: int, width: float, height: float) -> None:
    step = next((step for step in (1, 2, 4, 8, 16) if step * width >= 14), 32)
    middles = (edges[1:] + edges[:-1]) / 2
    numbers = list(range(0, heads, step))
    names = [NAMES[part] for part in cells.columns[heads:]]
    ax.set_xticks([*middles[numbers], *middles[heads:]], [*(str(cells.columns[place]) for place in numbers), *names])
    for label in ax.get_xticklabels()[len(numbers) :]:
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    below = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center", "va": "top"}
    ax.annotate("head", (heads / 2 - 0.5, 0), (0, -20), **below)
    style.number_ticks(ax.yaxis, np.arange(len(cells)), cells.index.to_numpy(), room=height / 11)
    ax.set_ylabel("layer")


def _name_experts(
    ax: Axes, parts: pd.DataFrame, values: pd.Series, x: float, picture, cell: tuple[float, float]
) -> None:
    """Writes the numbers of the experts into their cells, where they have room."""
    experts = parts.loc[parts["part"] == "expert", :].groupby("layer")["expert"].agg(list)
    for line, (layer, value) in enumerate(values.items()):
        names = " ".join(str(expert) for expert in experts.get(layer, []))
        size = min(8.0, 0.6 * cell[1], 1.6 * cell[0] / max(1, len(names)))
        if names and size >= 4.5:
            color = style.ink_on(picture.to_rgba(value)[:3])
            ax.text(x, line, names, ha="center", va="center", fontsize=size, color=color)
