"""What the views of one token share: a map of what the model chose, on which the token is picked."""

from collections.abc import Callable
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.metrics import Metric
from llama4lab.run.recording import record
from llama4lab.tables.routing.choices import ROUTER
from llama4lab.tables.routing.choices import decisions as decisions_of
from llama4lab.widgets.controls import dropdown, one_of, slider
from llama4lab.widgets.map_view import Picture, lines_of
from llama4lab.widgets.routing.choices import TokenMap, axes_of, choice_picture, chosen

SLOT = 0  # the token's best expert


class PlaceView(TokenMap):
    """A map of decisions, on which one token in one layer is always picked.

    Attributes:
        row: Row of the prompt.
        layer: Layer of the router.
        position: Position of the token.
        selection: All three, for example `{"row": 0, "layer": 3, "position": 5}`.
        grid: The map, a `Grid`.
    """

    layer = traitlets.Int()
    position = traitlets.Int()
    CONTEXT = ("row", "layer", "position")

    def __init__(
        self,
        model: HookedPreTrainedModel,
        prompt: Any,
        *,
        metric: Metric | Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Makes the view, with the token picked that was nearest to going elsewhere, the last one left out.

        Args:
            model: The model.
            prompt: A `Prompt`, or anything that `model.prompt` takes.
            metric: One of `lab.metrics`, or a function of the logits; by default the loss.
        """
        self.model, self.metric = model, metric
        self._tables: dict[tuple, pd.DataFrame] = {}
        self.run = record(model, prompt, at=f"layers.*.{ROUTER}*")
        self._whole = decisions_of(self.run)
        self._layers = np.unique(self._whole["layer"]).tolist()
        own = chosen(self._whole, self.run.rows[0], SLOT)
        last = own["position"].to_numpy() == np.max(own["position"])
        margins = np.where(last, np.inf, own["margin"].to_numpy(dtype=float))
        nearest = own.iloc[int(np.argmin(np.nan_to_num(margins, nan=np.inf)))]
        super().__init__(**{name: int(nearest[name]) for name in self.CONTEXT})
        self.compose()

    def compose(self) -> None:
        """Makes what is above and below the map, and calls `start` with it."""
        self.start([], [], [])

    def start(self, controls: list[ipywidgets.Widget], below: list[ipywidgets.Widget], choices: list[str]) -> None:
        """Puts the parts together, with the first token picked."""
        own = [dropdown(self, "row", self.run.rows)] if len(self.run.rows) > 1 else []
        own += [slider(self, "layer", self._layers)] if len(self._layers) > 1 else []
        self.begin([*self.CONTEXT, *choices], [*own, *controls], below)
        with self._quiet():
            self.selection = {name: getattr(self, name) for name in self.CONTEXT}
            self.grid.selected = self.cell_of(self.selection)

    def picture(self) -> Picture:
        """The map of what the model chose."""
        return choice_picture(chosen(self._whole, self.row, SLOT))

    def refresh(self) -> None:
        """Draws the map again; where a row does not have the position, its first one is picked."""
        if not self._adopting and self.position not in self._positions:
            with self._quiet():
                self._adopting = True
                self.position = self._positions[0]
                self._adopting = False
        if not self.selection and not self._adopting:
            with self._quiet():
                self.selection = {name: getattr(self, name) for name in self.CONTEXT}
        super().refresh()

    def exists(self, selection: dict[str, Any]) -> bool:
        """Whether the run has this row, layer and position."""
        if selection.keys() != set(self.CONTEXT) or selection["row"] not in self.run.rows:
            return False
        positions = axes_of(chosen(self._whole, selection["row"], SLOT))[1]
        return selection["layer"] in self._layers and selection["position"] in positions

    @property
    def _positions(self) -> list[int]:
        return axes_of(chosen(self._whole, self.row, SLOT))[1]

    @property
    def _token(self) -> str:
        own = chosen(self._whole, self.row, SLOT)
        return str(lines_of(own, position=self.position)["token"].iloc[0])

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", proposal["value"], self._layers)

    @traitlets.validate("position")
    def _is_position(self, proposal: Any) -> int:
        return one_of("position", proposal["value"], self.run.positions if self._adopting else self._positions)
