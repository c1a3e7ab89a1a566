"""`Maps`: small maps side by side on one scale, one for each head, to see which one to look at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import traitlets
from jaxtyping import Real
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.widgets.colored import Colored, script
from llama4lab.widgets.levels import MOST_CELLS, Levels

MOST_SIDE = 160  # cells along a side; a map is hardly wider on the page
ACROSS = 6  # maps in a line of the picture
# Row and column of the first cell, numbers of rows and columns, and whether the frame is dotted.
Frame = list[float | int]


class Maps(Colored):
    """Small maps: hover for a tooltip, click or use the arrow keys to select one.

    Attributes:
        selected: Which map is selected, from 0; None without. Set it to select from code.
    """

    _esm = script("maps")

    shape = traitlets.List(traitlets.Int()).tag(sync=True)
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    rows = traitlets.List(traitlets.Unicode()).tag(sync=True)
    columns = traitlets.List(traitlets.Unicode()).tag(sync=True)
    tips = traitlets.List(traitlets.Unicode()).tag(sync=True)
    titles = traitlets.List(traitlets.Unicode()).tag(sync=True)
    frames = traitlets.List().tag(sync=True)
    scale = traitlets.Bool(True).tag(sync=True)
    selected = traitlets.Int(None, allow_none=True).tag(sync=True)

    def __init__(self, titles: tuple[str, str], *, scale: bool = True) -> None:
        """Makes room for maps; `show` fills it.

        Args:
            titles: What the rows are, and what the columns are.
            scale: Whether to show the scale of the colours, which a larger map beside them may have already.
        """
        super().__init__(titles=list(titles), scale=scale)
        self.add_class("l4-maps-of")

    def show(
        self,
        levels: Levels,
        labels: Sequence[str],
        rows: Sequence[str],
        columns: Sequence[str],
        *,
        tips: Sequence[str] = (),
        frames: Sequence[Frame] = (),
    ) -> None:
        """Shows maps; the selected one stays selected if there are as many as before.

        Args:
            levels: Their cells and colours: the rows of the first map, then those of the next one.
            labels: The name of each map.
            rows: What each row is, in all maps alike.
            columns: What each column is.
            tips: For each map, further lines of its tooltip.
            frames: Frames around parts of every map.

        Raises:
            ValueError: if the cells are not those of so many maps, or there is not a tip for each.
        """
        if levels.shape != (len(labels) * len(rows), len(columns)) or len(tips) not in (0, len(labels)):
            raise ValueError(
                f"There are cells of {levels.shape} and {len(tips)} tips for {len(labels)} maps of {len(rows)} x "
                f"{len(columns)} cells."
            )
        with self.hold_sync():
            self.selected = self.selected if len(labels) == len(self.labels) else None
            self.shape, self.labels = [len(labels), len(rows), len(columns)], list(labels)
            self.rows, self.columns = list(rows), list(columns)
            self.tips, self.frames = list(tips) or [""] * len(labels), [list(frame) for frame in frames]
            self.take(levels)

    @traitlets.validate("selected")
    def _exists(self, proposal: Any) -> int | None:
        wanted = proposal["value"]
        if wanted is not None and not 0 <= wanted < len(self.labels):
            raise traitlets.TraitError(f"Map {wanted} was selected; there are maps 0 to {len(self.labels) - 1}.")
        return wanted

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"{self.title}; {len(self.labels)} maps".replace("\n", " ")

    def draw(self) -> Axes:
        """All maps side by side."""
        count, height, width = self.shape
        across = min(count, ACROSS)
        down = -(-count // across)
        gap = max(1, round(0.08 * max(height, width)))
        sheet = np.ones((down * (height + gap), across * (width + gap), 3))
        ax = style.axes(None, 1.7 * across, 1.7 * down * height / width + 0.4)
        for place, cells in enumerate(self.colors().reshape(count, height, width, 3)):
            y, x = place // across * (height + gap) + gap, place % across * (width + gap)
            sheet[y : y + height, x : x + width] = cells
            ax.text(x, y - 0.2 * gap, self.labels[place], fontsize=7, va="bottom")
        ax.imshow(sheet, aspect="auto", interpolation="nearest", extent=(0, sheet.shape[1], sheet.shape[0], 0))
        ax.set(xticks=[], yticks=[], title=self.title)
        style.plain(ax, keep=())
        return ax


def pooled(values: Real[np.ndarray, "map row column"]) -> tuple[Real[np.ndarray, "map rows columns"], int]:
    """Makes maps small enough to be sent: the largest number of each block of neighbours; NaN counts for nothing.

    Args:
        values: The maps.

    Returns:
        The maps, and how many cells became one along each side.
    """
    count, height, width = values.shape
    most = max(1, min(MOST_SIDE, int((MOST_CELLS / count) ** 0.5)))
    step = -(-max(height, width) // most)
    if step == 1:
        return values, 1
    down, along = -(-height // step), -(-width // step)
    wide = np.full((count, down * step, along * step), -np.inf)
    wide[:, :height, :width] = np.nan_to_num(values, nan=-np.inf)
    blocks = wide.reshape(count, down, step, along, step).max((2, 4))
    return np.where(np.isneginf(blocks), np.nan, blocks), step
