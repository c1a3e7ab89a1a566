"""How far one token can reach, to point at: another source, another length, barred layers."""

from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.tables.attention.horizons import horizon as horizon_of
from llama4lab.viz import attention
from llama4lab.viz.attention.horizons import SHADES
from llama4lab.viz.attention.patterns import KINDS
from llama4lab.widgets.attention.barring import checked_layers, far_layers, switches
from llama4lab.widgets.attention.maps import Frame
from llama4lab.widgets.controls import STYLE
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import MOST_TEXTS, MapView, Picture, lines_of

MOST_COLUMNS = 128  # stretches of positions
MOST_BORDERS = 64  # in a layer; more would cover it
CHUNKS = 4  # in a text of the usual length
NAMES = ["the token", "1 step", "2 steps", "3 steps or more", "not reached"]
NOT_REACHED, COLORS = 4, [*SHADES.values(), "#c9c9c9"]


class Horizon(MapView):
    """Layers by positions: where something of one token can be, in how many steps, and which layer brought it.

    Nothing is run. Upright lines are the borders of chunks. In a long text a column is a stretch of positions, with the
    colour of the fewest steps in it.

    Attributes:
        length: Of the text, in tokens.
        source: Position of the token.
        barred: Layers that see no earlier chunk, a tuple.
        selection: The selected cell, for example `{"layer": 3, "position": 70}`; empty without one.
        grid: The map, a `Grid`.
    """

    length = traitlets.Int()
    source = traitlets.Int(0)
    barred = traitlets.Tuple()
    HINT = "Click a cell to read what reaches it. Layers without RoPE can be barred above."

    def __init__(self, model: HookedPreTrainedModel, length: int | None = None) -> None:
        """Makes the view.

        Args:
            model: The model.
            length: Of the text, in tokens; by default that of a few chunks.
        """
        self.model, self._far = model, far_layers(model)
        size = facts(model.config, model.text)["chunk_size"]
        super().__init__(length=CHUNKS * (size or MOST_COLUMNS // CHUNKS) if length is None else length)
        self._said = ipywidgets.HTML().add_class("l4-cell")
        controls = [self._number("length", 1, None), self._number("source", 0, self.length - 1)]
        self._source_control = controls[1]
        if self._far:
            controls.append(switches(self, "barred", self._far, "barred layers"))
        self.observe(lambda _: self._limit_source(), "length")
        self.begin(["length", "source", "barred"], controls, [self._said])
        self.grid.frames = self._frames()

    @property
    def table(self) -> pd.DataFrame:
        """`tables.attention.horizon` of what is chosen."""
        return horizon_of(self.model, self.length, source=self.source, barred=list(self.barred))

    def draw(self) -> Axes:
        """The static twin: `viz.attention.horizon` of `table`."""
        return attention.horizon(self.table)

    @property
    def caption(self) -> str:
        """What the map shows, in a line."""
        barred = f"; layers {', '.join(map(str, self.barred))} barred" if self.barred else ""
        return f"what position {self.source} reaches in {self.length:,} tokens{barred}"

    def refresh(self) -> None:
        """Draws the map again."""
        super().refresh()
        self.grid.frames = self._frames()

    def picture(self) -> Picture:
        """The map for what is chosen now."""
        self._now = self.table
        self._layers = np.unique(self._now["layer"]).tolist()
        most = max(1, min(MOST_COLUMNS, MOST_TEXTS // len(self._layers)))
        self._step = -(-self.length // most)
        count = -(-self.length // self._step)
        classes = np.full((len(self._layers), count), NOT_REACHED)
        notes = [[""] * count for _ in self._layers]
        for line in self._now.to_dict("records"):
            layer, first, last = (line["layer"], line["start"] // self._step, (line["stop"] - 1) // self._step)
            steps = NOT_REACHED if pd.isna(line["hops"]) else min(int(line["hops"]), NOT_REACHED - 1)
            place = self._layers.index(layer)
            classes[place, first : last + 1] = np.minimum(classes[place, first : last + 1], steps)
            for column in range(first, last + 1):
                notes[place][column] += ("\n" if notes[place][column] else "") + _way(line)
        title = f"steps from position {self.source}"
        levels = Levels.of_classes(classes, NAMES, np.array([to_rgb(color) for color in COLORS]), title=title)
        starts = [column * self._step for column in range(count)]
        columns = [_span(start, min(start + self._step, self.length)) for start in starts]
        kinds = dict(zip(self._now["layer"], self._now["kind"], strict=True))
        rows = [f"NoPE {layer}" if kinds[layer] == "nope" else str(layer) for layer in self._layers]
        return Picture(levels, rows, columns, ("layer", "position"), None, notes)

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map a layer and position are."""
        if not self.exists(selection):
            return []
        return [self._layers.index(selection["layer"]), selection["position"] // self._step]

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """Layer and first position of a cell."""
        return {"layer": self._layers[cell[0]], "position": cell[1] * self._step}

    def exists(self, selection: dict[str, Any]) -> bool:
        """Whether there are such a layer and position."""
        known = selection.keys() == {"layer", "position"} and selection["layer"] in self._layers
        return known and isinstance(selection["position"], int) and 0 <= selection["position"] < self.length

    def describe(self) -> None:
        """Says what reaches the selected place."""
        self._said.value = ""
        if self.selection:
            own, position = lines_of(self._now, layer=self.selection["layer"]), self.selection["position"]
            here = own.loc[(own["start"] <= position) & (position < own["stop"]), :].to_dict("records")[0]
            layer = f"behind layer {here['layer']} ({KINDS[here['kind']]})"
            self._said.value = f"<b>{escape(f'position {position} {layer}')}</b>: {escape(_way(here))}"

    def _number(self, name: str, low: int, high: int | None) -> ipywidgets.Widget:
        bounds = {"min": low, "max": 2**53 if high is None else high}
        options: dict[str, Any] = {"value": getattr(self, name), "description": name, "style": STYLE, **bounds}
        box = ipywidgets.BoundedIntText(**options, layout={"width": "170px", "margin": "2px 14px 2px 2px"})
        traitlets.link((self, name), (box, "value"))
        return box.add_class(f"l4-{name}")

    def _limit_source(self) -> None:
        """Keeps the source inside of a text that became shorter."""
        self.source = min(self.source, self.length - 1)
        self._source_control.set_trait("max", self.length - 1)

    def _frames(self) -> list[Frame]:
        """The borders of chunks in each layer: frames without any width."""
        frames = []
        for place, layer in enumerate(self._layers):
            size = lines_of(self._now, layer=layer)["chunk_size"].tolist()[0]
            if not pd.isna(size) and self.length / size <= MOST_BORDERS:
                frames += [[place, start / self._step, 1, 0, False] for start in range(size, self.length, size)]
        return frames

    @traitlets.validate("length")
    def _is_length(self, proposal: Any) -> int:
        if proposal["value"] < 1:
            raise traitlets.TraitError(f"length={proposal['value']} was asked for; a text has 1 token or more.")
        return proposal["value"]

    @traitlets.validate("source")
    def _is_source(self, proposal: Any) -> int:
        if not 0 <= proposal["value"] < self.length:
            last = self.length - 1
            raise traitlets.TraitError(f"source={proposal['value']} was asked for; there are positions 0 to {last}.")
        return proposal["value"]

    @traitlets.validate("barred")
    def _can_be_barred(self, proposal: Any) -> tuple[int, ...]:
        return checked_layers(proposal["value"], self._far)


def _span(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}–{stop - 1}"


def _way(line: dict[str, Any]) -> str:
    """What reaches a stretch of positions, and how."""
    where = _span(line["start"], line["stop"])
    if pd.isna(line["hops"]):
        return f"{where}: not reached"
    if not line["hops"]:
        return f"{where}: the token itself"
    steps = "1 step" if line["hops"] == 1 else f"{line['hops']} steps"
    return f"{where}: reached in {steps}, first by layer {line['since']}"
