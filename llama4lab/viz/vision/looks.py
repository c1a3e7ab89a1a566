"""What the colours of cells mean: a scale, effects around zero, classes, or experts."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.patches import Patch

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import expert_patches
from llama4lab.viz.token_axis import token_label

Kind = Literal["scale", "effects", "classes", "experts"]
KINDS = ("scale", "effects", "classes", "experts")
SIGNED = ("effect", "normalised", "score")  # zero is in the middle of the scale
FROM_ZERO = ("weight", "prob", "share", "mass")  # zero is at the end of the scale
MOST_CLASSES = 15
OTHERS = 0.75  # the grey of what has no colour of its own
FADED = 0.5  # the share of the scale, from zero, in which cells are less opaque
# On a grey picture: the more, the brighter; so they read for every kind of colour blindness. Zero is not seen at all.
WEIGHTS = LinearSegmentedColormap.from_list("llama4lab_weights", ["#a63a00", "#e8690b", "#ffa51f", "#ffe45c"])
EFFECTS = LinearSegmentedColormap.from_list(
    "llama4lab_effects", ["#9adcff", "#3fa2f7", "#1d5fc4", "#808080", "#b34a00", "#f5840c", "#ffd166"]
)


@dataclass(frozen=True, eq=False)
class Look:
    """The colours of a column.

    Attributes:
        value: The column.
        kind: What its colours mean.
        norm: The range of the scale, of numbers.
        cmap: The colour map, of numbers.
        fades: Whether cells let the picture through at zero: weights and effects.
        names: The classes that have a colour, the first most often.
    """

    value: str
    kind: Kind
    norm: Normalize | None = None
    cmap: Colormap | None = None
    fades: bool = False
    names: tuple[object, ...] = ()

    @property
    def label(self) -> str:
        """What the scale or the legend shows."""
        if self.kind == "experts":
            layer = self.value.removeprefix("expert").removeprefix("_")
            return f"expert, layer {layer}" if layer else "expert"
        return self.value.replace("_", " ")

    def color_map(self, alpha: float | int) -> Colormap:
        """The colours of numbers, which cover the picture as far as `alpha` says, from 0 to 1; less so near zero."""
        assert self.cmap is not None
        places = np.linspace(0, 1, 256)
        colors = self.cmap(places)
        from_zero = np.abs(2 * places - 1) if self.kind == "effects" else places
        colors[:, 3] = alpha * (np.minimum(from_zero / FADED, 1) if self.fades else 1)
        return ListedColormap(colors)

    def colors(self, values: Sequence[object] | np.ndarray | pd.Series) -> np.ndarray:
        """Red, green and blue of classes or experts."""
        if self.kind == "experts":
            return expert_colors(np.asarray(values, dtype=int))
        own = np.array([self.names.index(each) if each in self.names else -1 for each in values])
        colors = expert_colors(np.maximum(own, 0))
        colors[own < 0] = OTHERS
        return colors

    def patches(self, values: Sequence[object] | np.ndarray | pd.Series) -> list[Patch]:
        """The legend of classes or experts."""
        if self.kind == "experts":
            return expert_patches(np.asarray(values, dtype=int))
        found = [
            Patch(color=tuple(color), label=token_label(str(name), 16))
            for name, color in zip(self.names, self.colors(self.names), strict=True)
        ]
        others = len({each for each in values if each not in self.names})
        return [*found, Patch(color=str(OTHERS), label=f"{others} others")] if others else found


def look_of(table: pd.DataFrame, value: str, kind: Kind | None = None) -> Look:
    """Gives the colours of a column of the cells that are drawn.

    Without a kind, experts and effects are known by their name, classes by their type; all else is a scale.

    Raises:
        KeyError: if there is no such column.
        ValueError: if there is no such kind, or no number to draw.
    """
    if value not in table:
        near = get_close_matches(value, [str(column) for column in table], cutoff=0.4)
        raise KeyError(f"The table has no column {value!r}. Near ones: {', '.join(near) or 'none'}.")
    kind = kind or _kind_of(table[value], value)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} was to be drawn; choose one of {', '.join(KINDS)}.")
    if kind == "experts":
        return Look(value, kind)
    if kind == "classes":
        counts = table[value].value_counts().index.tolist()[:MOST_CLASSES]
        # Numbers keep their own colour whatever is drawn beside them.
        return Look(value, kind, names=tuple(sorted(counts) if not isinstance(counts[0], str) else counts))
    numbers = table[value].to_numpy(dtype=float)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        raise ValueError(f"The column {value!r} was to be drawn, but it has no number in any cell.")
    if kind == "effects":
        return Look(value, kind, style.centred(numbers), EFFECTS, fades=True)
    low, high = float(finite.min()), float(finite.max())
    if value in FROM_ZERO and low >= 0:
        return Look(value, kind, Normalize(0.0, high or 1.0), WEIGHTS, fades=True)
    return Look(value, kind, Normalize(low, high if high > low else low + 1.0), colormaps["viridis"])


def _kind_of(values: pd.Series, value: str) -> Kind:
    if value == "expert" or value.startswith("expert_"):
        return "experts"
    if value in SIGNED:
        return "effects"
    if value == "segment" or values.dtype == bool or not pd.api.types.is_numeric_dtype(values):
        return "classes"
    return "scale"
