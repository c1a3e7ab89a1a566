"""The horizon diagram shows what the table says."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from llama4lab.viz import style
from llama4lab.viz.attention.horizons import NOTHING, SHADES, horizon

COLUMNS = ["layer", "kind", "chunk_size", "start", "stop", "reached", "hops", "since"]


@pytest.fixture
def table() -> pd.DataFrame:
    """Two layers over 20 positions; chunks of 8 in the first."""
    none = pd.NA
    lines = [
        (0, "rope", 8, 0, 2, False, none, none),
        (0, "rope", 8, 2, 3, True, 0, none),
        (0, "rope", 8, 3, 8, True, 1, 0),
        (0, "rope", 8, 8, 20, False, none, none),
        (1, "nope", none, 0, 2, False, none, none),
        (1, "nope", none, 2, 3, True, 0, none),
        (1, "nope", none, 3, 8, True, 1, 0),
        (1, "nope", none, 8, 20, True, 5, 1),
    ]
    kinds = dict.fromkeys(["chunk_size", "hops", "since"], "Int64")
    return pd.DataFrame(lines, columns=COLUMNS).astype(kinds)


def test_every_stretch_is_a_bar_in_the_colour_of_its_steps(table):
    ax: Any = horizon(table)
    bars = [bar for group in ax.containers for bar in group.patches]
    assert len(bars) == len(table)
    for bar, line in zip(bars, table.itertuples(), strict=True):
        assert bar.get_x() == line.start - 0.5
        assert bar.get_width() == line.stop - line.start
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(line.layer)
        color = NOTHING if line.hops is pd.NA else SHADES[min(line.hops, 3)]
        assert bar.get_facecolor() == to_rgba(color)


def test_borders_stand_in_chunked_layers_only_and_nope_layers_are_marked(table):
    ax: Any = horizon(table)
    (lines,) = ax.collections
    places = np.array([segment[0, 0] for segment in lines.get_segments()])
    assert places.tolist() == [7.5, 15.5]
    assert to_rgba(style.LINE) == tuple(lines.get_colors()[0])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "NoPE  1"]
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["not reached", "the token", "reached in 1 step", "in 3 steps or more"]


def test_borders_of_very_many_chunks_are_left_out(table):
    long = table.assign(start=table["start"] * 1000, stop=table["stop"] * 1000)
    assert not horizon(long).collections


def test_an_empty_table_is_refused(table):
    with pytest.raises(ValueError, match="no lines"):
        horizon(table[:0])
