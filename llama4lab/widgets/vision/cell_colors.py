"""The colours of cells over a picture, as bytes: those of `llama4lab.viz.vision`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.vision.looks import look_of
from llama4lab.widgets.levels import Levels

ALPHA = 0.7
CHANNELS = ["red", "green", "blue"]


@dataclass(frozen=True, eq=False)
class CellColors:
    """What a browser needs to colour cells over a picture.

    Attributes:
        levels: One row of cells.
        opacities: One byte for each level: how much it covers the picture.
        rgb: Red, green and blue of each cell, where they are no levels.
    """

    levels: Levels
    opacities: bytes
    rgb: bytes = b""

    @classmethod
    def of_numbers(cls, table: pd.DataFrame, value: str, title: str, alpha: float = ALPHA) -> "CellColors":
        """The numbers of a column, on the scale that plots have; NaN is a cell that is not covered."""
        values = table[value].to_numpy(dtype=float)[None]
        if not np.isfinite(values).any():
            norm, colormap = Normalize(0.0, 1.0), style.SEQUENTIAL
            return cls(Levels.of_numbers(values, norm, colormap, title=title), _even(alpha))
        look = look_of(table, value)
        assert look.norm is not None
        assert look.cmap is not None
        covered = look.color_map(alpha)(np.linspace(0, 1, 255))[:, 3]
        opacities = np.rint(255 * np.append(covered, 0.0)).astype(np.uint8).tobytes()
        return cls(Levels.of_numbers(values, look.norm, look.cmap, title=title), opacities)

    @classmethod
    def of_experts(cls, experts: Sequence[int] | np.ndarray, count: int, title: str) -> "CellColors":
        """Experts, of which there are `count`."""
        names = [str(expert) for expert in range(count)]
        classes = np.asarray(experts, dtype=int)[None]
        return cls(Levels.of_classes(classes, names, expert_colors(np.arange(count)), title=title), _even(ALPHA))

    @classmethod
    def of_components(cls, table: pd.DataFrame, title: str) -> "CellColors":
        """The columns red, green and blue."""
        levels = Levels.of_classes(np.zeros((1, len(table)), dtype=int), [title], np.ones((1, 3)), title=title)
        rgb = np.rint(255 * table[CHANNELS].to_numpy(dtype=float).clip(0, 1)).astype(np.uint8)
        return cls(levels, _even(0.9), rgb.tobytes())


def _even(alpha: float) -> bytes:
    return np.full(256, round(255 * alpha), dtype=np.uint8).tobytes()
