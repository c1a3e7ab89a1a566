"""Legends, always beside the axes, where they cover nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.patches import Patch

from llama4lab.viz.expert_colors import expert_color, faded

MOST_EXPERTS = 16


def legend_beside(ax: Axes, handles: Sequence[Any] | None = None, title: str | None = None) -> Legend:
    """Puts a legend to the right of the axes.

    Args:
        ax: The axes.
        handles: What to name; by default all that has a label.
        title: Title of the legend.
    """
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    return ax.legend(
        handles=handles,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
        handlelength=1.2,
        ncols=2 if len(handles) > 12 else 1,
    )


def expert_patches(experts: np.ndarray) -> list[Patch]:
    """Gives one patch for each expert that was chosen; of many, for those chosen most often."""
    counts = pd.Series(experts).value_counts()
    shown = sorted(counts.index[:MOST_EXPERTS])
    patches = [Patch(color=tuple(expert_color(expert)), label=str(expert)) for expert in shown]
    if len(counts) > len(shown):
        patches.append(Patch(color="none", label=f"+ {len(counts) - len(shown)} more"))
    return patches


def gate_patches() -> list[Patch]:
    """Gives patches that show how a colour fades with the gate."""
    return [Patch(color=tuple(faded(np.full(3, 0.25), gate)), label=f"gate {gate:g}") for gate in (1.0, 0.5, 0.0)]
