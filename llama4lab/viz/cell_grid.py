"""The cells of a sweep or an attribution as a matrix: which axes go to the right, which upwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from llama4lab.viz import style

MEASURES = {
    *("patched", "clean", "corrupted", "effect", "normalised", "effect_std", "pairs", "token", "row"),
    *("estimate", "first_order", "jump", "estimate_std"),
}


@dataclass(frozen=True, eq=False)
class CellGrid:
    """One number for each combination of a row and a column.

    Attributes:
        values: The numbers; NaN where there is no such cell.
        row_axes: The axes that go upwards; none for a sweep over one axis.
        column_axis: The axis that goes to the right.
        rows: For each row its value on each of its axes.
        columns: The values of the other axis.
        tokens: The token of each column, if they are positions.
        fixed: Axes that have one value in all cells.
    """

    values: Float[np.ndarray, "row column"]
    row_axes: list[str]
    column_axis: str
    rows: list[tuple[Any, ...]]
    columns: list[Any]
    tokens: list[str] | None
    fixed: dict[str, Any]

    @property
    def row_labels(self) -> list[str]:
        """A short name of each row: `3`, or `3.1` for layer 3, head 1."""
        return [joined(row) for row in self.rows]

    @property
    def column_labels(self) -> list[str]:
        """A short name of each column: its number, or its token; `[5]` where the pairs have different tokens."""
        numbers = [value_label(value) for value in self.columns]
        if self.tokens is None:
            return numbers
        return [token or f"[{number}]" for token, number in zip(self.tokens, numbers, strict=True)]

    @property
    def row_name(self) -> str:
        """What the rows are: `layer`, or `layer.head`."""
        named = any(isinstance(value, str) for row in self.rows for value in row)
        return (", " if named else ".").join(self.row_axes).replace("_", " ")

    @property
    def column_name(self) -> str:
        """What the columns are: `head`, or `token` for positions."""
        return "token" if self.tokens is not None else self.column_axis.replace("_", " ")


def axes_of(table: pd.DataFrame) -> list[str]:
    """The axes of a table of cells: all columns that are not measures."""
    return [str(column) for column in table if column not in MEASURES]


def shown_axes(table: pd.DataFrame) -> list[str]:
    """The two axes that a map shows where every other has one value: to the right and upwards."""
    axes = axes_of(table)
    values = {axis: list(dict.fromkeys(table[axis])) for axis in axes}
    if len(axes) < 3:
        return axes
    across = _across(axes, values)
    others = [axis for axis in axes if axis != across]
    return [across, "layer" if "layer" in others else max(others, key=lambda axis: len(values[axis]))]


def cell_grid(table: pd.DataFrame, column: str) -> CellGrid:
    """Lays the cells of a table out as a matrix.

    Positions go to the right; without them the longest numbered axis that is not the layer. All other axes go upwards,
    the first of the table outermost. Of three axes and more, those with a single value are left out.

    Args:
        table: As `Sweep.table`, one pair of `Sweep.by_row`, or `Attribution.table` gives it.
        column: The measure that is wanted.

    Raises:
        ValueError: if the table has no such measure, no cells, or several numbers for one cell.
    """
    if column not in table or column not in MEASURES:
        known = [name for name in table if name in MEASURES - {"token", "row", "pairs"}]
        raise ValueError(f"column={column!r} was to be drawn; the table has {', '.join(map(str, known)) or 'none'}.")
    if "row" in table:
        style.only_one(table, "row")
    axes = axes_of(table)
    if table.empty or not axes:
        raise ValueError("There are no cells to draw: the table is empty or has no axis such as layer or position.")
    values = {axis: list(dict.fromkeys(table[axis])) for axis in axes}
    single = [axis for axis in axes if len(values[axis]) == 1 and axis != "position"]
    fixed = {axis: values[axis][0] for axis in single[: max(len(axes) - 2, 0)]}
    free = [axis for axis in axes if axis not in fixed]
    across = _across(free, values)
    return _filled(table, column, [axis for axis in free if axis != across], across, fixed)


def value_label(value: Any) -> str:
    """A value of an axis as text; values that were patched together are joined: `2-5`, or `2,7`."""
    if not isinstance(value, tuple):
        return str(value)
    if len(value) > 1 and all(isinstance(part, int) for part in value) and list(value) == list(_run(value)):
        return f"{value[0]}-{value[-1]}"
    return ",".join(map(str, value))


def joined(values: Sequence[Any]) -> str:
    """The values of several axes as one text: `3.1`; with a space after names, which have dots of their own."""
    named = any(isinstance(value, str) for value in values)
    return (" " if named else ".").join(map(value_label, values))


def _run(value: tuple[int, ...]) -> range:
    return range(value[0], value[0] + len(value))


def _across(free: list[str], values: dict[str, list[Any]]) -> str:
    """The axis that goes to the right."""
    if "position" in free or len(free) == 1:
        return "position" if "position" in free else free[0]
    numbered = [axis for axis in free if not any(isinstance(value, str) for value in values[axis])]
    others = [axis for axis in numbered if axis != "layer"] or numbered or free[-1:]
    return max(others, key=lambda axis: len(values[axis]))


def _filled(table: pd.DataFrame, column: str, up: list[str], across: str, fixed: dict[str, Any]) -> CellGrid:
    columns = list(dict.fromkeys(table[across]))
    keys = list(zip(*(table[axis] for axis in up), strict=True)) if up else [()] * len(table)
    rows = list(dict.fromkeys(keys))
    line = {key: place for place, key in enumerate(rows)}
    stand = {value: place for place, value in enumerate(columns)}
    y, x = np.array([line[key] for key in keys]), np.array([stand[value] for value in table[across]])
    values = np.full((len(rows), len(columns)), np.nan)
    values[y, x] = table[column].to_numpy(dtype=float)
    if len(set(zip(y.tolist(), x.tolist(), strict=True))) < len(table):
        raise ValueError(
            f"The table has several lines for one cell of {', '.join([*up, across])}. Draw one sweep at a time."
        )
    tokens = None
    if across == "position" and "token" in table:
        own = dict(zip(table[across], table["token"], strict=True))
        tokens = [str(own[value]) for value in columns]
    return CellGrid(values, up, across, rows, columns, tokens, fixed)
