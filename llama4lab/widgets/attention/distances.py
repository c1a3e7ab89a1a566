"""How far back attention goes, as curves to point at."""

from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from llama4lab.run.attention.streaming import AttentionStream
from llama4lab.run.run import Run
from llama4lab.tables.attention.streams import mass_at_distance
from llama4lab.viz import attention
from llama4lab.viz.attention.patterns import KINDS
from llama4lab.widgets.attention.curves import Curves
from llama4lab.widgets.attention.head_maps import layer_options
from llama4lab.widgets.controls import bar, dropdown, one_of, slider
from llama4lab.widgets.fallback import WithFallback
from llama4lab.widgets.map_view import lines_of

TITLES = ("attention", "distance from the query back to the key (tokens)")
TINTS = {"rope": ("#9cc3de", "#0b3c6f"), "nope": ("#f2b56b", "#9a4a00")}  # of the first and the last line of a kind


class Distances(WithFallback, ipywidgets.VBox):
    """Attention by distance: a line for each layer, and below a line for each head of the picked layer.

    Attributes:
        layer: The picked layer.
        head: The picked head; None for none.
        table: `tables.attention.mass_at_distance` of all layers.
        by_layer: The upper curves, `Curves`.
        by_head: The lower curves, `Curves`.
    """

    layer = traitlets.Int()
    head = traitlets.Int(None, allow_none=True)

    def __init__(self, source: Run | AttentionStream | pd.DataFrame) -> None:
        """Makes the view.

        Args:
            source: A run with `layers.*.self_attn.q_rot` and `layers.*.self_attn.k_rot`, what `attention_stream` gives,
                or a table of `tables.attention.mass_at_distance`.

        Raises:
            ValueError: if a table has no lines.
        """
        self.table = source if isinstance(source, pd.DataFrame) else mass_at_distance(source)
        if self.table.empty:
            raise ValueError("The table has no lines; give what tables.attention.mass_at_distance gave.")
        self.layers, self.heads = (np.unique(self.table[name]).tolist() for name in ("layer", "head"))
        self.kinds = dict(zip(self.table["layer"], self.table["kind"], strict=True))
        whole = [layer for layer in self.layers if self.kinds[layer] == "nope"]
        super().__init__(layer=[*whole, *self.layers][0])
        self.by_layer = Curves(TITLES, twin=self.draw)
        self.by_head = Curves(TITLES, twin=lambda: attention.mass_at_distance(self.table, layer=self.layer))
        controls = [slider(self, "layer", layer_options(self.layers, self.kinds))] if len(self.layers) > 1 else []
        controls.append(dropdown(self, "head", [("all", None), *((str(head), head) for head in self.heads)]))
        self.children = [bar(controls), self.by_layer, self.by_head]
        self._draw_layers()
        self._draw_heads()
        self.by_layer.selected = self.layers.index(self.layer)
        self.observe(lambda _: self._picked(), "layer")
        self.observe(lambda _: self._picked_head(), "head")
        self.by_layer.observe(lambda _: self._clicked(), "selected")
        self.by_head.observe(lambda _: self._clicked_head(), "selected")

    @property
    def ax(self) -> Axes:
        """The lines of all layers as a matplotlib figure."""
        return self.draw()

    def draw(self) -> Axes:
        """The static twin: `viz.attention.mass_at_distance` of `table`."""
        return attention.mass_at_distance(self.table)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"attention by distance; {len(self.layers)} layers"

    def _draw_layers(self) -> None:
        kinds = [self.kinds[layer] for layer in self.layers]
        names = [f"layer {name}" for name, _ in layer_options(self.layers, self.kinds)]
        self._draw(self.by_layer, self.table, "layer", names, kinds, "attention by distance, mean of the heads")

    def _draw_heads(self) -> None:
        kind = self.kinds[self.layer]
        names, kinds = [f"head {head}" for head in self.heads], [kind] * len(self.heads)
        own = lines_of(self.table, layer=self.layer)
        self._draw(self.by_head, own, "head", names, kinds, f"layer {self.layer} ({KINDS[kind]}), by head")

    def _draw(
        self, curves: Curves, table: pd.DataFrame, by: str, names: list[str], kinds: list[str], title: str
    ) -> None:
        """Draws one line for each layer or head."""
        lines = table.pivot_table(index=by, columns=["nearest", "farthest"], values="mass", aggfunc="mean")
        points = [
            (place, str(near) if near == far else f"{near}–{far}") for place, (near, far) in enumerate(lines.columns)
        ]
        dashes = [kind == "nope" and by == "layer" for kind in kinds]
        curves.show(lines.to_numpy(dtype=float), names, tints(kinds), points, title=title, dashes=dashes)

    def _picked(self) -> None:
        self._draw_heads()
        self.by_layer.selected = self.layers.index(self.layer)

    def _picked_head(self) -> None:
        self.by_head.selected = None if self.head is None else self.heads.index(self.head)

    def _clicked(self) -> None:
        if self.by_layer.selected is None:
            self.by_layer.selected = self.layers.index(self.layer)  # one layer is always picked
        else:
            self.layer = self.layers[self.by_layer.selected]

    def _clicked_head(self) -> None:
        self.head = None if self.by_head.selected is None else self.heads[self.by_head.selected]

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", proposal["value"], self.layers)

    @traitlets.validate("head")
    def _is_head(self, proposal: Any) -> int | None:
        return proposal["value"] if proposal["value"] is None else one_of("head", proposal["value"], self.heads)


def tints(kinds: Sequence[str]) -> Float[np.ndarray, "line 3"]:
    """A colour for each line: blue for RoPE layers, orange for NoPE layers, darker from first to last."""
    shares = []
    for place, kind in enumerate(kinds):
        same = [other for other, each in enumerate(kinds) if each == kind]
        share = same.index(place) / max(len(same) - 1, 1)
        first, last = (np.array(to_rgb(color)) for color in TINTS[kind])
        shares.append((1 - share) * first + share * last)
    return np.array(shares).reshape(-1, 3)
