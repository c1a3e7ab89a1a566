"""Views of `llama4lab.viz.patching` to point at."""

from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from llama4lab.run.sweep_result import Sweep
from llama4lab.viz import patching, style
from llama4lab.viz.cell_grid import CellGrid, cell_grid, shown_axes, value_label
from llama4lab.widgets.fallback import WithFallback
from llama4lab.widgets.grid import Grid
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.token_text import visible
from llama4lab.widgets.top_tokens import top_tokens_html

MEASURES = ("normalised", "effect", "patched")
STYLE = {"description_width": "initial"}
LONGEST = 12
HINT = '<span style="opacity:.7">Click a cell to see what the model expects there.</span>'


class Effects(WithFallback, ipywidgets.VBox):
    """What patching each cell did; a click shows what the model expects next when that cell is patched.

    Attributes:
        column: The measure: "normalised", "effect" or "patched".
        row: Row of the pair, or "mean" over all.
        part: For a sweep of three axes and more, the value of each axis that the map does not show.
        selection: The selected cell, for example `{"layer": 3, "position": 5}`; empty without one.
        grid: The map, a `Grid`.
    """

    column = traitlets.Enum(MEASURES, "normalised")
    row = traitlets.Union([traitlets.Int(), traitlets.Enum(["mean"])], default_value="mean")
    part = traitlets.Dict()
    selection = traitlets.Dict()

    def __init__(self, sweep: Sweep) -> None:
        """Makes the view.

        Args:
            sweep: The sweep. Where it has more than two axes, the view begins with the part of the largest effect.
        """
        super().__init__()
        self.sweep = sweep
        self._tables: dict[int | str, pd.DataFrame] = {"mean": sweep.table}
        self._shown = shown_axes(sweep.table)
        if not np.isfinite(sweep.table["normalised"]).any():
            self.column = "effect"  # there is no second run, or it gives the same
        largest = sweep.table["effect"].abs().fillna(0.0).argmax()
        self.part = {axis: sweep.labels[largest][axis] for axis in sweep.axes if axis not in self._shown}
        self.cells = self._arranged()
        self.grid = self._new_grid()
        self._below = ipywidgets.HTML(HINT).add_class("l4-cell")
        self.children = [ipywidgets.HBox(self._controls(), layout={"flex_flow": "row wrap"}), self.grid, self._below]
        self.observe(lambda _: self._show(), ["column", "row", "part"])
        self.observe(lambda _: self._select(), "selection")
        self.grid.observe(lambda _: self._selected(), "selected")

    @property
    def table(self) -> pd.DataFrame:
        """The lines of the sweep that the map shows, as `Sweep.table` or one row of `Sweep.by_row` gives them."""
        whole = self._whole()
        kept = np.ones(len(whole), dtype=bool)
        for axis, value in self.part.items():
            kept &= np.array([other == value for other in whole[axis]])
        part = whole.loc[kept].reset_index(drop=True)
        part.attrs = whole.attrs
        return part

    @property
    def ax(self) -> Axes:
        """The map as a matplotlib figure, on the same scale."""
        return self.draw()

    def draw(self) -> Axes:
        """The static twin: `viz.patching.effects` of `table`."""
        scale = self._scale()
        assert scale.vmin is not None
        assert scale.vmax is not None
        return patching.effects(self.table, column=self.column, limit=(scale.vmax - scale.vmin) / 2)

    @property
    def caption(self) -> str:
        """What the map shows, in a line."""
        parts = [f"{axis} {value_label(value)}" for axis, value in self.part.items()]
        pairs = len(self.sweep.prompt)
        rows = (
            f"mean of {pairs} pairs" if self.row == "mean" and pairs > 1 else "" if pairs == 1 else f"pair {self.row}"
        )
        return "; ".join([self._title().replace("\n", " "), *parts, *([rows] if rows else [])])

    def _controls(self) -> list[ipywidgets.Widget]:
        """One control for each choice that there is."""
        pairs = len(self.sweep.prompt)
        measures = [name for name in MEASURES if np.isfinite(self.sweep.table[name]).any()]
        column = ipywidgets.ToggleButtons(options=measures, style={"button_width": "auto"}).add_class("l4-column")
        traitlets.link((self, "column"), (column, "value"))
        controls: list[ipywidgets.Widget] = [column]
        if pairs > 1:
            row = ipywidgets.Dropdown(
                options=["mean", *range(pairs)], description="pair", style=STYLE, layout=_width("110px")
            )
            row.add_class("l4-row")
            traitlets.link((self, "row"), (row, "value"))
            controls.append(row)
        return controls + [self._part_control(axis) for axis in self.part]

    def _part_control(self, axis: str) -> ipywidgets.Widget:
        values = self.sweep.axes[axis]
        named = any(isinstance(value, str) for value in values)
        kind, width = (ipywidgets.Dropdown, "auto") if named else (ipywidgets.SelectionSlider, "320px")
        options = [(value_label(value), value) for value in values]
        name = axis.replace("_", " ")
        choice = kind(options=options, value=self.part[axis], description=name, style=STYLE, layout=_width(width))
        choice.observe(lambda change: self.set_trait("part", {**self.part, axis: change["new"]}), "value")
        self.observe(lambda _: choice.set_trait("value", self.part[axis]), "part")
        return choice.add_class(f"l4-part-{axis}")

    def _whole(self) -> pd.DataFrame:
        """The table of all parts."""
        if self.row not in self._tables:
            rows = self.sweep.by_row
            for row in range(len(self.sweep.prompt)):
                own = rows.loc[rows["row"] == row, :].reset_index(drop=True)
                own.attrs = rows.attrs
                self._tables[row] = own
        return self._tables[self.row]

    def _arranged(self) -> CellGrid:
        return cell_grid(self.table, self.column)

    def _scale(self) -> Normalize:
        """One scale for all parts, so that they can be compared."""
        return patching.scale(self._whole(), self.column)

    def _title(self) -> str:
        return patching.measure_label(self._whole(), self.column)

    def _picture(self) -> tuple[Levels, list[str], list[str], tuple[str, str]]:
        cells = self.cells
        levels = Levels.of_numbers(cells.values, self._scale(), style.DIVERGING, title=self._title())
        columns, name = cells.column_labels, cells.column_name
        if cells.tokens is not None:
            columns, name = [f"{self._token(value)} {value_label(value)}" for value in cells.columns], "token, position"
        return levels, cells.row_labels, columns, (cells.row_name, name)

    def _token(self, position: Any) -> str:
        """The token of a position; two of them where the pairs differ."""
        rows = self.sweep.prompt.tokens if self.row == "mean" else [self.sweep.prompt.tokens[int(self.row)]]
        places = position if isinstance(position, tuple) else (position,)
        found = list(dict.fromkeys("".join(row[place] for place in places) for row in rows))
        found = [token for token in found if token]  # padding has none
        shown = [visible(token, LONGEST if len(found) == 1 else LONGEST // 2) for token in found[:2]]
        return "|".join([*shown, *(["…"] if len(found) > 2 else [])])

    def _new_grid(self) -> Grid:
        levels, rows, columns, titles = self._picture()
        return Grid(levels, rows, columns, titles=titles, upward=True, twin=self.draw)

    def _show(self) -> None:
        self.cells = self._arranged()
        levels, rows, columns, titles = self._picture()
        self.grid.show(levels, rows, columns, titles=titles)
        if any(self.selection.get(axis, value) != value for axis, value in self.part.items()):
            self._selected()  # the same place, in another part
        self._describe()

    def _selected(self) -> None:
        """Takes over what was clicked."""
        place = self.grid.selected
        cell: dict[str, Any] = {}
        if place:
            own = self.cells
            cell = {**self.part, **own.fixed, **dict(zip(own.row_axes, own.rows[place[0]], strict=True))}
            cell[own.column_axis] = own.columns[place[1]]
        if cell in self.sweep.labels or not cell:
            self.selection = {axis: cell[axis] for axis in self.sweep.axes if axis in cell}
        else:
            self.grid.selected = []  # the sweep has no such cell

    def _select(self) -> None:
        """Shows what was selected, here or from code."""
        wanted = self.selection
        place: list[int] = []
        if wanted:
            self.part = {axis: wanted[axis] for axis in self.part}
            own = self.cells
            line = own.rows.index(tuple(wanted[axis] for axis in own.row_axes))
            place = [line, own.columns.index(wanted[own.column_axis])]
        self.grid.selected = place
        self._describe()

    def _describe(self) -> None:
        self._below.value = self._cell_html() if self.selection else HINT

    @traitlets.validate("selection")
    def _is_cell(self, proposal: Any) -> dict[str, Any]:
        if proposal["value"] and proposal["value"] not in self.sweep.labels:
            axes = ", ".join(f"{axis} {values[0]!r} to {values[-1]!r}" for axis, values in self.sweep.axes.items())
            raise traitlets.TraitError(f"{proposal['value']} is no cell of the sweep. Its axes are {axes}.")
        return proposal["value"]

    @traitlets.validate("part")
    def _is_part(self, proposal: Any) -> dict[str, Any]:
        wanted = proposal["value"]
        hidden = {axis: values for axis, values in self.sweep.axes.items() if axis not in self._shown}
        if wanted.keys() != hidden.keys() or any(value not in hidden[axis] for axis, value in wanted.items()):
            raise traitlets.TraitError(
                f"part={wanted} was asked for; it has one value for each of {hidden or 'no axis'}."
            )
        return wanted

    @traitlets.validate("row")
    def _is_row(self, proposal: Any) -> int | str:
        pairs = len(self.sweep.prompt)
        if proposal["value"] != "mean" and not 0 <= proposal["value"] < pairs:
            raise traitlets.TraitError(
                f'row={proposal["value"]} was asked for; there are rows 0 to {pairs - 1}, and "mean".'
            )
        return proposal["value"]

    def _cell_html(self) -> str:
        whole, index = self._whole(), self.sweep.labels.index(self.selection)
        line, row = whole.iloc[index], 0 if self.row == "mean" else int(self.row)
        axes = [f"{axis.replace('_', ' ')} {value_label(value)}" for axis, value in self.selection.items()]
        if line.get("token"):
            axes.append(f"token {visible(str(line['token']))}")
        numbers = [f"{name} {line[name]:.3g}" for name in MEASURES if np.isfinite(line[name])]
        heading = f"<b>{escape(', '.join(axes))}</b>: {escape(', '.join(numbers) or 'this cell has not run')}"
        if not np.isfinite(float(self.sweep.patched[index, row])):
            return heading
        pairs = len(self.sweep.prompt)
        which = f" of pair {row}" if pairs > 1 else ""
        tokens = top_tokens_html(self.sweep.top_tokens(self.selection, row))
        return f'{heading}<div style="margin-top:6px">The next token{which}, with its probability:</div>{tokens}'


def _width(width: str) -> dict[str, str]:
    return {"width": width, "margin": "2px 2px 2px 18px"}
