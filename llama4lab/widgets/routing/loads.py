"""How the experts are loaded, as a map to point at."""

from typing import Any

import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import bare_choices
from llama4lab.tables.routing.loads import expert_load as expert_load_of
from llama4lab.viz import routing, style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.widgets.bars import Bars, Details
from llama4lab.widgets.controls import dropdown, one_of, slider
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import MapView, Picture, lines_of

ALL = "all"
GROUPINGS = ("group", "modality", "row")
MOST_SERIES = 6  # groups of bars side by side
Counted = pd.DataFrame | RoutingStats
Source = Run | Counted


class ExpertLoad(MapView):
    """Layers by experts, coloured by load; a click shows the bars of a layer.

    Attributes:
        layer: Layer of the bars.
        by: What is counted apart: "all" (nothing), or "modality", "row" or "group" where there are several.
        group: Which of its groups the map shows; "all" without any.
        selection: The selected cell, for example `{"layer": 3, "expert": 5}`; empty without one.
        grid: The map, a `Grid`.
        bars: The loads in the layer, `Bars`.
    """

    layer = traitlets.Int()
    by = traitlets.Unicode(ALL)
    group = traitlets.Any(ALL)
    CONTEXT = ("layer",)
    HINT = "Click a row to see the bars of its layer."

    def __init__(self, source: Source) -> None:
        """Makes the view.

        Args:
            source: A run with `router.indices` recorded, a table made by `tables.routing.decisions`, or statistics of a
                corpus.
        """
        self.source: Counted = bare_choices(source) if isinstance(source, Run) else source
        self._groupings = [ALL, *groupings(self.source)]
        self._tables: dict[str, pd.DataFrame] = {}
        self._layers = np.unique(self._whole(ALL)["layer"]).tolist()
        super().__init__(layer=self._layers[0])
        self.bars = Bars()
        controls = [slider(self, "layer", self._layers)] if len(self._layers) > 1 else []
        if len(self._groupings) > 1:
            self._group_control: Any = dropdown(self, "group", [ALL])
            self._group_control.layout.display = "none"
            controls += [dropdown(self, "by", self._groupings), self._group_control]
        self.observe(lambda _: self._regroup(), "by")
        self.begin(["group", "layer"], controls, [self.bars])
        self.bars.observe(lambda _: self._bar(), "selected")

    @property
    def table(self) -> pd.DataFrame:
        """What the map shows, as `tables.routing.expert_load` gives it; of one group, if counted apart."""
        whole = self._whole(self.by)
        return whole if self.by == ALL else lines_of(whole, **{self.by: self.group})

    def draw(self) -> Axes:
        """The static twin: `viz.routing.expert_load` of `table`."""
        return routing.expert_load(self.table)

    @property
    def caption(self) -> str:
        """What the map shows, in a line."""
        return f"expert load, layer by layer{'' if self.by == ALL else f'; {self.by} {self.group}'}"

    def picture(self) -> Picture:
        """The map for what is chosen now."""
        scale = float(np.max(self._whole(self.by)["expert_load"]))
        return load_picture(self.table, scale)

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map a layer and expert are."""
        layer, expert = selection.get("layer"), selection.get("expert")
        known = layer in self._layers and expert in range(len(self.grid.columns))
        return [self._layers.index(layer), int(expert)] if known and expert is not None else []

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """Layer and expert of a cell."""
        return {"layer": self._layers[cell[0]], "expert": cell[1]}

    def describe(self) -> None:
        """Shows the bars of the layer."""
        own = style.only(self._whole(self.by), "layer", self.layer)
        groups = [] if self.by == ALL else list(dict.fromkeys(own[self.by]))
        if len(groups) > MOST_SERIES:
            own, groups = lines_of(own, **{self.by: self.group}), []
        lines = [line.sort_values("expert") for line in ([lines_of(own, **{self.by: g}) for g in groups] or [own])]
        loads = np.stack([line["expert_load"].to_numpy(dtype=float) for line in lines])
        names = [str(expert) for expert in range(loads.shape[1])]
        colors = expert_colors(np.arange(loads.shape[1])) if len(lines) == 1 else shades(len(lines))
        tokens = np.stack([line["tokens"].to_numpy() for line in lines])
        details: Details = {
            "titles": ("expert", "share of the layer's tokens"),
            "series": [str(group) for group in groups] or [str(self.group)],
            "notes": [f"{' + '.join(map(str, column))} tokens" for column in tokens.T.tolist()],
            "line": (float(own["uniform"].iloc[0]), "uniform"),
        }
        self.bars.show(loads, names, colors, f"layer {self.layer}: expert load", **details)
        self.bars.selected = self.selection.get("expert")

    def _whole(self, by: str) -> pd.DataFrame:
        """The table of all groups."""
        if by not in self._tables:
            self._tables[by] = expert_load_of(self.source, by=None if by == ALL else by)
        return self._tables[by]

    def _regroup(self) -> None:
        """Offers the groups of another grouping, and shows the first."""
        groups = self._groups()
        with self.hold_trait_notifications():
            self._group_control.options = [ALL] if self.by == ALL else groups
            self._group_control.layout.display = "none" if self.by == ALL else None
            self._group_control.description = "group" if self.by == ALL else self.by
        if self.group != groups[0]:
            self.group = groups[0]
        else:
            self.refresh()

    def _groups(self) -> list:
        return [ALL] if self.by == ALL else list(dict.fromkeys(self._whole(self.by)[self.by]))

    def _bar(self) -> None:
        """Takes over a clicked bar."""
        if self.bars.selected is not None:
            self.selection = {"layer": self.layer, "expert": self.bars.selected}

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", proposal["value"], self._layers)

    @traitlets.validate("by")
    def _is_grouping(self, proposal: Any) -> str:
        return one_of("by", proposal["value"], self._groupings)

    @traitlets.validate("group")
    def _is_group(self, proposal: Any) -> Any:
        return one_of("group", proposal["value"], self._groups())


def groupings(source: Counted) -> list[str]:
    """The columns of a source by which it can be counted apart: those with several values."""
    choices = source if isinstance(source, pd.DataFrame) else source.choices()
    return [name for name in GROUPINGS if name in choices and len(set(choices[name])) > 1]


def load_picture(table: pd.DataFrame, highest: float) -> Picture:
    """Loads as a map of layers and experts; an expert without tokens has a cross."""
    cells = table.pivot(index="layer", columns="expert", values=["expert_load", "tokens"])
    loads, tokens = cells["expert_load"].to_numpy(dtype=float), cells["tokens"].to_numpy()
    title = f"share of the layer's tokens\nuniform: {table['uniform'].iloc[0]:.3g}"
    levels = Levels.of_numbers(loads, Normalize(0, highest or 1.0), style.SEQUENTIAL, title=title)
    layers, experts = (np.unique(table[name]).tolist() for name in ("layer", "expert"))
    texts = [["" if count else "×" for count in line] for line in tokens.tolist()]
    notes = [[f"{count} tokens" for count in line] for line in tokens.astype(int).tolist()]
    return Picture(levels, [str(x) for x in layers], [str(x) for x in experts], ("layer", "expert"), texts, notes)


def shades(count: int) -> np.ndarray:
    """A colour for each of several series, from light to dark."""
    return style.SEQUENTIAL(np.linspace(0.3, 0.7, count))[:, :3]
