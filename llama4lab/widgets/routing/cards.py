"""What an expert is for: its tokens, what it writes, its neurons, its direction."""

from dataclasses import fields
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.run import Run
from llama4lab.tables import routing as tables
from llama4lab.viz import routing
from llama4lab.widgets.controls import dropdown, one_of, slider
from llama4lab.widgets.map_view import MapView, Picture, lines_of
from llama4lab.widgets.routing.loads import load_picture
from llama4lab.widgets.token_text import visible

CELL = "padding:1px 12px 1px 0;text-align:left;white-space:nowrap"
HEADINGS = {
    "inputs": "tokens that it gets",
    "promoted": "tokens that it promotes",
    "neurons": "its strongest neurons",
    "direction": "tokens along its router row",
}


class ExpertCard(MapView):
    """A map of the experts by load; below, the card of the one that is picked.

    Attributes:
        layer: Layer of the expert.
        expert: Its number.
        selection: Both, for example `{"layer": 3, "expert": 5}`.
        grid: The map, a `Grid`.
    """

    layer = traitlets.Int()
    expert = traitlets.Int()
    CONTEXT = ("layer", "expert")
    HINT = "Click an expert to see its card."

    def __init__(self, model: HookedPreTrainedModel, source: Run | RoutingStats) -> None:
        """Makes the view, with the busiest expert picked.

        Args:
            model: The model.
            source: A run of it or statistics of a corpus, as `tables.routing.expert_card` takes it.
        """
        self.model, self.source = model, source
        self._loads = tables.expert_load(source)
        self._layers = np.unique(self._loads["layer"]).tolist()
        self._experts = np.unique(self._loads["expert"]).tolist()
        self._cards: dict[tuple[int, int], Any] = {}
        busiest = self._loads.iloc[int(np.argmax(self._loads["expert_load"]))]
        super().__init__(layer=int(busiest["layer"]), expert=int(busiest["expert"]))
        self._below = ipywidgets.HTML().add_class("l4-cell")
        controls = [slider(self, "layer", self._layers)] if len(self._layers) > 1 else []
        self.begin(["layer", "expert"], [*controls, dropdown(self, "expert", self._experts)], [self._below])
        with self._quiet():
            self.selection = {"layer": self.layer, "expert": self.expert}
            self.grid.selected = self.cell_of(self.selection)

    @property
    def card(self) -> Any:
        """`tables.routing.expert_card` of the picked expert."""
        key = (self.layer, self.expert)
        if key not in self._cards:
            self._cards[key] = tables.expert_card(self.model, self.source, layer=self.layer, expert=self.expert)
        return self._cards[key]

    @property
    def table(self) -> pd.DataFrame:
        """The tokens that the expert gets; `card` has the other tables."""
        return self.card.inputs

    def draw(self) -> Axes:
        """The static twin: `viz.routing.expert_card` of `card`."""
        return routing.expert_card(self.card)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"card of expert {self.expert} in layer {self.layer}"

    def picture(self) -> Picture:
        """The map of loads."""
        return load_picture(self._loads, float(np.max(self._loads["expert_load"])))

    def refresh(self) -> None:
        """Shows the card of another expert; one is always picked."""
        if not self._adopting:
            with self._quiet():
                self.selection = {"layer": self.layer, "expert": self.expert}
                self.grid.selected = self.cell_of(self.selection)
            self.describe()

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map a layer and expert are."""
        layer, expert = selection.get("layer"), selection.get("expert")
        if layer not in self._layers or expert not in self._experts:
            return []
        return [self._layers.index(layer), self._experts.index(expert)]

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """Layer and expert of a cell."""
        return {"layer": self._layers[cell[0]], "expert": self._experts[cell[1]]}

    def describe(self) -> None:
        """Shows the card."""
        line = lines_of(self._loads, layer=self.layer, expert=self.expert).iloc[0]
        load = (
            f"{int(line['tokens'])} tokens, {line['expert_load']:.1%} of the layer's (uniform: {line['uniform']:.1%})"
        )
        heading = f"<b>{escape(f'layer {self.layer}, expert {self.expert}')}</b>: {escape(load)}"
        found = [(field.name, getattr(self.card, field.name)) for field in fields(self.card)]
        parts = "".join(_table_html(name, table) for name, table in found if isinstance(table, pd.DataFrame))
        self._below.value = f'{heading}<div style="display:flex;flex-wrap:wrap;gap:10px 32px">{parts}</div>'

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", proposal["value"], self._layers)

    @traitlets.validate("expert")
    def _is_expert(self, proposal: Any) -> int:
        return one_of("expert", proposal["value"], self._experts)


def _table_html(name: str, table: pd.DataFrame) -> str:
    """A small table as HTML. Every text in it is escaped, for tokens hold anything."""
    columns = [column for column in table.columns if column not in ("layer", "expert", "token_id")]
    head = "".join(f'<th style="{CELL}">{escape(str(column)).replace("_", " ")}</th>' for column in columns)
    lines = "".join(
        "<tr>" + "".join(f'<td style="{CELL}">{_cell(line[column])}</td>' for column in columns) + "</tr>"
        for line in table.to_dict("records")
    )
    heading = escape(HEADINGS.get(name, name.replace("_", " ")))
    return f'<div style="margin-top:6px"><i>{heading}</i><table><tr>{head}</tr>{lines}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return " ".join(_cell(each) for each in value)
    return (
        f'<code style="background:none">{escape(visible(value))}</code>'
        if isinstance(value, str)
        else escape(str(value))
    )
