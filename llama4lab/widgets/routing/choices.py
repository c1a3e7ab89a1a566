"""Which expert each token went to, as a map to point at."""

from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes

from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import ROUTER
from llama4lab.tables.routing.choices import decisions as decisions_of
from llama4lab.viz import routing
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.widgets.bars import Bars, Details
from llama4lab.widgets.controls import dropdown, one_of
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import MOST_TEXTS, MapView, Picture, lines_of
from llama4lab.widgets.token_text import visible

LONGEST = 12
CHOSEN, RUNNER_UP = "●", "○"
MARKS = {CHOSEN: "chosen", RUNNER_UP: "runner-up"}


class TokenMap(MapView):
    """A map of layers by the tokens of one row of a run.

    Attributes:
        row: Row of the prompt.
    """

    row = traitlets.Int()
    run: Run
    _layers: list[int]
    _positions: list[int]

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map a layer and position are."""
        if not self.exists(selection) or selection["row"] != self.row:
            return []
        return [self._layers.index(selection["layer"]), self._positions.index(selection["position"])]

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """Row, layer and position of a cell."""
        return {"row": self.row, "layer": self._layers[cell[0]], "position": self._positions[cell[1]]}

    @traitlets.validate("row")
    def _is_row(self, proposal: Any) -> int:
        return one_of("row", proposal["value"], self.run.rows)


class Decisions(TokenMap):
    """Layers by tokens, coloured by expert, the gate as the strength of the colour; a click shows the router's logits.

    Attributes:
        row: Row of the prompt.
        slot: Which of a token's choices, from 0.
        selection: The selected cell, for example `{"row": 0, "layer": 3, "position": 5}`; empty without one.
        grid: The map, a `Grid`.
        bars: The router's logits for the selected token, `Bars`.
    """

    slot = traitlets.Int(0)
    CONTEXT = ("row",)
    HINT = "Click a cell to see what its router made of the token."

    def __init__(self, run: Run) -> None:
        """Makes the view.

        Args:
            run: A run with the routers recorded: `at="layers.*.feed_forward.router.*"`.
        """
        self.run, self._whole = run, decisions_of(run)
        columns = (self._whole[name].tolist() for name in ("row", "layer", "position"))
        self._known = set(zip(*columns, strict=True))
        super().__init__(row=run.rows[0])
        self.bars = Bars()
        self._heading = ipywidgets.HTML().add_class("l4-cell")
        slots = np.unique(self._whole["slot"]).tolist()
        controls = [dropdown(self, "row", run.rows)] if len(run.rows) > 1 else []
        controls += [dropdown(self, "slot", slots)] if len(slots) > 1 else []
        self.begin(["row", "slot"], controls, [self._heading, self.bars])

    @property
    def table(self) -> pd.DataFrame:
        """What the map shows: the lines of `tables.routing.decisions` of the row and slot."""
        return chosen(self._whole, self.row, self.slot)

    def draw(self) -> Axes:
        """The static twin: `viz.routing.decisions` of the row and slot."""
        return routing.decisions(self.table.assign(slot=0), row=self.row)

    @property
    def caption(self) -> str:
        """What the map shows, in a line."""
        rows = f"; row {self.row}" if len(self.run.rows) > 1 else ""
        slots = f"; slot {self.slot}" if np.max(self._whole["slot"]) else ""
        return f"expert of each token, layer by layer{rows}{slots}"

    def picture(self) -> Picture:
        """The map for what is chosen now."""
        table = self.table
        self._layers, self._positions = axes_of(table)
        return choice_picture(table)

    def exists(self, selection: dict[str, Any]) -> bool:
        """Whether the run has this row, layer and position."""
        return tuple(selection.get(name) for name in ("row", "layer", "position")) in self._known

    def describe(self) -> None:
        """Shows the router's logits for the selected token."""
        self.bars.layout.display = None if self.selection else "none"
        self._heading.value = ""
        if not self.selection:
            return
        choice = [self.selection[name] for name in ("row", "layer", "position")]
        row, layer, position = choice
        lines = self._whole.query("row == @row and layer == @layer and position == @position")
        self._heading.value = _heading(lines)
        own = self.run.cut(rows=self.run.rows.index(row), positions=self.run.positions.index(position))
        logits = own[f"layers.{layer}.{ROUTER}logits"].double().reshape(1, -1).numpy()
        marks = [""] * logits.shape[1]
        runner_up = lines["runner_up"].iloc[0]
        if runner_up is not pd.NA:
            marks[int(runner_up)] = RUNNER_UP
        for expert in lines["expert"]:
            marks[expert] = CHOSEN
        notes = [f"gate {1 / (1 + np.exp(-logit)):.3g}" for logit in logits[0]]
        names = [str(expert) for expert in range(len(marks))]
        details: Details = {"titles": ("expert", "router logit"), "marks": marks, "mark_names": MARKS, "notes": notes}
        self.bars.show(logits, names, expert_colors(np.arange(len(names))), "router logit", **details)

    @traitlets.validate("slot")
    def _is_slot(self, proposal: Any) -> int:
        return one_of("slot", proposal["value"], np.unique(self._whole["slot"]).tolist())


