"""Attention from chunk to chunk, to point at."""

from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from llama4lab.run.attention.streaming import AttentionStream, recorded_stream
from llama4lab.run.run import Run
from llama4lab.tables.attention.chunk_maps import chunk_map as chunk_map_of
from llama4lab.tables.attention.streams import reductions
from llama4lab.viz import attention, style
from llama4lab.widgets.attention.head_maps import HeadCells, HeadMapView, split
from llama4lab.widgets.attention.maps import Frame
from llama4lab.widgets.bars import Bars
from llama4lab.widgets.map_view import Picture, lines_of

MEAN = "mean"
MOST_WRITTEN = 16  # chunks; the numbers of more have no room


class ChunkMap(HeadMapView):
    """Attention from chunk to chunk: small maps of all heads, a large one, and what all heads send where one clicks.

    Frames mark what a chunk sends to itself; they are dotted in layers without RoPE, which see past them.

    Attributes:
        layer: The layer.
        head: The head, or "mean".
        selection: The selected cell, for example `{"layer": 3, "head": 0, "query_chunk": 2, "key_chunk": 1}`.
        table: `tables.attention.chunk_map` of all layers.
        maps: The small maps, `Maps`.
        grid: The large map, a `Grid`.
        bars: What each head sends from the selected chunk to the other, `Bars`.
    """

    head = traitlets.Any(MEAN)
    CONTEXT = ("layer", "head")
    TITLES = ("query chunk", "key chunk")
    HINT = "Click a head above, or a cell to compare the heads there."

    def __init__(self, source: Run | AttentionStream | pd.DataFrame) -> None:
        """Makes the view.

        Args:
            source: A run with `layers.*.self_attn.q_rot` and `layers.*.self_attn.k_rot`, what `attention_stream` gives,
                or a table of `tables.attention.chunk_map`.
        """
        stream = recorded_stream(source) if isinstance(source, Run) else source
        self.table = stream if isinstance(stream, pd.DataFrame) else chunk_map_of(stream)
        self._sums = None if isinstance(stream, pd.DataFrame) else reductions(stream)
        self._size = None if isinstance(stream, pd.DataFrame) else stream.meta["chunk_size"]
        if self.table.empty:
            raise ValueError("The table has no lines; give what tables.attention.chunk_map gave.")
        self.layers, numbers, self._chunks = (
            np.unique(self.table[name]).tolist() for name in ("layer", "head", "query_chunk")
        )
        self.heads = [MEAN, *numbers]
        self.kinds = dict(zip(self.table["layer"], self.table["kind"], strict=True))
        whole = [layer for layer in self.layers if self.kinds[layer] == "nope"]
        super().__init__(layer=[*whole, *self.layers][0])
        self.bars = Bars()
        self._heading = ipywidgets.HTML().add_class("l4-cell")
        self.start([], [], [self._heading, self.bars])
        self.bars.observe(lambda _: self._bar(), "selected")

    def draw(self) -> Axes:
        """The static twin: `viz.attention.chunk_map` of the layer and head."""
        return attention.chunk_map(self.table, layer=self.layer, head=None if self.head == MEAN else self.head)

    @property
    def caption(self) -> str:
        """What the map shows, in a line."""
        return f"attention from chunk to chunk; {self.where}"

    @property
    def measure(self) -> str:
        """What the numbers are."""
        return "attention (mean over the queries of a chunk)"

    def cells(self) -> HeadCells:
        """The maps of the mean and of all heads of the layer."""
        masses = self._masses()
        tips = [""] * len(self.heads)
        if self._sums is not None:
            tips = ["\n".join(self._split(head)) for head in self.heads]
        return HeadCells(np.concatenate([masses.mean(0, keepdims=True), masses]), tips)

    def frames(self) -> list[Frame]:
        """What each chunk sends to itself, where there are several."""
        count, dotted = len(self._chunks), self.kinds[self.layer] == "nope"
        return [[chunk, chunk, 1, 1, dotted] for chunk in range(count)] if count > 1 else []

    def picture(self) -> Picture:
        """The large map."""
        mass = self.cells().values[self.heads.index(self.head)]
        names = [str(chunk) for chunk in self._chunks]
        texts = notes = None
        if len(names) <= MOST_WRITTEN:
            texts = [["" if np.isnan(each) else f"{each:.2f}" for each in line] for line in mass]
        if self._size:
            spans = [f"{chunk * self._size}–{(chunk + 1) * self._size - 1}" for chunk in self._chunks]
            notes = [[f"queries {query}, keys {key}" for key in spans] for query in spans]
        return Picture(self.levels(mass), names, names, self.TITLES, texts, notes)

    def cell_of(self, selection: dict[str, Any]) -> list[int]:
        """Where in the map two chunks are."""
        if not self.exists(selection) or any(selection[name] != getattr(self, name) for name in self.CONTEXT):
            return []
        return [self._chunks.index(selection[name]) for name in ("query_chunk", "key_chunk")]

    def place_of(self, cell: list[int]) -> dict[str, Any]:
        """Layer, head and chunks of a cell."""
        chunks = {"query_chunk": self._chunks[cell[0]], "key_chunk": self._chunks[cell[1]]}
        return {"layer": self.layer, "head": self.head, **chunks}

    def exists(self, selection: dict[str, Any]) -> bool:
        """Whether there are such a layer, head and chunks."""
        known = {"layer": self.layers, "head": self.heads, "query_chunk": self._chunks, "key_chunk": self._chunks}
        return selection.keys() == known.keys() and all(selection[name] in known[name] for name in known)

    def describe(self) -> None:
        """Says where the attention of the head goes, and compares the heads in the selected cell."""
        sums = [] if self._sums is None else self._split(self.head)
        self._heading.value = f"<b>{escape(self.where)}</b> {escape('; '.join(sums))}"
        self.bars.layout.display = None if self.selection else "none"
        if not self.selection:
            return
        query, key = self.cell_of(self.selection)
        mass = self._masses()[:, query, key]
        if np.isnan(mass).any():
            mass = np.zeros(len(mass))  # a later chunk
        title = f"attention from chunk {self._chunks[query]} to chunk {self._chunks[key]}"
        colors = np.tile(to_rgb(style.BLUE), (len(mass), 1))
        names, line = [str(head) for head in self.heads[1:]], (float(mass.mean()), "mean of the heads")
        self.bars.show(mass[None], names, colors, title, titles=("head", "attention"), line=line)
        self.bars.selected = None if self.head == MEAN else self.heads.index(self.head) - 1

    def _masses(self) -> np.ndarray:
        """Attention by head, chunk of the queries and chunk of the keys; NaN for later keys."""
        own = lines_of(self.table, layer=self.layer)
        chunks = np.array(self._chunks)
        place = np.searchsorted(np.array(self.heads[1:]), own["head"])
        masses = np.full((len(self.heads) - 1, len(chunks), len(chunks)), np.nan)
        masses[place, np.searchsorted(chunks, own["query_chunk"]), np.searchsorted(chunks, own["key_chunk"])] = own[
            "mass"
        ]
        return masses

    def _split(self, head: Any) -> list[str]:
        """Where the attention of a head goes."""
        assert self._sums is not None
        own = lines_of(self._sums, layer=self.layer)
        means = (own if head == MEAN else lines_of(own, head=head)).mean(numeric_only=True)
        return split(means.to_dict())

    def _bar(self) -> None:
        """Takes over a clicked bar."""
        if self.bars.selected is not None and not self._quietly:
            self.head = self.heads[self.bars.selected + 1]
