"""The text, each token coloured by the expert that it went to in a layer."""

from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes

from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import decisions as decisions_of
from llama4lab.viz import routing
from llama4lab.viz.expert_colors import expert_color, expert_colors
from llama4lab.widgets.controls import bar, dropdown, one_of, slider
from llama4lab.widgets.fallback import WithFallback
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.routing.choices import choice_notes
from llama4lab.widgets.token_text import visible
from llama4lab.widgets.tokens import Tokens

CELL = "padding:1px 10px 1px 0;text-align:left"
HINT = '<span style="opacity:.7">Click a token to see where it went in every layer.</span>'


class TokenStrip(WithFallback, ipywidgets.VBox):
    """The text, coloured by expert; a click shows the experts of a token in all layers.

    Attributes:
        layer: Layer of the router.
        row: Row of the prompt.
        slot: Which of a token's choices, from 0.
        selection: The selected token, for example `{"row": 0, "layer": 3, "position": 5}`; empty without one.
        tokens: The text, a `Tokens`.
    """

    layer = traitlets.Int()
    row = traitlets.Int()
    slot = traitlets.Int(0)
    selection = traitlets.Dict()

    def __init__(self, run: Run) -> None:
        """Makes the view.

        Args:
            run: A run with the routers recorded: `at="layers.*.feed_forward.router.*"`.
        """
        self.run, self._whole, self._quietly = run, decisions_of(run), False
        self._layers, self._slots = (np.unique(self._whole[name]).tolist() for name in ("layer", "slot"))
        super().__init__(row=run.rows[0], layer=self._layers[0])
        self._positions = self._places()
        self.tokens = Tokens(self._texts(), self._levels(), positions=self._positions, notes=self._notes())
        self.tokens.twin = self.draw
        self._below = ipywidgets.HTML(HINT).add_class("l4-cell")
        self.children = [bar(self._controls()), self.tokens, self._below]
        self.observe(lambda _: self._paint(), ["layer", "slot"])
        self.observe(lambda _: self._write(), "row")
        self.observe(lambda _: self._select(), "selection")
        self.tokens.observe(lambda _: self._clicked(), "selected")

    @property
    def table(self) -> pd.DataFrame:
        """What is shown: the lines of `tables.routing.decisions` of the row, layer and slot."""
        own = self._whole.query("row == @self.row and layer == @self.layer and slot == @self.slot")
        own = own.reset_index(drop=True)
        own.attrs = self._whole.attrs
        return own

    @property
    def ax(self) -> Axes:
        """The text as a matplotlib figure."""
        return self.draw()

    def draw(self) -> Axes:
        """The static twin: `viz.routing.tokens` of the layer, row and slot."""
        return routing.tokens(self.table.assign(slot=0), layer=self.layer, row=self.row)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        rows = f"; row {self.row}" if len(self.run.rows) > 1 else ""
        return f"expert of each token in layer {self.layer}{rows}"

    def _controls(self) -> list[ipywidgets.Widget]:
        controls = [slider(self, "layer", self._layers)] if len(self._layers) > 1 else []
        controls += [dropdown(self, "row", self.run.rows)] if len(self.run.rows) > 1 else []
        return controls + ([dropdown(self, "slot", self._slots)] if len(self._slots) > 1 else [])

    def _places(self) -> list[int]:
        return np.unique(self._whole.query("row == @self.row")["position"]).tolist()

    def _texts(self) -> list[str]:
        own = self._whole.query("row == @self.row").drop_duplicates("position").set_index("position")
        return own["token"].reindex(self._positions).tolist()

    def _levels(self) -> Levels:
        table = self.table
        experts, gates = np.full((1, len(self._positions)), -1), np.zeros((1, len(self._positions)))
        place = np.searchsorted(self._positions, table["position"])
        experts[0, place], gates[0, place] = table["expert"], table["gate"]
        names = [str(expert) for expert in range(self._whole.attrs["num_experts"])]
        title, colors = f"expert\nlayer {self.layer}", expert_colors(np.arange(len(names)))
        return Levels.of_classes(experts, names, colors, title=title, strengths=("gate", gates))

    def _notes(self) -> list[str]:
        table = self.table
        found = dict(zip(table["position"], choice_notes(table), strict=True))
        return [found.get(position, "") for position in self._positions]

    def _paint(self) -> None:
        """Gives the text the colours of another layer."""
        self.tokens.color(self._levels(), self._notes())
        if self.selection:
            self.selection = {**self.selection, "layer": self.layer}

    def _write(self) -> None:
        """Shows another row; the selected position stays selected where that row has it."""
        position = self.selection.get("position")
        self._positions = self._places()
        self._quietly = True
        try:
            self.tokens.write(self._texts(), self._levels(), positions=self._positions, notes=self._notes())
        finally:
            self._quietly = False
        self.selection = self._place_of(position) if position in self._positions else {}
        self.tokens.selected = self._positions.index(int(position or 0)) if self.selection else None

    def _place_of(self, position: int) -> dict[str, Any]:
        return {"row": self.row, "layer": self.layer, "position": position}

    def _clicked(self) -> None:
        if not self._quietly:
            place = self.tokens.selected
            self.selection = {} if place is None else self._place_of(self._positions[place])

    def _select(self) -> None:
        """Shows what was selected, here or from code."""
        wanted = self.selection
        if wanted:
            self.row, self.layer = wanted["row"], wanted["layer"]
        self.tokens.selected = self._positions.index(wanted["position"]) if wanted else None
        self._below.value = self._described() if wanted else HINT

    def _described(self) -> str:
        """The experts of the selected token in all layers, as HTML."""
        position = self.selection["position"]
        own = self._whole.query("row == @self.row and position == @position")
        head = "".join(f'<th style="{CELL}">{name}</th>' for name in ("layer", "expert", "gate", "margin", "runner-up"))
        lines = "".join(_line(line, line["layer"] == self.layer) for line in own.to_dict("records"))
        where = escape(f"position {position}, token {visible(own['token'].iloc[0])}")
        return f'<b>{where}</b><div style="max-height:300px;overflow:auto"><table><tr>{head}</tr>{lines}</table></div>'

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", proposal["value"], self._layers)

    @traitlets.validate("row")
    def _is_row(self, proposal: Any) -> int:
        return one_of("row", proposal["value"], self.run.rows)

    @traitlets.validate("slot")
    def _is_slot(self, proposal: Any) -> int:
        return one_of("slot", proposal["value"], self._slots)

    @traitlets.validate("selection")
    def _is_token(self, proposal: Any) -> dict[str, Any]:
        wanted = proposal["value"]
        names = ("row", "layer", "position")
        if not wanted:
            return wanted
        if wanted.keys() != set(names) or self._whole.query(" and ".join(f"{n} == {wanted[n]!r}" for n in names)).empty:
            raise traitlets.TraitError(f"{wanted} is no token of the run. One is {self._place_of(self._positions[0])}.")
        return wanted


def _line(line: dict[Any, Any], now: bool) -> str:
    red, green, blue = (round(255 * part) for part in expert_color(int(line["expert"])))
    swatch = f'<span style="display:inline-block;width:10px;height:10px;background:rgb({red},{green},{blue})"></span>'
    other = "" if pd.isna(line["runner_up"]) else str(line["runner_up"])
    cells = [str(line["layer"]), f"{swatch} {line['expert']}", f"{line['gate']:.3g}", f"{line['margin']:.3g}", other]
    weight = ";font-weight:bold" if now else ""
    return "<tr>" + "".join(f'<td style="{CELL}{weight}">{cell}</td>' for cell in cells) + "</tr>"