def chosen(table: pd.DataFrame, row: int, slot: int) -> pd.DataFrame:
    """The decisions of a row and slot."""
    return lines_of(table, row=row, slot=slot)


def axes_of(table: pd.DataFrame) -> tuple[list[int], list[int]]:
    """The layers and positions of a table."""
    return np.unique(table["layer"]).tolist(), np.unique(table["position"]).tolist()


def labels_of(table: pd.DataFrame) -> list[str]:
    """Token and position of each column of a map."""
    tokens = dict(zip(table["position"], table["token"], strict=True))
    return [f"{visible(tokens[position], LONGEST)} {position}" for position in axes_of(table)[1]]


def choice_picture(table: pd.DataFrame) -> Picture:
    """Decisions of one row and slot as a map of layers and tokens."""
    layers, positions = axes_of(table)
    place = np.searchsorted(layers, table["layer"]), np.searchsorted(positions, table["position"])
    shape = len(layers), len(positions)
    experts, gates = np.full(shape, -1), np.zeros(shape)
    experts[place], gates[place] = table["expert"], table["gate"]
    names = [str(expert) for expert in range(table.attrs["num_experts"])]
    colors = expert_colors(np.arange(len(names)))
    levels = Levels.of_classes(experts, names, colors, title="expert", strengths=("gate", gates))
    texts = notes = None
    if experts.size <= MOST_TEXTS:
        texts = [["" if expert < 0 else str(expert) for expert in line] for line in experts.tolist()]
        notes = [[""] * shape[1] for _ in layers]
        for y, x, note in zip(*place, choice_notes(table), strict=True):
            notes[y][x] = note
    return Picture(levels, [str(layer) for layer in layers], labels_of(table), ("layer", "token"), texts, notes)


def choice_notes(table: pd.DataFrame) -> list[str]:
    """Further lines of a tooltip, for each line of a table of decisions."""
    columns = [table[name].tolist() for name in ("gate", "margin", "runner_up")]
    return [
        f"gate: {gate:.3g}\nmargin: {margin:.3g}" + ("" if pd.isna(runner_up) else f"\nrunner-up: {runner_up}")
        for gate, margin, runner_up in zip(*columns, strict=True)
    ]


def _heading(lines: pd.DataFrame) -> str:
    """Where a token is and where it went, as HTML."""
    first = lines.iloc[0]
    where = f"layer {first['layer']}, position {first['position']}, token {visible(first['token'])}"
    choices = [f"expert {line['expert']} (gate {line['gate']:.3g})" for _, line in lines.iterrows()]
    numbers = f"margin {first['margin']:.3g}, entropy {first['entropy']:.3g}"
    return f"<b>{escape(where)}</b>: {escape(', '.join([*choices, numbers]))}"
