"""What the views with a map for each head share: all heads of a layer as small maps, and one of them large."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import traitlets
from jaxtyping import Real
from matplotlib.colors import ListedColormap, Normalize

from llama4lab.model.facts import rotary_kind
from llama4lab.viz import style
from llama4lab.viz.attention.patterns import KINDS
from llama4lab.widgets.attention.maps import Frame, Maps, pooled
from llama4lab.widgets.controls import dropdown, one_of, slider
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import MapView

# Most keys get little: square roots keep them apart.
ROOTS = ListedColormap(style.SEQUENTIAL(np.sqrt(np.linspace(0, 1, 1021))))
SUMS = {"own_chunk": "own chunk", "earlier": "earlier chunks", "first_token": "first token", "itself": "itself"}


class HeadCells(NamedTuple):
    """The maps of all heads of a layer.

    Attributes:
        values: The numbers, from 0 to 1; NaN where a query cannot see a key.
        tips: For each head, further lines of its tooltip.
    """

    values: Real[np.ndarray, "map row column"]
    tips: list[str]


class HeadMapView(MapView):
    """Small maps of all heads of a layer, a large one of the picked head, and a closer look at the selected cell.

    Attributes:
        layer: The layer.
        head: The head.
        selection: What the selected cell is; empty without one.
        maps: The small maps, `Maps`.
        grid: The large map, a `Grid`.
    """

    layer = traitlets.Int()
    head = traitlets.Any()
    UPWARD = False
    TITLES = ("query", "key")
    layers: list[int]
    heads: list[Any]
    kinds: Mapping[int, str]

    def cells(self) -> HeadCells:
        """The maps of all heads of the layer."""
        raise NotImplementedError

    def frames(self) -> list[Frame]:
        """The chunks of the layer, as frames in every map."""
        raise NotImplementedError

    @property
    def measure(self) -> str:
        """What the numbers are."""
        return "attention"

    def levels(self, values: Real[np.ndarray, "row column"], step: int = 1) -> Levels:
        """The colours of a map, in which each cell is the largest of `step` x `step` ones."""
        title = self.measure if step == 1 else f"{self.measure} (largest of {step} x {step} tokens)"
        return Levels.of_numbers(values, Normalize(0, 1), ROOTS, title=title)

    def start(
        self, choices: Sequence[str], controls: Sequence[ipywidgets.Widget], below: Sequence[ipywidgets.Widget]
    ) -> None:
        """Puts the parts together.

        Args:
            choices: Traits that change all maps, besides the layer.
            controls: What is above the maps, besides layer and head.
            below: What is below the large map.
        """
        own = [slider(self, "layer", layer_options(self.layers, self.kinds))] if len(self.layers) > 1 else []
        self.begin([*choices, "layer", "head"], [*own, dropdown(self, "head", self.heads), *controls], below)
        self.grid.frames = self.frames()
        self.maps = Maps(self.TITLES, scale=False)
        self.children = [self.children[0], self.maps, *self.children[1:]]
        self._drawn: tuple[Any, ...] = ()
        self._choices = [*choices, "layer"]
        self._draw_maps()
        self.maps.observe(lambda _: self._map_clicked(), "selected")

    def refresh(self) -> None:
        """Draws the maps again; what is selected stays selected where it is in the new ones."""
        super().refresh()
        if not self._adopting:
            self.grid.frames = self.frames()
            self._draw_maps()

    @property
    def where(self) -> str:
        """The layer with its kind, and the head."""
        return f"layer {self.layer} ({KINDS[self.kinds[self.layer]]}), {head_name(self.head)}"

    def _draw_maps(self) -> None:
        chosen = tuple(getattr(self, name) for name in self._choices)
        if chosen != self._drawn:  # another head is only another frame
            values, tips = self.cells()
            small, step = pooled(values)
            names = [_blocks(labels, step) for labels in (self.grid.rows, self.grid.columns)]
            shares = [[*(part / step for part in frame[:4]), frame[4]] for frame in self.frames()]
            levels = self.levels(small.reshape(-1, small.shape[2]), step)
            self.maps.show(levels, [head_name(head) for head in self.heads], *names, tips=tips, frames=shares)
            self._drawn = chosen
        self.maps.selected = self.heads.index(self.head)

    def _map_clicked(self) -> None:
        if self.maps.selected is not None:
            self.head = self.heads[self.maps.selected]

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", proposal["value"], self.layers)

    @traitlets.validate("head")
    def _is_head(self, proposal: Any) -> Any:
        return one_of("head", proposal["value"], self.heads)


def layer_options(layers: Iterable[int], kinds: Mapping[int, str]) -> list[tuple[str, int]]:
    """Layers to choose from; those without RoPE are marked."""
    return [(f"{layer} NoPE" if kinds[layer] == "nope" else str(layer), layer) for layer in layers]


def kinds_of(meta: Mapping[str, Any]) -> dict[int, str]:
    """Whether each layer is "rope" or "nope", from facts about a model."""
    return {layer: rotary_kind(meta, layer) for layer in range(meta["num_layers"])}


def head_name(head: Any) -> str:
    """What a map of a head, or of the mean of all, is called."""
    return f"head {head}" if isinstance(head, int) else f"{head} of heads"


def split(sums: Mapping[Any, Any]) -> list[str]:
    """Where attention goes, in words: a line of `tables.attention.mass` or `reductions`."""
    return [*(f"{label} {sums[name]:.3f}" for name, label in SUMS.items()), f"entropy {sums['entropy']:.2f} nats"]


def _blocks(labels: list[str], step: int) -> list[str]:
    """The names of blocks of neighbours: the first one's and the last one's."""
    if step == 1:
        return labels
    groups = [labels[first : first + step] for first in range(0, len(labels), step)]
    return [" to ".join(dict.fromkeys((group[0], group[-1]))) for group in groups]
