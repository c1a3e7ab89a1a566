"""`Curves`: lines over one axis to point at, drawn by the browser."""

from collections.abc import Callable, Sequence
from typing import Any

import anywidget
import numpy as np
import traitlets
from jaxtyping import Float
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.legend import legend_beside
from llama4lab.widgets.colored import LOOKS, script
from llama4lab.widgets.fallback import WithFallback


class Curves(WithFallback, anywidget.AnyWidget):
    """Lines: hover for a tooltip, click a line or its name, or use the arrow keys, to select one.

    Attributes:
        selected: Which line is selected, from 0; None without. Set it to select from code.
        version: Counts the pictures.
    """

    _esm = script("curves")
    _css = LOOKS

    values = traitlets.Bytes().tag(sync=True)
    palette = traitlets.Bytes().tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    dashes = traitlets.List(traitlets.Bool()).tag(sync=True)
    x = traitlets.List(traitlets.Float()).tag(sync=True)
    x_names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    notes = traitlets.List(traitlets.Unicode()).tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    titles = traitlets.List(traitlets.Unicode()).tag(sync=True)
    limits = traitlets.List(traitlets.Float()).tag(sync=True)
    selected = traitlets.Int(None, allow_none=True).tag(sync=True)
    version = traitlets.Int(0).tag(sync=True)

    def __init__(self, titles: tuple[str, str], *, twin: Callable[[], Axes] | None = None) -> None:
        """Makes axes without any line yet; `show` fills them.

        Args:
            titles: What the heights are, and what the axis below is.
            twin: Gives the picture for saved notebooks; by default one of the lines.
        """
        super().__init__(titles=list(titles), limits=[0.0, 1.0])
        self.twin = twin
        self.add_class("l4-curves")

    def show(
        self,
        values: Float[np.ndarray, "line point"],
        names: Sequence[str],
        colors: Float[np.ndarray, "line 3"],
        points: Sequence[tuple[float | int, str]],
        *,
        title: str,
        dashes: Sequence[bool] = (),
        notes: Sequence[str] = (),
        limits: tuple[float, float] | None = None,
    ) -> None:
        """Shows lines; the selected one stays selected if there are as many as before.

        Args:
            values: Heights; what is not finite is left out.
            names: The name of each line.
            colors: Red, green and blue (0 to 1) of each line.
            points: Place and name of each point on the axis below.
            title: What is shown.
            dashes: Whether each line is dashed.
            notes: For each line and point, line by line, further lines of its tooltip.
            limits: The range of the heights; by default from 0, or the lowest, to the highest.

        Raises:
            ValueError: if there is not one of each for every line and point.
        """
        lines, count = values.shape
        if not (len(names) == len(colors) == lines and len(points) == count) or len(notes) not in (0, values.size):
            raise ValueError(
                f"There are {lines} lines of {count} points; {len(names)} names, {len(colors)} colours, {len(points)} "
                f"points and {len(notes)} notes were given."
            )
        with self.hold_sync():
            self.selected = self.selected if lines == len(self.names) else None
            self.values = values.astype("<f4").tobytes()
            self.palette = np.rint(np.asarray(colors) * 255).astype(np.uint8).tobytes()
            self.names, self.title, self.dashes = list(names), title, list(dashes) or [False] * lines
            self.x, self.x_names = [float(place) for place, _ in points], [name for _, name in points]
            self.notes = list(notes) or [""] * values.size
            self.limits = list(limits or _limits(values))
            self.version += 1

    @traitlets.validate("selected")
    def _exists(self, proposal: Any) -> int | None:
        wanted = proposal["value"]
        if wanted is not None and not 0 <= wanted < len(self.names):
            raise traitlets.TraitError(f"Line {wanted} was selected; there are lines 0 to {len(self.names) - 1}.")
        return wanted

    @property
    def heights(self) -> Float[np.ndarray, "line point"]:
        """The heights of the lines."""
        return np.frombuffer(self.values, "<f4").reshape(len(self.names), -1).astype(float)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"{self.title}; {len(self.names)} lines"

    def draw(self) -> Axes:
        """The static twin; without one, the lines."""
        return self.twin() if self.twin is not None else self._plain()

    def _plain(self) -> Axes:
        ax = style.axes(None, 6.5, 3.2)
        colors = np.frombuffer(self.palette, np.uint8).reshape(-1, 3) / 255
        for name, line, color, dashed in zip(self.names, self.heights, colors, self.dashes, strict=True):
            ax.plot(self.x, line, "--o" if dashed else "-o", color=color, markersize=3, label=name)
        step = -(-len(self.x) // 12)
        ax.set_xticks(self.x[::step], self.x_names[::step])
        ax.set(ylabel=self.titles[0], xlabel=self.titles[1], title=self.title)
        style.plain(ax)
        legend_beside(ax)
        return ax


def _limits(values: Float[np.ndarray, "line point"]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, high = min(0.0, known.min(initial=0.0)), max(0.0, known.max(initial=0.0))
    return (float(low), float(high)) if low < high else (0.0, 1.0)
