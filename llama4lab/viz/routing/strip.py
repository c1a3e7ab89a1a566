"""The text itself, each token in the colour of its expert."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import expert_patches, gate_patches, legend_beside
from llama4lab.viz.routing.checking import check
from llama4lab.viz.token_axis import token_label

WIDTH = 9.0  # inches of a new figure
LONGEST = 24  # characters of a token
SIZES = (9.5, 8.5, 7.5, 6.5, 5.5, 4.5)  # points of the text, the largest that fits
LEAST_NUMBERED = 6.5  # with smaller text there are no numbers


@dataclass(frozen=True)
class Layout:
    """Where the boxes of the tokens are, in points from the top left corner.

    Attributes:
        size: Size of the text.
        left: Left side of each box.
        line: Line of each box.
        width: Width of each box.
        slots: How many experts each token has.
    """

    size: float
    left: np.ndarray
    line: np.ndarray
    width: np.ndarray
    slots: int

    @property
    def numbered(self) -> bool:
        """Whether the number of the expert stands below each box."""
        return self.size >= LEAST_NUMBERED

    @property
    def bands(self) -> np.ndarray:
        """Borders of the bands of a box: one for the text, and a thin one for each further expert."""
        return self.size * np.array([0.0, *(1.6 + 0.45 * slot for slot in range(self.slots))])

    @property
    def box(self) -> float:
        """Height of a box."""
        return float(self.bands[-1])

    @property
    def pitch(self) -> float:
        """From the top of one line to that of the next."""
        return self.box + (1.35 if self.numbered else 0.35) * self.size

    @property
    def height(self) -> float:
        """Height of all lines."""
        return float(self.line.max() + 1) * self.pitch


def tokens(table: pd.DataFrame, layer: int, *, ax: Axes | None = None, row: int = 0) -> Axes:
    """Draws the text of a prompt as a strip of tokens, wrapped in lines, each in the colour of its expert in a layer.

    The weaker the gate, the lighter the box. Below it is the number of the expert; if a token has several, the others
    have stripes below the first. A box without text is an image token. Where the axes are too small for numbers, a
    legend names the colours.

    Args:
        table: As `tables.routing.decisions` gives it.
        layer: Layer whose router is drawn.
        ax: Where to draw; a new figure by default.
        row: Row of the prompt.

    Raises:
        ValueError: if the table has no such layer or row.
    """
    check(table, "row", "layer", "position", "slot", "token", "expert", "gate")
    own = style.only(style.only(table, "row", row), "layer", layer).sort_values(["position", "slot"])
    places = own.drop_duplicates("position")
    slots = np.unique(own["slot"])
    numbers = [" ".join(map(str, experts)) for _, experts in own.groupby("position")["expert"]]
    drawn = style.axes(ax, WIDTH, 3.0)
    layout = _fitted(drawn, own, numbers, _labels(places), new=ax is None)
    column = np.searchsorted(places["position"].to_numpy(), own["position"])
    colors = np.ones((len(places), len(slots), 3))
    colors[column, np.searchsorted(slots, own["slot"])] = expert_colors(
        own["expert"].to_numpy(), own["gate"].to_numpy(dtype=float)
    )
    _boxes(drawn, layout, colors)
    _texts(drawn, layout, _labels(places), numbers, colors[:, 0])
    drawn.set_title(f"layer {layer}", loc="left", fontsize="medium")
    return drawn


def _labels(places: pd.DataFrame) -> list[str]:
    """What is written in the box of each token; nothing for the patches of an image, which all have one text."""
    modality = places["modality"] if "modality" in places else ["text"] * len(places)
    return [
        "" if kind == "image" else token_label(token, LONGEST)
        for token, kind in zip(places["token"], modality, strict=True)
    ]


def _fitted(ax: Axes, own: pd.DataFrame, numbers: list[str], labels: list[str], new: bool) -> Layout:
    """Lays the tokens out in the axes, with a legend beside; a new figure gets the height that they need."""
    slots = len(np.unique(own["slot"]))
    breaks = own.drop_duplicates("position")["token"].str.endswith("\n").to_numpy()
    ax.set_axis_off()
    figure = ax.figure
    assert isinstance(figure, Figure)
    legend_beside(ax, gate_patches())
    for size in SIZES:
        figure.draw_without_rendering()  # the legend takes its room only now
        width, height = style.cell_size(ax, 1, 1)
        layout = Layout(size, *_wrapped(labels, numbers, breaks, size, width), slots)
        if new or layout.height <= height:
            break
    if new:
        figure.set_size_inches(WIDTH, max(layout.height / 72 + 0.35, 1.1))
        height = max(layout.height, 55.0)
    if not layout.numbered:
        legend_beside(ax, [*expert_patches(own["expert"].to_numpy()), *gate_patches()], title="expert")
        figure.draw_without_rendering()
        width = style.cell_size(ax, 1, 1)[0]
        layout = Layout(layout.size, *_wrapped(labels, numbers, breaks, layout.size, width), slots)
    ax.set(xlim=(0, width), ylim=(max(height, layout.height), 0))
    return layout


def _wrapped(
    labels: list[str], numbers: list[str], breaks: np.ndarray, size: float, width: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left side, line and width of each box. Lines are filled from the left, and end where the text has a line end."""
    font, small = FontProperties(size=size), FontProperties(size=_number_size(size))
    texts = [max(_width(label, font) + 0.6 * size, 0.9 * size) for label in labels]
    below = [_width(number, small) + 2.0 for number in numbers] if size >= LEAST_NUMBERED else [0.0] * len(texts)
    widths = np.minimum(np.maximum(texts, below), width)
    left, line = np.zeros(len(labels)), np.zeros(len(labels), dtype=int)
    x, y = 0.0, 0
    for place, own in enumerate(widths):
        if x > 0 and (x + own > width or breaks[place - 1]):
            x, y = 0.0, y + 1
        left[place], line[place] = x, y
        x += own + 1.2
    return left, line, widths


def _width(text: str, font: FontProperties) -> float:
    if not text:
        return 0.0
    return text_to_path.get_text_width_height_descent(text.replace(r"\$", "$"), font, ismath=False)[0]


def _number_size(size: float) -> float:
    return 0.66 * size


def _boxes(ax: Axes, layout: Layout, colors: np.ndarray) -> None:
    corners = []
    for left, line, width in zip(layout.left, layout.line, layout.width, strict=True):
        for top, bottom in pairwise(line * layout.pitch + layout.bands):
            corners.append([(left, top), (left + width, top), (left + width, bottom), (left, bottom)])
    ax.add_collection(PolyCollection(corners, facecolors=colors.reshape(-1, 3), linewidths=0))


def _texts(ax: Axes, layout: Layout, labels: list[str], numbers: list[str], colors: np.ndarray) -> None:
    middle, top = layout.left + layout.width / 2, layout.line * layout.pitch
    for x, y, label, color in zip(middle, top + layout.bands[1] / 2, labels, colors, strict=True):
        ax.text(x, y, label, ha="center", va="center_baseline", fontsize=layout.size, color=style.ink_on(color))
    for x, y, number in zip(middle, top + layout.box, numbers, strict=True) if layout.numbered else ():
        size = _number_size(layout.size)
        ax.text(x, y + 0.12 * layout.size, number, ha="center", va="top", fontsize=size, color="0.35")
