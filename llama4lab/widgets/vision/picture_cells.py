"""`PictureCells`: a picture under coloured cells to point at, drawn by the browser."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from PIL import Image

from llama4lab.viz.vision.picture import Picture, in_grey
from llama4lab.widgets.colored import Colored, script
from llama4lab.widgets.vision.cell_colors import CellColors

SIDES = ["left", "top", "right", "bottom"]
MOST_PIXELS = 1200  # along a side of what is sent; more would not be seen


class PictureCells(Colored):
    """A picture in grey, and over it one coloured cell for each place: hover, click or arrow keys to select one.

    Attributes:
        selected: Which cell is selected, from 0; None without. Set it to select from code.
        marked: Cells that have an orange frame.
    """

    _esm = script("patches")

    picture = traitlets.Bytes().tag(sync=True)
    size = traitlets.List(traitlets.Int()).tag(sync=True)
    boxes = traitlets.Bytes().tag(sync=True)
    opacities = traitlets.Bytes().tag(sync=True)
    rgb = traitlets.Bytes().tag(sync=True)
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    frames = traitlets.List().tag(sync=True)
    marked = traitlets.List(traitlets.Int()).tag(sync=True)
    selected = traitlets.Int(None, allow_none=True).tag(sync=True)

    def __init__(self, *, twin: Callable[[], Axes]) -> None:
        """Makes room for a picture; `put` and `show` fill it.

        Args:
            twin: Gives the picture for saved notebooks.
        """
        super().__init__(limits=[0.0, 1.0], size=[1, 1])
        self.twin = twin
        self.add_class("l4-cells-of")

    def put(self, image: Picture) -> None:
        """Puts another picture under the cells."""
        grey = Image.fromarray((255 * in_grey(image)).round().astype(np.uint8))
        size = list(grey.size)
        grey.thumbnail((MOST_PIXELS, MOST_PIXELS))
        buffer = io.BytesIO()
        grey.save(buffer, format="png")
        with self.hold_sync():
            self.size, self.picture = size, buffer.getvalue()

    def show(
        self,
        places: pd.DataFrame,
        colors: CellColors,
        labels: Sequence[str],
        *,
        notes: Sequence[str] = (),
        texts: Sequence[str] = (),
        marked: Sequence[int] = (),
    ) -> None:
        """Shows other cells; nothing stays selected if there is another number of them.

        Args:
            places: A line for each cell, with its box and its tile.
            colors: Their colours.
            labels: What each cell is: the first line of its tooltip.
            notes: For each cell, further lines of its tooltip.
            texts: For each cell, what to write into it where it has room.
            marked: The cells that have an orange frame.

        Raises:
            ValueError: if there is not one of each for every cell.
        """
        counts = {len(labels), *(len(each) for each in (notes, texts) if len(each))}
        if colors.levels.shape != (1, len(places)) or counts != {len(places)}:
            raise ValueError(
                f"There are {len(places)} cells, colours for {colors.levels.shape} and {sorted(counts)} texts; "
                "give one for each."
            )
        with self.hold_sync():
            self.selected = self.selected if len(places) == len(self.labels) else None
            self.boxes = places[SIDES].to_numpy(dtype="<f4").tobytes()
            self.labels, self.texts, self.marked = list(labels), list(texts), list(marked)
            self.opacities, self.rgb, self.frames = colors.opacities, colors.rgb, _tiles(places)
            self.take(colors.levels, notes)

    @traitlets.validate("selected")
    def _exists(self, proposal: Any) -> int | None:
        wanted = proposal["value"]
        if wanted is not None and not 0 <= wanted < len(self.labels):
            raise traitlets.TraitError(f"Cell {wanted} was selected; there are cells 0 to {len(self.labels) - 1}.")
        return wanted

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"{self.title}; {len(self.labels)} cells".replace("\n", " ")

    def draw(self) -> Axes:
        """The static twin."""
        return self.twin()


def _tiles(places: pd.DataFrame) -> list[list[float]]:
    """The borders of the tiles."""
    seen = places.loc[(places["right"] > places["left"]) & (places["bottom"] > places["top"]), :]
    ends = seen.groupby("tile").agg({"left": "min", "top": "min", "right": "max", "bottom": "max"})
    return ends.to_numpy(dtype=float).tolist()
