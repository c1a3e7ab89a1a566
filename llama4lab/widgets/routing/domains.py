"""Which experts serve which group of tokens, as a map to point at."""

from typing import Any

import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import bare_choices
from llama4lab.tables.routing.domains import specialization as specialization_of
from llama4lab.viz import routing, style
from llama4lab.widgets.bars import Bars, Details
from llama4lab.widgets.controls import buttons, dropdown, one_of, slider
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import MapView, Picture, lines_of
from llama4lab.widgets.routing.loads import Counted, Source, groupings

DOUBLINGS = 4.0  # at the ends of the scale of lifts
MEASURES = {"share": "share of the group's tokens", "lift": "lift: times as often as over all tokens, log2"}


class Specialization(MapView):
    """Groups by experts in a layer, coloured by the share of the group's tokens; a click shows an expert's groups.

    Attributes:
        layer: Layer of the router.
        by: What the groups are, for example "group" or "modality".
        measure: "share" of the group's tokens, or "lift": how many times as often as over all tokens.
        selection: The selected cell, for example `{"layer": 3, "group": "facts", "expert": 5}`; empty without one.
        grid: The map, a `Grid`.
        bars: The groups of the selected expert, `Bars`.
    """

    layer = traitlets.Int()
    by = traitlets.Unicode("group")
    measure = traitlets.Enum(list(MEASURES), "share")
    CONTEXT = ("layer",)
    UPWARD = False
    HINT = "Click a cell to see all groups of its expert."

    def __init__(self, source: Source) -> None:
        """Makes the view.

        Args:
            source: Statistics of a corpus; or a run with `router.indices` recorded, or a table made by
                `tables.routing.decisions`, whose groups are modalities and rows.

        Raises:
            ValueError: if all tokens are of one group.
        """
        self.source: Counted = bare_choices(source) if isinstance(source, Run) else source
        self._groupings = groupings(self.source)
        if not self._groupings:
            raise ValueError(
                "All tokens are of one group, so there is nothing to compare.\n"
                'Count them apart: routing_stats(model, prompts, by="domain").'
            )
        self._tables: dict[str, pd.DataFrame] = {}
        first = self._groupings[0]
        self._layers = np.unique(self._whole(first)["layer"]).tolist()
        super().__init__(layer=self._layers[0], by=first)
        self.bars = Bars()
        controls = [slider(self, "layer", self._layers)] if len(self._layers) > 1 else []
        controls += [dropdown(self, "by", self._groupings)] if len(self._groupings) > 1 else []
        self.begin(["layer", "by", "measure"], [*controls, buttons(self, "measure", list(MEASURES))], [self.bars])
        self.bars.observe(lambda _: self._bar(), "selected")

    @property
    def table(self) -> pd.DataFrame:
        """What the map shows: the lines of `tables.routing.specialization` of the layer."""
        return lines_of(self._whole(self.by), layer=self.layer)

    def draw(self) -> Axes:
        """The static twin: `viz.routing.specialization` of the layer."""
        return routing.specialization(self.table, self.layer, column=self.measure)

    @property
    def caption(self) -> str:
        """What the map shows, in a line."""
        return f"{MEASURES[self.measure]}; layer {self.layer}; by {self.by}"

    def picture(self) -> Picture:
        """The map for what is chosen now."""
        table = self.table
        self._groups = list(dict.fromkeys(table[self.by].tolist()))
        shape = len(self._groups), -1
        cells = {name: table[name].to_numpy(dtype=float).reshape(shape) for name in ("tokens", "share", "lift")}
        title = MEASURES[self.measure]
        if self.measure == "share":
            title += f"\nuniform: {table['uniform'].iloc[0]:.3g}"
            highest = float(np.max(self._whole(self.by)["share"])) or 1.0
            levels = Levels.of_numbers(cells["share"], Normalize(0, highest), style.SEQUENTIAL, title=title)
        else:
            scale = Normalize(-DOUBLINGS, DOUBLINGS)
            levels = Levels.of_numbers(logarithms(cells["lift"]), scale, style.DIVERGING, title=title)
        notes = [
            [
                f"{tokens:.0f} tokens, share {share:.3g}, lift {lift:.3g}"
                for tokens, share, lift in zip(*line, strict=True)
            ]
            for line in zip(*(each.tolist() for each in cells.values()), strict=True)
        ]
        columns = [str(expert) for expert in range(cells["share"].shape[1])]
        return Picture(levels, [str(group) for group in self._groups], columns, (self.by, "expert"), None, notes)

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map a group and expert are."""
        group, expert = selection.get(self.by), selection.get("expert")
        if group not in self._groups or expert not in range(len(self.grid.columns)) or expert is None:
            return []
        return [self._groups.index(group), int(expert)] if selection.get("layer") == self.layer else []

    def exists(self, selection: dict[str, Any]) -> bool:
        """Whether there is such a layer, group and expert."""
        return selection.get("layer") in self._layers and bool(self.cell_of({**selection, "layer": self.layer}))

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """Layer, group and expert of a cell."""
        return {"layer": self.layer, self.by: self._groups[cell[0]], "expert": cell[1]}

    def describe(self) -> None:
        """Shows the groups of the selected expert."""
        self.bars.layout.display = None if self.selection else "none"
        if not self.selection:
            return
        expert = self.selection["expert"]
        own = lines_of(self.table, expert=expert)
        shares = own["share"].to_numpy(dtype=float)
        overall = float(np.sum(own["tokens"]) / np.sum(own["group_tokens"]))
        details: Details = {
            "titles": (self.by, "share of the group's tokens"),
            "notes": [f"{a} of {b} tokens" for a, b in zip(own["tokens"], own["group_tokens"], strict=True)],
            "line": (overall, "of all tokens"),
        }
        title = f"layer {self.layer}, expert {expert}: share of each {self.by}'s tokens"
        colors = np.tile(style.SEQUENTIAL(0.7)[:3], (len(shares), 1))
        self.bars.show(shares[None], [str(group) for group in self._groups], colors, title, **details)
        self.bars.selected = self._groups.index(self.selection[self.by])

    def _whole(self, by: str) -> pd.DataFrame:
        """The table of all layers."""
        if by not in self._tables:
            self._tables[by] = specialization_of(self.source, by=by)
        return self._tables[by]

    def _bar(self) -> None:
        """Takes over a clicked bar."""
        now = self.grid.selected
        if self.bars.selected is not None and now:
            self.selection = self.place_of([self.bars.selected, now[1]])

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", proposal["value"], self._layers)

    @traitlets.validate("by")
    def _is_grouping(self, proposal: Any) -> str:
        return one_of("by", proposal["value"], self._groupings)


def logarithms(lifts: np.ndarray) -> np.ndarray:
    """Lifts in doublings; what never comes is at the end of the scale, an expert without tokens has none."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log2(lifts), -99.0)
