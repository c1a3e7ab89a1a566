"""Attention patterns of all heads of a layer, to point at."""

from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from llama4lab.model.facts import chunk_sizes
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.run import Run
from llama4lab.tables.attention.head_summaries import VALUES, value_weighted
from llama4lab.tables.attention.patterns import PATTERN, mass
from llama4lab.tables.attention.patterns import pattern as pattern_of
from llama4lab.tables.token_index import places
from llama4lab.viz import attention, style
from llama4lab.widgets.attention.head_maps import HeadCells, HeadMapView, kinds_of, split
from llama4lab.widgets.attention.maps import Frame
from llama4lab.widgets.bars import Bars, Details
from llama4lab.widgets.controls import buttons, dropdown, one_of
from llama4lab.widgets.levels import MOST_CELLS
from llama4lab.widgets.map_view import Picture, lines_of
from llama4lab.widgets.token_text import visible

LONGEST, BRIEF = 12, 8  # characters of a token beside the map and below a bar
MOST_BARS = 48  # keys; of more, those with the most attention
PLAIN, WEIGHTED = "attention", "value-weighted"
PALE = "#9cc3de"
COLUMNS = {PLAIN: "weight", WEIGHTED: "value_weighted"}


class Patterns(HeadMapView):
    """Patterns: small maps of all heads, a large one, and the keys of a query as bars where one clicks.

    Frames are chunks, dotted in layers without RoPE, which see past them. Cells that a query cannot see are grey.

    Attributes:
        row: Row of the prompt.
        layer: The layer.
        head: The query head.
        weighting: "attention", or "value-weighted": by the norm of what each key's value brings.
        selection: The selected cell, for example `{"row": 0, "layer": 3, "head": 1, "query": 9, "key": 4}`.
        maps: The small maps, `Maps`.
        grid: The large map, a `Grid`.
        bars: The keys of the selected query, `Bars`.
    """

    row = traitlets.Int()
    weighting = traitlets.Enum([PLAIN, WEIGHTED], PLAIN)
    CONTEXT = ("row", "layer", "head")
    HINT = "Click a head above, or a row to see the keys of its query."

    def __init__(self, run: Run, model: HookedPreTrainedModel | None = None) -> None:
        """Makes the view.

        Args:
            run: A run with `layers.*.self_attn.pattern`; for value-weighted patterns also `layers.*.self_attn.v`.
            model: If given, a value counts by what it is in the residual stream; see
                `tables.attention.value_weighted`.

        Raises:
            KeyError: if no pattern was recorded.
            ValueError: if the patterns are too long to be sent.
        """
        self.run, self.model, recorded = run, model, run.layers(PATTERN)
        self.layers, first = list(recorded), next(iter(recorded.values()))
        self.heads, self._keys = list(range(first.shape[1])), first.shape[3]
        if first.shape[2] * first.shape[3] > MOST_CELLS:
            most = MOST_CELLS // first.shape[3]
            raise ValueError(
                f"Patterns of {first.shape[2]:,} queries and {first.shape[3]:,} keys were to be shown.\n"
                f"Cut the run: run.cut(positions=slice(-{most}, None)) has {most} queries."
            )
        self.kinds, self._place, self._sums = kinds_of(run.meta), places(run), mass(run)
        self._last: tuple[tuple, pd.DataFrame] = ((), pd.DataFrame())
        super().__init__(row=run.rows[0], layer=self.layers[0], head=0)
        self.bars = Bars()
        self._heading = ipywidgets.HTML().add_class("l4-cell")
        controls = [dropdown(self, "row", run.rows)] if len(run.rows) > 1 else []
        if self._can_weigh:
            controls.append(buttons(self, "weighting", [PLAIN, WEIGHTED]))
        self.start(["row", "weighting"], controls, [self._heading, self.bars])
        self.bars.observe(lambda _: self._bar(), "selected")

    @property
    def table(self) -> pd.DataFrame:
        """What the large map shows: `tables.attention.pattern` or `value_weighted` of the row, layer and head."""
        return self._table(self.head)

    def draw(self) -> Axes:
        """The static twin: `viz.attention.pattern` of `table`, with the chosen weights."""
        ax = attention.pattern(self.table.assign(weight=self.table[COLUMNS[self.weighting]]))
        if self.weighting == WEIGHTED:
            ax.set_title(f"{ax.get_title()}, {WEIGHTED}")
        return ax

    @property
    def caption(self) -> str:
        """What the map shows, in a line."""
        rows = f"; row {self.row}" if len(self.run.rows) > 1 else ""
        return f"{self.measure} of {self.where}{rows}"

    @property
    def measure(self) -> str:
        """What the numbers are."""
        return PLAIN if self.weighting == PLAIN else f"{WEIGHTED} attention"

    def cells(self) -> HeadCells:
        """The patterns of all heads of the layer."""
        queries, keys = self._axes(self.row)
        if self.weighting == WEIGHTED:
            tables = [self._table(head)[COLUMNS[WEIGHTED]].to_numpy(dtype=float) for head in self.heads]
            values = np.stack(tables).reshape(-1, len(queries), len(keys))
        else:
            whole = self.run[f"layers.{self.layer}.{PATTERN}"][self.run.rows.index(self.row)]
            own = [self.run.positions.index(query) for query in queries]
            values = whole.detach()[:, own][:, :, keys].double().cpu().numpy()
        sums = lines_of(self._sums, layer=self.layer)
        tips = ["\n".join(split(line)) for line in sums.to_dict("records")]
        return HeadCells(np.where(self._unseen(), np.nan, values), tips)

    def frames(self) -> list[Frame]:
        """The chunks, where there are several."""
        size, frames = chunk_sizes(self.run.meta)[self.layer], []
        usual, dotted = size or self.run.meta["chunk_size"], size is None
        if usual is None:
            return []
        sides = [self._place[self.row][axis] // usual for axis in self._axes(self.row)]
        for chunk in np.unique(sides[1]).tolist() if len(np.unique(sides[1])) > 1 else []:
            rows, columns = (np.flatnonzero(side == chunk).tolist() for side in sides)
            if rows:
                frames.append([rows[0], columns[0], len(rows), len(columns), dotted])
        return frames

    def picture(self) -> Picture:
        """The large map."""
        queries, keys = self._axes(self.row)
        values = self.table[COLUMNS[self.weighting]].to_numpy(dtype=float).reshape(len(queries), len(keys))
        rows, columns = ([f"{self._token(position)} {position}" for position in axis] for axis in (queries, keys))
        return Picture(self.levels(np.where(self._unseen(), np.nan, values)), rows, columns, self.TITLES)

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map a query and a key are."""
        if not self.exists(selection) or any(selection[name] != getattr(self, name) for name in self.CONTEXT):
            return []
        queries, keys = self._axes(self.row)
        return [queries.index(selection["query"]), keys.index(selection["key"])]

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """Row, layer, head, query and key of a cell."""
        queries, keys = self._axes(self.row)
        context = {name: getattr(self, name) for name in self.CONTEXT}
        return {**context, "query": queries[cell[0]], "key": keys[cell[1]]}

    def exists(self, selection: dict[str, Any]) -> bool:
        """Whether the run has such a row, layer, head, query and key."""
        if selection.keys() != {*self.CONTEXT, "query", "key"} or selection["row"] not in self.run.rows:
            return False
        queries, keys = self._axes(selection["row"])
        known = {"layer": self.layers, "head": self.heads, "query": queries, "key": keys}
        return all(selection[name] in known[name] for name in known)

    def describe(self) -> None:
        """Shows what the selected query looks at."""
        self.bars.layout.display = None if self.selection else "none"
        if not self.selection:
            self._heading.value = f"<b>{escape(self.where)}</b>"
            return
        query, key = self.selection["query"], self.selection["key"]
        own = lines_of(self.table, query=query)
        here = lines_of(own, key=key).iloc[0]
        numbers = ", ".join(f"{name} {here[COLUMNS[name]]:.4f}" for name in self._series)
        where = f"{self.where}, query {query} {self._token(query)}"
        self._heading.value = f"<b>{escape(where)}</b>: key {key} {escape(self._token(key))}, {numbers}"
        self._show_keys(own, query, key)

    def _show_keys(self, own: pd.DataFrame, query: int, key: int) -> None:
        """Shows the keys up to a query as bars; of many, those with the most attention."""
        seen = own.loc[(own["key"] <= query) | (own["key"] == key), :]
        most = np.nan_to_num(seen[COLUMNS[self.weighting]].to_numpy(dtype=float))
        largest = np.argsort(-np.where(seen["key"] == key, np.inf, most), kind="stable")[:MOST_BARS]
        title = f"keys of query {query} {self._token(query)}"
        if len(largest) < len(seen):
            title += f", the {len(largest)} largest of {len(seen)}"
        seen = seen.iloc[np.sort(largest)]
        self._shown = seen["key"].tolist()
        heights = np.stack([seen[COLUMNS[name]].to_numpy(dtype=float) for name in self._series])
        details: Details = {
            "titles": ("key", "share"),
            "series": self._series,
            "notes": [f"position {each}, {query - each} tokens back" for each in self._shown],
        }
        several = len(self._series) > 1
        colors = np.array([to_rgb(PALE), to_rgb(style.BLUE)] if several else [to_rgb(style.BLUE)] * len(seen))
        names = [self._token(each, BRIEF) for each in self._shown]
        self.bars.show(heights, names, colors, title, **details)
        self.bars.selected = self._shown.index(key)

    @property
    def _series(self) -> list[str]:
        return [PLAIN, WEIGHTED] if self.weighting == WEIGHTED else [PLAIN]

    @property
    def _can_weigh(self) -> bool:
        return all(f"layers.{layer}.{VALUES}" in self.run for layer in self.layers)

    def _table(self, head: int) -> pd.DataFrame:
        key = (self.row, self.layer, head, self.weighting)
        if self._last[0] != key:
            where = (self.run, self.layer, head, self.row)
            table = pattern_of(*where) if self.weighting == PLAIN else value_weighted(*where, model=self.model)
            self._last = (key, table)
        return self._last[1]

    def _axes(self, row: int) -> tuple[list[int], list[int]]:
        """The positions of the queries and the keys of a row, without padding."""
        place = self._place[row]
        queries = [position for position in self.run.positions if place[position] >= 0]
        return queries, np.flatnonzero(place[: self._keys] >= 0).tolist()

    def _unseen(self) -> np.ndarray:
        """Which keys each query cannot see: later ones, and those of other chunks in a chunked layer."""
        queries, keys = (self._place[self.row][axis] for axis in self._axes(self.row))
        size = chunk_sizes(self.run.meta)[self.layer]
        later = keys[None] > queries[:, None]
        return later if size is None else later | (keys[None] // size != queries[:, None] // size)

    def _token(self, position: int, longest: int = LONGEST) -> str:
        return visible(self.run.prompt.tokens[self.row][position], longest)

    def _bar(self) -> None:
        """Takes over a clicked bar."""
        if self.bars.selected is not None and self.selection and not self._quietly:
            key = self._shown[self.bars.selected]
            self.selection = {name: key if name == "key" else value for name, value in self.selection.items()}

    @traitlets.validate("row")
    def _is_row(self, proposal: Any) -> int:
        return one_of("row", proposal["value"], self.run.rows)

    @traitlets.validate("weighting")
    def _is_weighting(self, proposal: Any) -> str:
        return one_of("weighting", proposal["value"], [PLAIN, WEIGHTED] if self._can_weigh else [PLAIN])
