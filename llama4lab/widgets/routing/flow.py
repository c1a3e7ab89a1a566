"""How tokens flow from expert to expert between layers: a picture, and a map to point at."""

from html import escape
from itertools import pairwise
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.run import Run
from llama4lab.tables import routing as tables
from llama4lab.tables.routing.choices import bare_choices
from llama4lab.viz import routing, style
from llama4lab.widgets.controls import STYLE, one_of
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import MOST_TEXTS, MapView, Picture, lines_of, picture_html
from llama4lab.widgets.routing.loads import Counted, Source

MOST_LAYERS = 4  # at the beginning


class Transitions(MapView):
    """The flow of tokens through chosen layers; below, where the tokens of each expert go, to be clicked.

    Attributes:
        layers: The layers, in order; two at least. Statistics of a corpus know neighbouring layers only.
        from_layer: From which of them to the next one the map shows.
        selection: The selected cell, for example
            `{"from_layer": 1, "to_layer": 3, "from_expert": 0, "to_expert": 5}`; empty without one.
        grid: The map, a `Grid`.
    """

    layers = traitlets.Tuple()
    from_layer = traitlets.Int()
    CONTEXT = ("from_layer",)
    HINT = "Click a cell to see how many tokens took that way."

    def __init__(self, source: Source) -> None:
        """Makes the view.

        Args:
            source: A run with `router.indices` recorded, a table made by `tables.routing.decisions`, or statistics of a
                corpus.

        Raises:
            ValueError: if there are not two layers with routers.
        """
        self.source: Counted = bare_choices(source) if isinstance(source, Run) else source
        self.known = _layers_of(self.source)
        if len(self.known) < 2:
            raise ValueError(f"Transitions need two layers with routers; there is {self.known or 'none'}.")
        self._tables: dict[tuple[int, ...], pd.DataFrame] = {}
        super().__init__(layers=tuple(self.known[:MOST_LAYERS]), from_layer=self.known[0])
        self._flow = ipywidgets.HTML().add_class("l4-picture")
        self._said = ipywidgets.HTML().add_class("l4-cell")
        self._control = ipywidgets.SelectMultiple(
            options=self.known,
            value=self.layers,
            rows=min(6, len(self.known)),
            description="layers",
            style=STYLE,
            layout={"width": "160px"},
        ).add_class("l4-layers")
        self._from = ipywidgets.Dropdown(style=STYLE, layout={"width": "auto"}).add_class("l4-from_layer")
        self._offer()
        self.begin(["from_layer"], [self._control], [self._said])
        self.children = [self.children[0], self._flow, ipywidgets.HBox([self._from]), *self.children[1:]]
        self._draw_flow()
        self._control.observe(lambda change: self._chosen(change["new"]), "value")
        self._from.observe(lambda change: self._turned(change["new"]), "value")
        self.observe(lambda _: self._rechosen(), "layers")
        self.observe(lambda _: self._from.set_trait("value", self.from_layer), "from_layer")

    @property
    def table(self) -> pd.DataFrame:
        """What the picture shows: `tables.routing.transitions` of the layers."""
        if self.layers not in self._tables:
            self._tables[self.layers] = tables.transitions(self.source, layers=list(self.layers))
        return self._tables[self.layers]

    def draw(self) -> Axes:
        """The static twin: `viz.routing.transitions` of `table`."""
        return routing.transitions(self.table)

    @property
    def caption(self) -> str:
        """What the picture shows, in a line."""
        return f"flow of tokens from expert to expert through layers {', '.join(map(str, self.layers))}"

    def picture(self) -> Picture:
        """The map from one layer to the next."""
        own = self._step()
        count = int(own.attrs["num_experts"])
        shares, tokens = np.zeros((count, count)), np.zeros((count, count), dtype=int)
        place = own["from_expert"].to_numpy(dtype=int), own["to_expert"].to_numpy(dtype=int)
        tokens[place] = own["tokens"]
        totals = tokens.sum(axis=1, keepdims=True)
        shares = np.where(totals > 0, tokens / np.maximum(totals, 1), np.nan)
        title = "share of the expert's tokens that go there"
        levels = Levels.of_numbers(shares, Normalize(0, 1), style.SEQUENTIAL, title=title)
        names = [str(expert) for expert in range(count)]
        titles = (f"expert of layer {self.from_layer}", f"expert of layer {self._next}")
        notes = None
        if tokens.size <= 2 * MOST_TEXTS:
            notes = [[f"{count} tokens" for count in line] for line in tokens.tolist()]
        return Picture(levels, names, names, titles, None, notes)

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map two experts are."""
        cell = [selection.get("from_expert"), selection.get("to_expert")]
        known = all(isinstance(expert, int) and 0 <= expert < len(self.grid.rows) for expert in cell)
        return [int(expert or 0) for expert in cell] if known and selection.get("from_layer") == self.from_layer else []

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """The two layers and experts of a cell."""
        layers = {"from_layer": self.from_layer, "to_layer": self._next}
        return {**layers, "from_expert": cell[0], "to_expert": cell[1]}

    def exists(self, selection: dict[str, Any]) -> bool:
        """Whether there are such layers and experts."""
        known = selection.get("from_layer") in self.layers[:-1]
        return known and bool(self.cell_of({**selection, "from_layer": self.from_layer}))

    def describe(self) -> None:
        """Says how many tokens took the selected way."""
        self._said.value = escape(self._way()) if self.selection else ""

    def _way(self) -> str:
        own, start, end = self._step(), self.selection["from_expert"], self.selection["to_expert"]
        took, of, arrived, everything = (
            int(np.sum(lines_of(own, **where)["tokens"]))
            for where in ({"from_expert": start, "to_expert": end}, {"from_expert": start}, {"to_expert": end}, {})
        )
        expected = arrived / max(everything, 1)
        return (
            f"{took} of {of} tokens of expert {start} in layer {self.from_layer} go on to expert {end} in layer "
            f"{self._next} ({took / max(of, 1):.0%}); of all tokens there, it gets {expected:.0%}."
        )

    @property
    def _next(self) -> int:
        return self.layers[self.layers.index(self.from_layer) + 1]

    def _step(self) -> pd.DataFrame:
        return lines_of(self.table, from_layer=self.from_layer, to_layer=self._next)

    def _chosen(self, layers: tuple[int, ...]) -> None:
        """Takes over chosen layers, once they make a chain."""
        if _is_chain(layers, self.known, self.source):
            self.layers = layers

    def _turned(self, layer: int | None) -> None:
        if layer in self.layers[:-1]:
            self.set_trait("from_layer", layer)

    def _rechosen(self) -> None:
        """Draws other layers."""
        self._control.value = self.layers
        self._offer()
        if self.from_layer in self.layers[:-1]:
            self.refresh()
        else:
            self.from_layer = self.layers[0]
        self._draw_flow()

    def _offer(self) -> None:
        now = self.from_layer if self.from_layer in self.layers[:-1] else self.layers[0]
        options = [(f"layer {a} to layer {b}", a) for a, b in pairwise(self.layers)]
        self._from.options = options
        self._from.value = now

    def _draw_flow(self) -> None:
        self._flow.value = picture_html(self.draw(), self.caption)

    @traitlets.validate("layers")
    def _is_chain(self, proposal: Any) -> tuple[int, ...]:
        layers = tuple(proposal["value"])
        if not _is_chain(layers, self.known, self.source):
            raise traitlets.TraitError(f"layers={layers} were asked for; give two or more of {self.known}, in order.")
        return layers

    @traitlets.validate("from_layer")
    def _is_start(self, proposal: Any) -> int:
        return one_of("from_layer", proposal["value"], self.layers[:-1])


def _layers_of(source: Counted) -> list[int]:
    return list(source.layers) if isinstance(source, RoutingStats) else np.unique(source["layer"]).tolist()


def _is_chain(layers: tuple[int, ...], known: list[int], source: Counted) -> bool:
    """Whether layers are two or more in order; of statistics, neighbours."""
    if len(layers) < 2 or any(layer not in known for layer in layers):
        return False
    places = [known.index(layer) for layer in layers]
    steps = {b - a for a, b in pairwise(places)}
    return min(steps) > 0 and (not isinstance(source, RoutingStats) or steps == {1})
