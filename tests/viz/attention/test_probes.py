"""Needle curves show what the table says."""

import itertools
from typing import Any

import pandas as pd
import pytest

from llama4lab.viz.attention.probes import DASHES, needle


@pytest.fixture
def table() -> pd.DataFrame:
    """Two distances, three borders, two ablations; every accuracy is another."""
    lines = [
        (distance, border, 0, ablated, number / 20, number / 40, -float(number), 8)
        for number, (ablated, border, distance) in enumerate(
            itertools.product(["none", "3, 7"], [-1, 0, pd.NA], [100, 10])
        )
    ]
    columns = ["distance", "border", "crossed", "ablated", "accuracy", "guessed", "log_prob", "n"]
    return pd.DataFrame(lines, columns=columns).astype({"border": "Int64"})


@pytest.mark.parametrize("value", ["accuracy", "guessed", "log_prob"])
def test_each_curve_is_one_ablation_at_one_border(table, value):
    ax: Any = needle(table, value=value)
    curves = ax.get_lines()
    assert len(curves) == 6
    for number, curve in enumerate(curves):
        own = table.iloc[2 * number : 2 * number + 2].sort_values("distance")
        assert curve.get_xdata().tolist() == [10, 100]
        assert curve.get_ydata().tolist() == own[value].tolist()
        assert curve.get_linestyle() == DASHES[number % 3]
    assert len({curve.get_color() for curve in curves}) == 2
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    borders = ["fact 1 before a border", "fact 1 behind a border", "text from position 0"]
    assert words == ["all layers", "3, 7 barred", *borders]


def test_what_cannot_be_drawn_is_refused(table):
    with pytest.raises(ValueError, match="accuracy or guessed or log_prob"):
        needle(table, value="n")
    with pytest.raises(ValueError, match="0 lines"):
        needle(table[:0])
    many = pd.concat([table.assign(border=border) for border in range(5)])
    with pytest.raises(ValueError, match="5 borders"):
        needle(many)
