"""Plots of patching: `Sweep.table`, `Attribution.table` and `tables.attribution.compare`."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from llama4lab.tables.comparison import correlation
from llama4lab.viz import style
from llama4lab.viz.cell_grid import CellGrid, cell_grid, value_label
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import legend_beside
from llama4lab.viz.token_axis import label_tokens

MARKERS = "oDs^vP<>X"
LINE = 26  # characters of a line of a scale's label: what a low plot has room for


def effects(
    table: pd.DataFrame, *, column: str = "normalised", ax: Axes | None = None, limit: float | int | None = None
) -> Axes:
    """Draws what patching each cell did: a map of two axes or more, or the bars of one axis.

    Positions go to the right and layers upwards; of three axes, two share the rows (`layer.head`). White is no effect.
    A cross marks a cell that the sweep does not have or has not run.

    Args:
        table: As `Sweep.table`, one pair of `Sweep.by_row`, or `Attribution.table` gives it.
        column: The measure to draw: "normalised", "effect", "patched", "estimate", ...
        ax: Where to draw; a new figure by default.
        limit: The largest effect of the scale, so that several maps can share one; by default that of the table.

    Raises:
        ValueError: if the table has no such measure, or no number in it.
    """
    grid = cell_grid(table, column)
    if not np.isfinite(grid.values).any():
        raise ValueError(
            f"column={column!r} was to be drawn, but it has no number in any cell.\n"
            'Without a second run, or where both runs give the same, draw column="effect".'
        )
    ax = _bars(table, grid, column, ax) if not grid.row_axes else _map(table, grid, column, ax, limit)
    if grid.fixed:
        ax.set_title(", ".join(f"{axis} {value_label(value)}" for axis, value in grid.fixed.items()))
    return ax


def scatter(table: pd.DataFrame, *, ax: Axes | None = None, group: str = "component") -> Axes:
    """Draws estimated against true effects, one dot for each cell; on the dashed line both are the same.

    Args:
        table: As `tables.attribution.compare` gives it: with the columns `estimate` and `effect`.
        ax: Where to draw; a new figure by default.
        group: Column that colours the dots and, with several values, has a legend; ignored where it is missing.

    Raises:
        ValueError: if a column or a number is missing.
    """
    missing = [column for column in ("estimate", "effect") if column not in table]
    lost = 0 if missing else int((~np.isfinite(table[["estimate", "effect"]].to_numpy(dtype=float))).any(1).sum())
    if missing or lost or table.empty:
        found = f"has no column {missing[0]!r}" if missing else f"has no number for {lost} of {len(table)} cells"
        raise ValueError(f"Estimates were to be drawn against effects; the table {found}.")
    groups = list(table.groupby(group, sort=False)) if group in table else [("", table)]
    ax = style.axes(ax, 5.2 if len(groups) > 1 else 3.8, 3.6)
    size, alpha = (18.0, 0.8) if len(table) < 500 else (7.0, 0.5)
    for index, (name, own) in enumerate(groups):
        effect, estimate = own["effect"].to_numpy(dtype=float), own["estimate"].to_numpy(dtype=float)
        look = {"color": expert_colors(np.array([index])), "marker": MARKERS[index % len(MARKERS)]}
        label = f"{name} ({_correlation(effect, estimate)})"
        many = len(own) >= 1000  # as single shapes they would make a slow file
        ax.scatter(effect, estimate, size, **look, alpha=alpha, linewidth=0, label=label, rasterized=many)
    numbers = table[["effect", "estimate"]].to_numpy(dtype=float)
    margin = 0.05 * (float(np.ptp(numbers)) or 1.0)
    ends = float(numbers.min()) - margin, float(numbers.max()) + margin
    ax.plot(ends, ends, color=style.INK, linestyle="--", linewidth=0.8, zorder=0)
    for line in (ax.axhline, ax.axvline):
        line(0, color="0.88", linewidth=0.8, zorder=-1)
    metric = table.attrs.get("metric", "metric")
    ax.set(xlim=ends, ylim=ends, xlabel=f"effect on {metric}", ylabel=f"estimated effect on {metric}", aspect="equal")
    text = _correlation(numbers[:, 0], numbers[:, 1])
    ax.text(0.04, 0.96, text, transform=ax.transAxes, ha="left", va="top", fontsize="small")
    style.plain(ax)
    if len(groups) > 1:
        legend_beside(ax)
    return ax


def scale(table: pd.DataFrame, column: str, limit: float | int | None = None) -> Normalize:
    """The range of the colours: symmetric around no effect. For `patched`, that is the run without a patch.

    Args:
        table: As for `effects`.
        column: The measure.
        limit: The largest effect of the scale; by default that of the table.
    """
    middle = _unpatched(table) if column == "patched" else 0.0
    norm = style.centred(table[column].to_numpy(dtype=float) - middle)
    assert norm.vmax is not None
    reach = norm.vmax if limit is None else float(limit)
    if reach <= 0:
        raise ValueError(f"limit={limit} was given; the largest effect of the scale is above 0.")
    return Normalize(middle - reach, middle + reach)


def measure_label(table: pd.DataFrame, column: str) -> str:
    """What a measure is, with the name of the metric, for a scale or an axis."""
    metric, into = table.attrs.get("metric", "metric"), table.attrs.get("into")
    other = {"clean": "corrupted", "corrupted": "clean"}.get(str(into))
    known = f"\n(0: {into}, 1: {other})" if other else ""
    labels = {
        "normalised": f"normalised effect on {metric}{known}",
        "effect": f"effect on {metric}",
        "patched": f"{metric} when patched" + (f"\n(white: {into} run)" if other else ""),
        "estimate": f"estimated effect on {metric}",
        "first_order": f"first-order effect on {metric}",
    }
    return labels.get(column, f"{column.replace('_', ' ')}: {metric}")


def wrapped(label: str) -> str:
    """A label in lines that an axis has room for."""
    lines = [line if len(line) <= LINE else line.replace(" on ", "\non ", 1) for line in label.split("\n")]
    return "\n".join(fill(line, LINE) for line in "\n".join(lines).split("\n"))


def _unpatched(table: pd.DataFrame) -> float:
    into = table.attrs.get("into")
    return float(table[into].iloc[0]) if into in table else 0.0


def _map(table: pd.DataFrame, grid: CellGrid, column: str, ax: Axes | None, limit: float | int | None) -> Axes:
    lines, columns = grid.values.shape
    ax = style.axes(ax, 2.3 + 0.25 * columns, max(2.4, 1.4 + (0.25 if len(grid.row_axes) == 1 else 0.14) * lines))
    norm = scale(table, column, limit)
    picture = ax.imshow(
        grid.values, aspect="auto", origin="lower", interpolation="nearest", cmap=style.DIVERGING, norm=norm
    )
    width, height = style.cell_size(ax, columns, lines)
    for y, x in np.argwhere(np.isnan(grid.values)):
        ax.text(x, y, "×", ha="center", va="center", fontsize=min(9.0, width, height), color=style.GREY)
    _label_columns(ax, grid, width)
    _label_rows(ax, grid, height)
    ax.set(xlabel=grid.column_name)
    style.plain(ax)
    style.color_bar(ax, picture, wrapped(measure_label(table, column)))
    return ax


def _label_rows(ax: Axes, grid: CellGrid, height: float) -> None:
    """Names the rows; where those of two axes have no room, the outer one only, in the middle of its rows."""
    outer = [row[0] for row in grid.rows]
    borders = [place for place in range(1, len(outer)) if outer[place] != outer[place - 1]]
    grouped = len(grid.row_axes) > 1
    for border in borders if grouped else []:
        ax.axhline(border - 0.5, color=style.GREY, linewidth=0.5)
    if grouped and height < 7:
        starts = np.array([0, *borders])
        ends = np.array([*borders, len(outer)])
        labels = np.array([value_label(outer[start]) for start in starts])
        style.number_ticks(ax.yaxis, (starts + ends - 1) / 2, labels, room=height * len(outer) / len(starts) / 11)
        ax.set_ylabel(f"{grid.row_axes[0]} (inside: {', '.join(grid.row_axes[1:])} upwards)")
        return
    style.number_ticks(ax.yaxis, np.arange(len(outer)), np.array(grid.row_labels), room=height / (7 if grouped else 11))
    ax.tick_params(axis="y", labelsize="small" if not grouped else min(8.0, max(5.5, 0.8 * height)))
    ax.set_ylabel(grid.row_name)


def _bars(table: pd.DataFrame, grid: CellGrid, column: str, ax: Axes | None) -> Axes:
    values, count = grid.values[0], len(grid.columns)
    place, measure, axis = np.arange(count), wrapped(measure_label(table, column)), grid.column_name
    several = column == "effect" and "pairs" in table and bool((table["pairs"] > 1).any())
    spread = table["effect_std"].to_numpy() if several else None
    look = {"color": style.BLUE, "error_kw": {"ecolor": style.GREY, "elinewidth": 1.0}}
    if any(isinstance(value, str) for value in grid.columns):
        ax = style.axes(ax, 6.0, 1.2 + 0.28 * count)
        ax.barh(place, values, height=0.8, xerr=spread, **look)
        ax.axvline(0, color=style.INK, linewidth=0.8)
        ax.set_yticks(place, grid.column_labels)
        ax.set(xlabel=measure_label(table, column), ylabel=axis, ylim=(count - 0.4, -0.6))
    else:
        ax = style.axes(ax, 1.5 + 0.3 * count, 3.2)
        ax.bar(place, values, width=0.8, yerr=spread, **look)
        ax.axhline(0, color=style.INK, linewidth=0.8)
        _label_columns(ax, grid, style.cell_size(ax, count, 1)[0])
        ax.set(xlabel=axis, ylabel=measure, xlim=(-0.6, count - 0.4))
    style.plain(ax)
    return ax


def _label_columns(ax: Axes, grid: CellGrid, width: float) -> None:
    if grid.tokens is not None:
        positions = [value[0] if isinstance(value, tuple) else value for value in grid.columns]
        label_tokens(ax, grid.column_labels, positions, width)
        return
    labels = np.array(grid.column_labels)
    style.number_ticks(ax.xaxis, np.arange(len(labels)), labels, room=width / (6 + 5.5 * max(map(len, labels))))


def _correlation(a: np.ndarray, b: np.ndarray) -> str:
    """Pearson's r as text."""
    r = correlation(a, b)
    return "r undefined" if np.isnan(r) else f"r = {r:.3f}"
