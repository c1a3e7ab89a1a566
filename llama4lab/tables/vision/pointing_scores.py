"""How well a map over a picture points at a box: its peak, its mass, and what both would be by chance."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from llama4lab.tables.vision.places import BOX

Peak = Literal["high", "low"]


def pointing(
    table: pd.DataFrame,
    box: Sequence[float | int],
    *,
    value: str,
    peak: Peak = "high",
    by: Sequence[str] = (),
) -> pd.DataFrame:
    """Gives how well a map points at a part of the picture (the pointing game: Zhang et al., 2016, arXiv:1608.00507).

    Cells that show only filling are left out. Where a table has a global tile beside others, choose one kind first.

    Args:
        table: With one line for each cell, its box as left, top, right, bottom, and the column `value`.
        box: Left, top, right and bottom of what should be pointed at, in pixels of the original picture.
        value: The column that points.
        peak: "high" if large values point, "low" if very negative ones do, as the effects of hiding something.
        by: Columns that tell several maps apart, such as layer and head.

    Columns:
        (the columns of `by`): which map it is; one line without them.
        hit: whether the middle of the peak lies in the box; of several equal peaks, all.
        mass: share of the values above 0 (with "low": below 0) that lies in the box; cells that reach over its edge
            count with the share of their area that is in it. NaN if there is none.
        hit_by_chance: share of the cells whose middle lies in the box: hits of a cell drawn at random.
        mass_by_chance: mass of a map that is the same everywhere.
        left, top, right, bottom: the cell of the peak, the first one of several.
        {value}: the value of the peak.

    Raises:
        KeyError: if a column is missing.
        ValueError: if the box has no area, there are no cells, or values are NaN.
    """
    missing = [column for column in (*BOX, value, *by) if column not in table]
    if missing:
        raise KeyError(f"The table has no column {missing[0]!r}; it has {', '.join(map(str, table))}.")
    edges = np.array([float(edge) for edge in box])
    if edges.shape != (4,) or not (edges[0] < edges[2] and edges[1] < edges[3]):
        raise ValueError(f"A box is (left, top, right, bottom) with left < right and top < bottom, not {list(box)}.")
    if peak not in ("high", "low"):
        raise ValueError(f"peak is 'high' or 'low', not {peak!r}.")
    seen = table.loc[(table["right"] > table["left"]) & (table["bottom"] > table["top"]), :]
    unknown = int(seen[value].isna().sum())
    if unknown or not len(seen):
        raise ValueError(f"{value} is NaN in {unknown} of the {len(seen)} cells that show part of the picture.")
    groups = seen.groupby(list(by), sort=False) if by else [((), seen)]
    lines = []
    for key, own in groups:
        names = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        lines.append(names | _scores(own, edges, value, 1.0 if peak == "high" else -1.0))
    return pd.DataFrame(lines)


def _scores(own: pd.DataFrame, box: Float[np.ndarray, " 4"], value: str, sign: float) -> dict[str, object]:
    """What a map says of a box."""
    cells, values = own[list(BOX)].to_numpy(dtype=float), sign * own[value].to_numpy(dtype=float)
    middle, shared = _middle_inside(cells, box), _shared(cells, box)
    weights, highest = values.clip(min=0), values == values.max()
    first = int(values.argmax())
    return {
        "hit": bool(middle[highest].all()),
        "mass": float((weights * shared).sum() / weights.sum()) if weights.any() else float("nan"),
        "hit_by_chance": float(middle.mean()),
        "mass_by_chance": float(shared.mean()),
        **dict(zip(BOX, cells[first].tolist(), strict=True)),
        value: float(own[value].to_numpy(dtype=float)[first]),
    }


def _middle_inside(cells: Float[np.ndarray, "cell 4"], box: Float[np.ndarray, " 4"]) -> Bool[np.ndarray, " cell"]:
    """Whether the middle of each cell lies in a box."""
    middle = (cells[:, :2] + cells[:, 2:]) / 2
    return np.logical_and.reduce((middle >= box[:2]) & (middle <= box[2:]), axis=1)


def _shared(cells: Float[np.ndarray, "cell 4"], box: Float[np.ndarray, " 4"]) -> Float[np.ndarray, " cell"]:
    """The share of the area of each cell that lies in a box."""
    sides = np.minimum(cells[:, 2:], box[2:]) - np.maximum(cells[:, :2], box[:2])
    return sides.clip(min=0).prod(axis=1) / (cells[:, 2:] - cells[:, :2]).prod(axis=1)
