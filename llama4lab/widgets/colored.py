"""What all coloured pictures share: the levels that are sent, and the scripts that draw them."""

from collections.abc import Sequence
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from jaxtyping import Float

from llama4lab.viz.expert_colors import faded
from llama4lab.widgets.fallback import WithFallback
from llama4lab.widgets.levels import MISSING, Levels

STATIC = Path(__file__).parent / "static"
LOOKS = STATIC / "page.css"
EMPTY = 230  # grey of a cell without a value


def script(name: str) -> str:
    """The script of a picture, after what all of them share."""
    return "\n".join((STATIC / part).read_text("utf-8") for part in ("page.js", f"{name}.js"))


class Colored(WithFallback, anywidget.AnyWidget):
    """A picture whose cells have the colours of `Levels`.

    Attributes:
        version: Counts the pictures.
    """

    _css = LOOKS

    cells = traitlets.Bytes().tag(sync=True)
    palette = traitlets.Bytes().tag(sync=True)
    numbers = traitlets.Bytes().tag(sync=True)
    strengths = traitlets.Bytes().tag(sync=True)
    strength_title = traitlets.Unicode().tag(sync=True)
    limits = traitlets.List(traitlets.Float()).tag(sync=True)
    ticks = traitlets.List().tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    notes = traitlets.List(traitlets.Unicode()).tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    version = traitlets.Int(0).tag(sync=True)

    def take(self, levels: Levels, notes: Sequence[str] = ()) -> None:
        """Takes over the colours of all cells; `hold_sync` makes one message of this and what goes with it."""
        self.cells, self.palette, self.numbers = levels.cells, levels.palette, levels.numbers
        self.strengths, self.strength_title = levels.strengths, levels.strength_title
        self.limits, self.names, self.title = list(levels.limits), levels.names, levels.title
        self.ticks = [list(tick) for tick in levels.ticks]
        self.notes = list(notes)
        self.version += 1

    def colors(self) -> Float[np.ndarray, "cell 3"]:
        """Red, green and blue (0 to 1) of each cell, as on a white page."""
        cells = np.frombuffer(self.cells, np.uint8)
        shown = np.frombuffer(self.palette, np.uint8).reshape(256, 3)[cells] / 255
        if self.strengths:
            shown = faded(shown, np.frombuffer(self.strengths, np.uint8) / 255)
        return np.where(cells[:, None] == MISSING, EMPTY / 255, shown)
