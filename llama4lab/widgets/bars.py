"""`Bars`: bars side by side to point at, drawn by the browser."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import anywidget
import numpy as np
import traitlets
from jaxtyping import Float
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.widgets.colored import LOOKS, script
from llama4lab.widgets.fallback import WithFallback

HEADROOM = 0.08  # of the range, for marks above the bars


class Details(TypedDict, total=False):
    """What bars may have besides their heights.

    Attributes:
        titles: What a bar is, and what its height is: ("expert", "logit").
        series: The name of each series, where a bar is several.
        marks: A sign above each bar, or "".
        mark_names: What the signs mean.
        notes: For each bar, further lines of its tooltip.
        line: A height to compare with, and what it is.
    """

    titles: tuple[str, str]
    series: Sequence[str]
    marks: Sequence[str]
    mark_names: Mapping[str, str]
    notes: Sequence[str]
    line: tuple[float, str]


class Bars(WithFallback, anywidget.AnyWidget):
    """Bars: hover for a tooltip, click or use the arrow keys to select one.

    Attributes:
        selected: Which bar is selected, from 0; None without. Set it to select from code.
        version: Counts the pictures.
    """

    _esm = script("bars")
    _css = LOOKS

    values = traitlets.Bytes().tag(sync=True)
    palette = traitlets.Bytes().tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    series = traitlets.List(traitlets.Unicode()).tag(sync=True)
    marks = traitlets.List(traitlets.Unicode()).tag(sync=True)
    mark_names = traitlets.Dict().tag(sync=True)
    notes = traitlets.List(traitlets.Unicode()).tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    titles = traitlets.List(traitlets.Unicode()).tag(sync=True)
    limits = traitlets.List(traitlets.Float()).tag(sync=True)
    line = traitlets.Float(None, allow_none=True).tag(sync=True)
    line_title = traitlets.Unicode().tag(sync=True)
    selected = traitlets.Int(None, allow_none=True).tag(sync=True)
    version = traitlets.Int(0).tag(sync=True)

    def __init__(self, *, twin: Callable[[], Axes] | None = None) -> None:
        """Makes a plot without any bars yet; `show` fills it.

        Args:
            twin: Gives the picture for saved notebooks; by default one of the bars.
        """
        super().__init__(limits=[0.0, 1.0], titles=["bar", "value"])
        self.twin = twin
        self.add_class("l4-bars")

    def show(
        self,
        values: Float[np.ndarray, "series bar"],
        names: Sequence[str],
        colors: Float[np.ndarray, "color 3"],
        title: str,
        **details: Unpack[Details],
    ) -> None:
        """Shows bars; the selected one stays selected if there are as many as before.

        Args:
            values: Heights; what is not finite is left out.
            names: The name of each bar.
            colors: Red, green and blue (0 to 1) of each bar; of each series, where there are several.
            title: What is shown.
            **details: Titles, series, marks, notes and a line; see `Details`.

        Raises:
            ValueError: if there is not one of each for every bar.
        """
        count, several = values.shape[1], len(values) > 1
        wanted = {"names": names, "marks": details.get("marks"), "notes": details.get("notes")}
        wrong = [name for name, given in wanted.items() if given is not None and len(given) != count]
        if wrong or len(colors) != (len(values) if several else count):
            raise ValueError(f"There are {count} bars; give one of {', '.join(wrong or ['colors'])} for each.")
        line, line_title = details.get("line", (None, ""))
        with self.hold_sync():
            self.selected = self.selected if count == len(self.names) else None
            self.values = values.astype("<f4").tobytes()
            self.palette = np.rint(np.asarray(colors) * 255).astype(np.uint8).tobytes()
            self.names, self.title = list(names), title
            self.series = list(details.get("series", [str(place) for place in range(len(values))]))
            self.marks, self.notes = list(details.get("marks", [""] * count)), list(details.get("notes", [""] * count))
            self.mark_names, self.titles = dict(details.get("mark_names", {})), list(details.get("titles", self.titles))
            self.line, self.line_title = line, line_title
            self.limits = _limits(values, line, marked=any(self.marks))
            self.version += 1

    @traitlets.validate("selected")
    def _exists(self, proposal: Any) -> int | None:
        wanted = proposal["value"]
        if wanted is not None and not 0 <= wanted < len(self.names):
            raise traitlets.TraitError(f"Bar {wanted} was selected; there are bars 0 to {len(self.names) - 1}.")
        return wanted

    @property
    def heights(self) -> Float[np.ndarray, "series bar"]:
        """The heights of the bars."""
        return np.frombuffer(self.values, "<f4").reshape(-1, len(self.names)).astype(float)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"{self.title}; {len(self.names)} bars"

    def draw(self) -> Axes:
        """The static twin; without one, the bars."""
        return self.twin() if self.twin is not None else self._plain()

    def _plain(self) -> Axes:
        heights, places = self.heights, np.arange(len(self.names))
        colors = np.frombuffer(self.palette, np.uint8).reshape(-1, 3) / 255
        ax = style.axes(None, 1.5 + 0.3 * len(self.names), 3.2)
        width = 0.84 / len(heights)
        for series, line in enumerate(np.where(np.isfinite(heights), heights, np.nan)):
            offset = (series - (len(heights) - 1) / 2) * width
            ax.bar(places + offset, line, width=width, color=colors[series] if len(heights) > 1 else colors)
        if self.line is not None:
            ax.axhline(self.line, color=style.INK, linestyle="--", linewidth=1.0)
        room = style.cell_size(ax, len(self.names), 1)[0] / 17
        style.number_ticks(ax.xaxis, places, np.array(self.names), room)
        ax.set(xlabel=self.titles[0], ylabel=self.titles[1], title=self.title)
        style.plain(ax)
        return ax


def _limits(values: Float[np.ndarray, "series bar"], line: float | None, *, marked: bool) -> list[float]:
    """The range of the heights, with zero in it."""
    known = values[np.isfinite(values)]
    ends = [0.0, *([] if line is None else [line]), *(known.tolist())]
    low, high = min(ends), max(ends)
    if low == high:
        return [0.0, 1.0]
    return [low, high + (HEADROOM * (high - low) if marked else 0.0)]
