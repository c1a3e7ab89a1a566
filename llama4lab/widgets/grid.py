"""`Grid`: a matrix of coloured cells to point at, drawn by the browser."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import traitlets
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.token_axis import token_label
from llama4lab.widgets.colored import Colored, script
from llama4lab.widgets.levels import Levels

LONGEST = 16
MOST_LABELS = 40  # along a side of the picture
Texts = Sequence[Sequence[str]]


class Grid(Colored):
    """A matrix of coloured cells: hover for a tooltip, click or use the arrow keys to select a cell.

    Attributes:
        selected: Row and column of the selected cell, or nothing. Set it to select from code.
        frames: Frames around cells: first row, first column, rows, columns, and whether the line is dotted.
    """

    _esm = script("grid")

    shape = traitlets.List(traitlets.Int()).tag(sync=True)
    rows = traitlets.List(traitlets.Unicode()).tag(sync=True)
    columns = traitlets.List(traitlets.Unicode()).tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    titles = traitlets.List(traitlets.Unicode()).tag(sync=True)
    upward = traitlets.Bool(False).tag(sync=True)
    selected = traitlets.List(traitlets.Int()).tag(sync=True)
    frames = traitlets.List().tag(sync=True)

    def __init__(
        self,
        levels: Levels,
        rows: Sequence[str],
        columns: Sequence[str],
        *,
        titles: tuple[str, str] = ("row", "column"),
        upward: bool = False,
        texts: Texts | None = None,
        notes: Texts | None = None,
        twin: Callable[[], Axes] | None = None,
    ) -> None:
        """Makes a grid.

        Args:
            levels: The cells and their colours.
            rows: The label of each row.
            columns: The label of each column.
            titles: What the rows are, and what the columns are.
            upward: Whether the first row is at the bottom.
            texts: For each row and column, what to write into the cell where it has room.
            notes: For each row and column, further lines of its tooltip.
            twin: Gives the picture for saved notebooks; by default one of the coloured cells.
        """
        super().__init__(upward=upward)
        self.twin = twin
        self.add_class("l4-grid")
        self.show(levels, rows, columns, titles=titles, texts=texts, notes=notes)

    def show(
        self,
        levels: Levels,
        rows: Sequence[str],
        columns: Sequence[str],
        *,
        titles: tuple[str, str] | None = None,
        texts: Texts | None = None,
        notes: Texts | None = None,
    ) -> None:
        """Shows another picture; a selected cell stays selected if the new picture has it.

        Args:
            levels: The cells and their colours.
            rows: The label of each row.
            columns: The label of each column.
            titles: What the rows and the columns are; by default as before.
            texts: As for a new grid.
            notes: As for a new grid.

        Raises:
            ValueError: if labels or texts do not fit the number of rows and columns.
        """
        if (len(rows), len(columns)) != levels.shape:
            raise ValueError(f"{len(rows)} rows and {len(columns)} columns have labels; the grid has {levels.shape}.")
        flat = [_flat(each, levels.shape) for each in (texts, notes)]
        kept = self.selected if self.selected and _inside(self.selected, levels.shape) else []
        with self.hold_sync():
            self.shape, self.rows, self.columns = list(levels.shape), list(rows), list(columns)
            self.titles = [*(titles or self.titles[:2]), levels.title]
            self.texts, self.selected = flat[0], kept
            self.take(levels, flat[1])

    @traitlets.validate("selected")
    def _exists(self, proposal: Any) -> list[int]:
        wanted = list(proposal["value"])
        if wanted and self.shape and not _inside(wanted, (self.shape[0], self.shape[1])):
            raise traitlets.TraitError(f"Cell {wanted} was selected; the grid has {self.shape[0]} x {self.shape[1]}.")
        return wanted

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        rows, columns, title = (part.replace("\n", " ") for part in self.titles)
        return f"{title}; {self.shape[0]} {rows} x {self.shape[1]} {columns}"

    def draw(self) -> Axes:
        """The static twin; without one, the coloured cells."""
        return self.twin() if self.twin is not None else self._plain()

    def _plain(self) -> Axes:
        ax = style.axes(None, 2.2 + 0.25 * self.shape[1], 2.2 + 0.25 * self.shape[0])
        ax.imshow(
            self.colors().reshape(*self.shape, 3),
            aspect="auto",
            origin="lower" if self.upward else "upper",
            interpolation="nearest",
        )
        for axis, labels, size in ((ax.xaxis, self.columns, self.shape[1]), (ax.yaxis, self.rows, self.shape[0])):
            step = -(-size // MOST_LABELS)
            axis.set_ticks(range(0, size, step), [_drawable(label) for label in labels[::step]])
        ax.tick_params(axis="x", rotation=90)
        ax.set(xlabel=self.titles[1], ylabel=self.titles[0], title=self.titles[2])
        plt.setp(ax.spines.values(), visible=False)
        return ax


def _drawable(label: str) -> str:
    """The start of a label in characters that matplotlib's font has; its spaces are not those of a token."""
    start = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"
    return " ".join(token_label(part, 2 * LONGEST) for part in start.split(" "))


def _inside(cell: Sequence[int], shape: tuple[int, int]) -> bool:
    return len(cell) == 2 and all(0 <= place < size for place, size in zip(cell, shape, strict=True))


def _flat(texts: Texts | None, shape: tuple[int, int]) -> list[str]:
    if texts is None:
        return []
    if len(texts) != shape[0] or any(len(line) != shape[1] for line in texts):
        raise ValueError(f"Texts of {len(texts)} rows were given; there must be one for each of {shape} cells.")
    return [text for line in texts for text in line]
