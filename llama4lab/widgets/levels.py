"""Numbers and classes as what a browser draws: one byte a cell, and a colour for each byte."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, Real
from matplotlib.colors import Colormap, Normalize

MISSING = 255
STEPS = 255  # levels 0 to 254
MOST_CELLS = 2**20
MOST_NUMBERS = 2**16  # beyond this many cells, a tooltip reads the number off the level


@dataclass(frozen=True, eq=False)
class Levels:
    """The cells of a grid, ready to be sent.

    Attributes:
        shape: Rows and columns.
        cells: One byte for each cell, row by row; 255 is a cell without a value.
        palette: Red, green and blue of each of the 256 levels.
        title: What the colours mean.
        names: The names of the classes; none for numbers.
        ticks: Where on the scale (0 to 1) which number is written.
        limits: The numbers of the levels 0 and 254.
        numbers: The exact numbers as 32-bit floats, for tooltips; empty for classes and for large grids.
        strengths: One byte for each cell of classes: how strong its colour is; empty where all are at full strength.
        strength_title: What the strength means.
    """

    shape: tuple[int, int]
    cells: bytes
    palette: bytes
    title: str
    names: list[str] = field(default_factory=list)
    ticks: list[tuple[float, str]] = field(default_factory=list)
    limits: tuple[float, float] = (0.0, 1.0)
    numbers: bytes = b""
    strengths: bytes = b""
    strength_title: str = ""

    @classmethod
    def of_numbers(
        cls, values: Real[np.ndarray, "row column"], norm: Normalize, colormap: Colormap, *, title: str
    ) -> "Levels":
        """Numbers on a scale.

        Args:
            values: The numbers; NaN is a cell without a value. What is outside the scale has the colour of its end.
            norm: The scale: linear, with both ends set.
            colormap: Its colours.
            title: What the numbers are.

        Raises:
            ValueError: if there are more cells than can be sent, or the scale is not linear or has no ends.
        """
        _check_size(values)
        if norm.vmin is None or norm.vmax is None or not norm.vmin < norm.vmax:
            raise ValueError(f"The scale goes from {norm.vmin} to {norm.vmax}; give it two ends, the lower first.")
        ends = float(norm.vmin), float(norm.vmax)
        middle = (ends[0] + ends[1]) / 2
        if not np.isclose(float(norm(middle)), 0.5):
            raise ValueError("The scale is not linear; transform the numbers and use matplotlib.colors.Normalize.")
        share = (np.asarray(values, dtype=float) - ends[0]) / (ends[1] - ends[0])
        level = np.rint(share.clip(0, 1) * (STEPS - 1))
        cells = np.where(np.isnan(share), MISSING, level).astype(np.uint8)
        colors = colormap(np.linspace(0, 1, STEPS))[:, :3]
        ticks = [
            (place, f"{number:.3g}") for place, number in zip((0.0, 0.5, 1.0), (ends[0], middle, ends[1]), strict=True)
        ]
        numbers = values.astype("<f4").tobytes() if values.size <= MOST_NUMBERS else b""
        return cls(_shape(values), cells.tobytes(), _packed(colors), title, [], ticks, ends, numbers)

    @classmethod
    def of_classes(
        cls,
        classes: Int[np.ndarray, "row column"],
        names: Sequence[str],
        colors: Float[np.ndarray, "class 3"],
        *,
        title: str,
        strengths: tuple[str, np.ndarray] | None = None,
    ) -> "Levels":
        """One of up to 255 classes in each cell.

        Args:
            classes: The number of the class; a negative one is a cell without a class.
            names: The name of each class.
            colors: Red, green and blue (0 to 1) of each class.
            title: What the classes are.
            strengths: What the strength of a colour means, and that of each cell, from 0 to 1: the weaker, the fainter
                the colour.

        Raises:
            ValueError: if there are more cells or classes than can be sent, a class without name or colour, or
                strengths of another shape.
        """
        _check_size(classes)
        highest = int(classes.max(initial=-1))
        if len(names) != len(colors) or len(names) > STEPS or highest >= len(names):
            raise ValueError(
                f"There are {len(names)} names and {len(colors)} colours for classes up to {highest}.\n"
                f"Give every class one of each; {STEPS} classes can be shown."
            )
        cells = np.where(classes < 0, MISSING, classes).astype(np.uint8)
        packed, strength_title = b"", ""
        if strengths is not None:
            strength_title, values = strengths
            if values.shape != classes.shape:
                raise ValueError(f"There are strengths for {values.shape} cells and classes for {classes.shape}.")
            packed = np.rint(255 * np.nan_to_num(values).clip(0, 1)).astype(np.uint8).tobytes()
        return cls(
            _shape(classes),
            cells.tobytes(),
            _packed(colors),
            title,
            list(names),
            strengths=packed,
            strength_title=strength_title,
        )


def _check_size(values: np.ndarray) -> None:
    if values.size > MOST_CELLS or values.size == 0:
        raise ValueError(
            f"A grid of {' x '.join(map(str, values.shape))} cells was asked for; 1 to {MOST_CELLS:,} can be shown.\n"
            "Choose a part, or pool neighbours first."
        )


def _shape(values: np.ndarray) -> tuple[int, int]:
    rows, columns = values.shape
    return rows, columns


def _packed(colors: np.ndarray) -> bytes:
    """Colours as 256 times three bytes; grey for the levels that have none."""
    palette = np.full((256, 3), 160, dtype=np.uint8)
    palette[: len(colors)] = np.rint(np.asarray(colors, dtype=float).clip(0, 1) * 255)
    return palette.tobytes()
