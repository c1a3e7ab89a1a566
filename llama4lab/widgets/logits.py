"""Views of `llama4lab.viz.logit_lens` to point at."""

from collections.abc import Mapping
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.residual_stream import KINDS, kind_of, recorded_residuals
from llama4lab.run.run import Run
from llama4lab.run.tuned_lens import TunedLens
from llama4lab.tables import logit_lens as tables
from llama4lab.tables import logits
from llama4lab.viz import logit_lens, style
from llama4lab.widgets.fallback import WithFallback
from llama4lab.widgets.grid import Grid
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.token_text import visible
from llama4lab.widgets.top_tokens import top_tokens_html

COLUMNS = {"prob": "probability", "entropy": "entropy", "kl": "divergence"}
ALL = "all"
SHOWN = 10  # tokens of a clicked cell
LONGEST = 12
BUTTONS, NAMED = {"button_width": "auto"}, {"description_width": "initial"}
HINT = '<span style="opacity:.7">Click a cell to see what would be said there.</span>'


class LogitLens(WithFallback, ipywidgets.VBox):
    """What the model would say at each place of the residual stream; a click shows the most probable tokens there.

    Attributes:
        kind: Which places: "resid_pre", "resid_mid", "resid_post", or "all" that were recorded.
        column: What the colours are: "prob" of the best token, "entropy", or "kl" from the model's own prediction.
        lens: "logit" or, where a tuned lens was given, "tuned".
        row: Row of the prompt.
        selection: The selected cell, for example `{"hook_point": "layers.3.resid_post", "position": 5}`; empty without.
        grid: The map, a `Grid`.
    """

    kind = traitlets.Unicode()
    column = traitlets.Enum(list(COLUMNS), "prob")
    lens = traitlets.Enum(["logit", "tuned"], "logit")
    row = traitlets.Int()
    selection = traitlets.Dict()

    def __init__(self, model: HookedPreTrainedModel, run: Run, lens: TunedLens | None = None) -> None:
        """Makes the view.

        Args:
            model: The model.
            run: A run with hook points of the residual stream, for example `at="layers.*.resid_post"`.
            lens: A tuned lens, to choose beside the logit lens. Then only places that it was fitted at are shown.
        """
        self.model, self.run, self.tuned, self._drawing = model, run, lens, False
        super().__init__(row=run.rows[0])
        self._tables: dict[tuple[str, str, int], pd.DataFrame] = {}
        self.names = [name for name in recorded_residuals(model, run) if lens is None or name in lens]
        if not self.names:
            raise ValueError("The lens was fitted at no hook point of this run. Record those that it prints.")
        kinds = [kind for kind in KINDS if any(kind_of(name) == kind for name in self.names)]
        self.kinds = kinds if len(kinds) == 1 and len(self._of(kinds[0])) == len(self.names) else [*kinds, ALL]
        self.kind = "resid_post" if "resid_post" in kinds else self.kinds[0]
        levels, rows, columns, titles, texts = self._picture()
        self.grid = Grid(levels, rows, columns, titles=titles, upward=True, texts=texts, twin=self.draw)
        self._below = ipywidgets.HTML(HINT).add_class("l4-cell")
        self.children = [ipywidgets.HBox(self._controls(), layout={"flex_flow": "row wrap"}), self.grid, self._below]
        self.observe(lambda _: self._show(), ["kind", "column", "lens", "row"])
        self.observe(lambda _: self._select(), "selection")
        self.grid.observe(lambda _: self._selected(), "selected")

    @property
    def table(self) -> pd.DataFrame:
        """What the map shows, as `tables.logit_lens.top_tokens` gives it."""
        key = (self.lens, self.kind, self.row)
        if key not in self._tables:
            own = self.run.cut(rows=self.run.rows.index(self.row))
            self._tables[key] = tables.top_tokens(self.model, own, at=self._of(self.kind), lens=self._lens())
        return self._tables[key]

    @property
    def ax(self) -> Axes:
        """The map as a matplotlib figure."""
        return self.draw()

    def draw(self) -> Axes:
        """The static twin: `viz.logit_lens.top_tokens` of `table`."""
        return logit_lens.top_tokens(self.table, column=self.column, row=self.row)

    @property
    def caption(self) -> str:
        """What the map shows, in a line."""
        rows = f"; row {self.row}" if len(self.run.rows) > 1 else ""
        return f"{self.lens} lens: best token, coloured by {self._title()}{rows}"

    def _of(self, kind: str) -> list[str]:
        return [name for name in self.names if kind in (ALL, kind_of(name))]

    def _lens(self, lens: str | None = None) -> TunedLens | None:
        return self.tuned if (lens or self.lens) == "tuned" else None

    def _title(self) -> str:
        return logit_lens.MEASURES[self.column].replace("\n", " ")

    def _controls(self) -> list[ipywidgets.Widget]:
        """One control for each choice that there is."""
        choices: dict[str, list] = {"column": [(text, name) for name, text in COLUMNS.items()]}
        if len(self.kinds) > 1:
            choices["kind"] = [(kind.removeprefix("resid_"), kind) for kind in self.kinds]
        if self.tuned is not None:
            choices["lens"] = [("logit lens", "logit"), ("tuned lens", "tuned")]
        controls: list[ipywidgets.Widget] = []
        for name, options in choices.items():
            buttons = ipywidgets.ToggleButtons(options=options, value=getattr(self, name), style=BUTTONS)
            traitlets.link((self, name), (buttons, "value"))
            controls.append(buttons.add_class(f"l4-{name}"))
        if len(self.run.rows) > 1:
            width = {"width": "110px", "margin": "2px 2px 2px 18px"}
            row = ipywidgets.Dropdown(
                options=self.run.rows, value=self.row, description="row", style=NAMED, layout=width
            )
            traitlets.link((self, "row"), (row, "value"))
            controls.append(row.add_class("l4-row"))
        return controls

    def _picture(self) -> tuple[Levels, list[str], list[str], tuple[str, str], list[list[str]]]:
        table = self.table
        self._places, self._positions = logit_lens.hook_points(table), np.unique(table["position"]).tolist()
        by_cell = table.pivot(index="hook_point", columns="position", values=[self.column, "token"])
        cells = by_cell.reindex(self._places)
        values = cells[self.column].to_numpy(dtype=float)
        title = f"{self._title()}\n{self.lens} lens"
        levels = Levels.of_numbers(values, logit_lens.scale(table, self.column), style.SEQUENTIAL, title=title)
        inputs = dict(zip(table["position"], table["input"], strict=True))
        columns = [f"{visible(inputs[position], LONGEST)} {position}" for position in self._positions]
        texts = [[visible(token, LONGEST) for token in line] for line in cells["token"].to_numpy().tolist()]
        titles = (logit_lens.places_label(self._places), "token, position")
        return levels, logit_lens.place_labels(self._places), columns, titles, texts

    def _show(self) -> None:
        """Draws another picture; a cell stays selected if its place is in the new one."""
        levels, rows, columns, titles, texts = self._picture()
        self._drawing = True
        try:
            with self.grid.hold_sync():
                self.grid.selected = []
                self.grid.show(levels, rows, columns, titles=titles, texts=texts)
                self.grid.selected = self._cell_of(self.selection)
        finally:
            self._drawing = False
        self._selected()
        self._describe()

    def _cell_of(self, selection: Mapping[str, Any]) -> list[int]:
        """Where in the grid a place and position are; nothing if they are not in it."""
        name, position = selection.get("hook_point"), selection.get("position")
        if name not in self._places or position not in self._positions:
            return []
        return [self._places.index(name), self._positions.index(position)]

    def _place_of(self, cell: list[int]) -> dict[str, Any]:
        return {"hook_point": self._places[cell[0]], "position": self._positions[cell[1]]} if cell else {}

    def _selected(self) -> None:
        """Takes over what was clicked."""
        if not self._drawing:
            self.selection = self._place_of(self.grid.selected)

    def _select(self) -> None:
        """Shows what was selected, here or from code."""
        self.grid.selected = self._cell_of(self.selection)
        self._describe()

    def _describe(self) -> None:
        self._below.value = self._cell_html() if self.selection else HINT

    def _cell_html(self) -> str:
        name, position = str(self.selection["hook_point"]), int(self.selection["position"])
        run = self.run.cut(rows=self.run.rows.index(self.row), positions=self.run.positions.index(position))
        columns = [
            tables.top_tokens(self.model, run, SHOWN, at=name, lens=self._lens(lens)).assign(run=f"{lens} lens")
            for lens in ("logit", "tuned")
            if lens == "logit" or self.tuned is not None
        ]
        if run.logits.shape[1]:
            columns.append(logits.top_tokens(run, SHOWN).assign(run="model"))
        line = self.table.query("hook_point == @name and position == @position").iloc[0]
        known = [column for column in ("entropy", "kl") if np.isfinite(line[column])]
        numbers = ", ".join(f"{COLUMNS[column]} {line[column]:.3g}" for column in known)
        where = f"{name}, position {position}, token {visible(line['input'])}"
        heading = f"<b>{escape(where)}</b>: {escape(numbers)} ({self.lens} lens)"
        return f"{heading}{top_tokens_html(pd.concat(columns))}"

    @traitlets.validate("kind")
    def _is_kind(self, proposal: Any) -> str:
        if proposal["value"] not in self.kinds:
            raise traitlets.TraitError(f"kind={proposal['value']!r} was asked for; there is {', '.join(self.kinds)}.")
        return proposal["value"]

    @traitlets.validate("row")
    def _is_row(self, proposal: Any) -> int:
        if proposal["value"] not in self.run.rows:
            raise traitlets.TraitError(f"row={proposal['value']} was asked for; the run has rows {self.run.rows}.")
        return proposal["value"]

    @traitlets.validate("lens")
    def _is_lens(self, proposal: Any) -> str:
        if proposal["value"] == "tuned" and self.tuned is None:
            raise traitlets.TraitError("The tuned lens was asked for; pass one: LogitLens(model, run, lens).")
        return proposal["value"]

    @traitlets.validate("selection")
    def _is_cell(self, proposal: Any) -> dict[str, Any]:
        if proposal["value"] and not self._cell_of(proposal["value"]):
            raise traitlets.TraitError(
                f"{proposal['value']} is no cell of the map. It has the places {self._places[0]} to {self._places[-1]} "
                f"and the positions {self._positions[0]} to {self._positions[-1]}."
            )
        return proposal["value"]
