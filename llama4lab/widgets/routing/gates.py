"""What an expert writes when it is fed more or less, token by token."""

import ipywidgets
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.tables.routing.gates import gate_curve as gate_curve_of
from llama4lab.viz import routing
from llama4lab.widgets.map_view import lines_of, picture_html
from llama4lab.widgets.routing.places import PlaceView


class GateCurve(PlaceView):
    """The curve of one token's expert over its gate; click another token in the map to see its curve.

    Attributes:
        row: Row of the prompt.
        layer: Layer of the router.
        position: Position of the token.
        selection: All three.
        grid: The map, a `Grid`.
    """

    HINT = "Click a token in the map to see the curve of its expert."

    def compose(self) -> None:
        """Makes what is above and below the map."""
        self._curve = ipywidgets.HTML().add_class("l4-picture")
        self.start([], [self._curve], [])

    @property
    def table(self) -> pd.DataFrame:
        """`tables.routing.gate_curve` of the picked token."""
        key = (self.row, self.layer, self.position)
        if key not in self._tables:
            table = gate_curve_of(
                self.model, self.run.prompt, layer=self.layer, position=self.position, metric=self.metric
            )
            self._tables[key] = lines_of(table, row=self.row)
        return self._tables[key]

    def draw(self) -> Axes:
        """The static twin: `viz.routing.gate_curve` of `table`."""
        return routing.gate_curve(self.table)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        expert = self.table["expert"].iloc[0]
        return f"what expert {expert} writes, by its gate; layer {self.layer}, position {self.position}"

    def describe(self) -> None:
        """Draws the curve of the picked token."""
        self._curve.value = picture_html(self.draw(), self.caption)
