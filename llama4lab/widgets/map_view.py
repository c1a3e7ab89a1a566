"""What the views with a map share: choices draw another map, a click selects a cell and says more about it."""

import base64
import contextlib
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes

from llama4lab.widgets.controls import bar
from llama4lab.widgets.fallback import WithFallback, png
from llama4lab.widgets.grid import Grid
from llama4lab.widgets.levels import Levels

MOST_TEXTS = 2**13  # cells; beyond, texts and notes would be more than a message should hold


class Picture(NamedTuple):
    """The arguments of `Grid`."""

    levels: Levels
    rows: list[str]
    columns: list[str]
    titles: tuple[str, str]
    texts: list[list[str]] | None = None
    notes: list[list[str]] | None = None


class MapView(WithFallback, ipywidgets.VBox):
    """A map with controls above it and a closer look at the selected cell below.

    Attributes:
        selection: What the selected cell is; empty without one.
        grid: The map, a `Grid`.
    """

    selection = traitlets.Dict()
    CONTEXT: tuple[str, ...] = ()  # traits that are also part of the selection
    UPWARD = True  # the first row is at the bottom
    HINT = "Click a cell for a closer look."
    _quietly = _adopting = False

    def picture(self) -> Picture:
        """The map for what is chosen now."""
        raise NotImplementedError

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map something is; nothing if it is not there."""
        raise NotImplementedError

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """What a cell of the map is."""
        raise NotImplementedError

    def exists(self, selection: dict[str, Any]) -> bool:
        """Whether something can be selected, now or after another choice."""
        return bool(self.cell_of(selection))

    def describe(self) -> None:
        """Shows more about the selection, or nothing without one."""

    @property
    def ax(self) -> Axes:
        """The picture as a matplotlib figure."""
        return self.draw()

    def begin(
        self, choices: Sequence[str], controls: Sequence[ipywidgets.Widget], below: Sequence[ipywidgets.Widget]
    ) -> None:
        """Puts the parts together.

        Args:
            choices: The traits that change the map.
            controls: What is above it.
            below: What is below it.
        """
        levels, rows, columns, titles, texts, notes = self.picture()
        settings: dict[str, Any] = {"titles": titles, "upward": self.UPWARD, "twin": self.draw}
        self.grid = Grid(levels, rows, columns, texts=texts, notes=notes, **settings)
        hint = ipywidgets.HTML(f'<span style="opacity:.7">{self.HINT}</span>').add_class("l4-hint")
        self.children = [*([bar(controls)] if controls else []), self.grid, hint, *below]
        self.observe(lambda _: self.refresh(), list(choices))
        self.observe(lambda _: self._select(), "selection")
        self.grid.observe(lambda _: self._clicked(), "selected")
        self.describe()

    def refresh(self) -> None:
        """Draws the map again; what is selected stays selected where it is in the new one."""
        if self._adopting:
            return
        context = {name: getattr(self, name) for name in self.CONTEXT}
        levels, rows, columns, titles, texts, notes = self.picture()
        with self._quiet(), self.grid.hold_sync():
            self.grid.selected = []
            self.grid.show(levels, rows, columns, titles=titles, texts=texts, notes=notes)
            cell = self.cell_of({**self.selection, **context}) if self.selection else []
            self.grid.selected = cell
            self.selection = self.place_of(cell) if cell else {}
        self.describe()

    def _clicked(self) -> None:
        if not self._quietly:
            self.selection = self.place_of(self.grid.selected) if self.grid.selected else {}

    def _select(self) -> None:
        """Shows what was selected, here or from code."""
        if self._quietly:
            return
        wanted = {name: self.selection[name] for name in self.CONTEXT if self.selection}
        moved = any(getattr(self, name) != value for name, value in wanted.items())
        self._adopting = True  # all at once, for half a move may lead nowhere
        try:
            for name, value in wanted.items():
                self.set_trait(name, value)
        finally:
            self._adopting = False
        if moved:
            self.refresh()
            return
        with self._quiet():
            self.grid.selected = self.cell_of(self.selection) if self.selection else []
        self.describe()

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        before, self._quietly = self._quietly, True
        try:
            yield
        finally:
            self._quietly = before

    @traitlets.validate("selection")
    def _is_there(self, proposal: Any) -> dict[str, Any]:
        if proposal["value"] and not self.exists(proposal["value"]):
            example = self.place_of([0, 0])
            raise traitlets.TraitError(f"{proposal['value']} is not in the map. One of its cells is {example}.")
        return proposal["value"]


def picture_html(ax: Axes, caption: str) -> str:
    """The figure of some axes as an HTML picture, which a screen reader reads as its caption; the figure is closed."""
    data = base64.b64encode(png(ax)).decode()
    return f'<img alt="{escape(caption, quote=True)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def lines_of(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The lines of a table in which columns have these values."""
    kept = np.ones(len(table), dtype=bool)
    for column, value in values.items():
        kept &= table[column].to_numpy() == value
    own = table.loc[kept, :].reset_index(drop=True)
    own.attrs = table.attrs
    return own
