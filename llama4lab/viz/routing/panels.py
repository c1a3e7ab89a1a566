"""Several panels in the place of one axes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure

from llama4lab.viz import style

GAP = 0.12  # between panels, as a share of the axes, where no layout is at work


def panels_in(
    ax: Axes,
    rows: int,
    columns: int = 1,
    *,
    widths: Sequence[float] | None = None,
    heights: Sequence[float] | None = None,
) -> np.ndarray:
    """Puts panels in the place of an axes, which stays as their invisible frame.

    Args:
        ax: The axes that give their place.
        rows: How many rows of panels.
        columns: How many columns.
        widths: Relative widths of the columns.
        heights: Relative heights of the rows.

    Returns:
        The panels, of shape [row, column].
    """
    ax.set_axis_off()
    figure, spec = ax.figure, ax.get_subplotspec()
    assert isinstance(figure, Figure)
    if spec is not None:
        grid = spec.subgridspec(rows, columns, width_ratios=widths, height_ratios=heights)
        made = [figure.add_subplot(grid[row, column]) for row in range(rows) for column in range(columns)]
    else:
        left, wide = _spans(widths or [1.0] * columns)
        top, high = _spans(heights or [1.0] * rows)
        made = [
            ax.inset_axes((left[column], 1 - top[row] - high[row], wide[column], high[row]))
            for row in range(rows)
            for column in range(columns)
        ]
    return np.array(made, dtype=object).reshape(rows, columns)


def title_above(shown: np.ndarray, text: str) -> None:
    """Writes a title above the titles of the panels, at the left; a title of their frame would lie on those."""
    shown[0, 0].annotate(text, (0, 1), (0, 22), "axes fraction", "offset points", fontsize="large", va="bottom")


def shared_scale(ax: Axes, shown: np.ndarray, mappable: ScalarMappable, label: str) -> Colorbar:
    """Puts one slim scale to the right of all panels, which make room for it."""
    if ax.get_subplotspec() is None:
        return style.color_bar(ax, mappable, label)
    figure = ax.figure
    assert isinstance(figure, Figure)
    bar = figure.colorbar(mappable, ax=list(shown.flat), label=label, pad=0.015, fraction=0.05, aspect=30)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - a spine, typed as a collection of them
    return bar


def _spans(sizes: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Start and size of each part along one side of the axes, as shares of it."""
    shares = np.array(sizes, dtype=float) / sum(sizes) * (1 - GAP * (len(sizes) - 1))
    return np.cumsum([0.0, *(shares[:-1] + GAP)]), shares
