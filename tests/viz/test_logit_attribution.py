# matplotlib and pandas declare what they give as wide unions.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from llama4lab.viz import style
from llama4lab.viz.logit_attribution import COLORS, contributions, largest, measure


@pytest.fixture
def table() -> pd.DataFrame:
    """Layer 0 is dense; layer 1 sends the token to the experts 3 and 7."""
    parts = [
        ("embed", None, None, None, 0.25),
        ("head", 0, 0, None, 1.0),
        ("head", 0, 1, None, -2.0),
        ("mlp", 0, None, None, 0.5),
        ("head", 1, 0, None, 0.0),
        ("head", 1, 1, None, 3.0),
        ("expert", 1, None, 3, 4.0),
        ("expert", 1, None, 7, -1.0),
        ("shared_expert", 1, None, None, 0.125),
    ]
    lines = pd.DataFrame(parts, columns=["part", "layer", "head", "expert", "contribution"])
    lines = lines.astype({"layer": "Int64", "head": "Int64", "expert": "Int64"}).assign(row=0, position=4)
    lines.attrs = {"measure": "logit difference", "of": " Paris", "minus": " Rome"}
    return lines


def test_parts_are_cells_with_layers_upwards_and_heads_before_the_rest(table, written):
    ax = contributions(table)
    cells = np.ma.asarray(ax.collections[0].get_array()).filled(np.nan).reshape(2, 5)
    expected = [[1, -2, np.nan, np.nan, 0.5], [0, 3, 3, 0.125, np.nan]]
    assert np.array_equal(cells, expected, equal_nan=True)
    assert ax.collections[0].get_clim() == (-3, 3)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "expert", "shared expert", "MLP"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]
    assert not ax.yaxis_inverted()
    assert set(written(ax)) == {"head", "3 7"}
    assert ax.get_title() == "logit difference ·Paris − ·Rome: 5.88\n(embedding 0.25)"


def test_many_heads_leave_room_for_the_numbers_of_experts(table, written):
    many = [table.assign(head=table["head"] + shift) for shift in range(2, 40, 2)]
    wide = pd.concat([table, *(each[each["part"] == "head"] for each in many)], ignore_index=True)
    ax = contributions(wide)
    edges = ax.collections[0].get_coordinates()[0, :, 0]
    assert set(np.diff(edges[:41])) == {1}
    assert set(np.diff(edges[40:])) == {2}
    assert "3 7" in written(ax)


def test_parts_that_the_model_does_not_have_have_no_column(table):
    dense = table[table["part"].isin(["embed", "head", "mlp"])]
    dense.attrs = {}
    ax = contributions(dense)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "MLP"]
    assert ax.get_title().startswith("logit: 2.75")


def test_the_largest_parts_are_bars_and_the_others_one(table):
    ax = largest(table, k=4)
    bars = ax.patches
    assert [bar.get_width() for bar in bars] == [4, 3, -2, 1, 0.25 + 0.5 + 0 - 1 + 0.125]
    names = ["layer 1, expert 3", "layer 1, head 1", "layer 0, head 1", "layer 0, head 0", "5 others"]
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert bars[0].get_facecolor() == to_rgba(COLORS["expert"])
    assert bars[1].get_facecolor() == to_rgba(style.BLUE)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["head", "expert"]
    assert ax.get_xlabel() == "contribution to logit difference ·Paris − ·Rome"
    assert ax.yaxis_inverted()
    assert sum(bar.get_width() for bar in bars) == pytest.approx(table["contribution"].sum())


def test_all_parts_can_be_drawn(table):
    ax = largest(table, k=99)
    assert len(ax.patches) == len(table)
    assert "embedding" in [label.get_text() for label in ax.get_yticklabels()]


@pytest.mark.parametrize(
    ("attrs", "text"),
    [
        ({"measure": "logit", "of": " a$", "minus": None}, r"logit of ·a\$"),
        ({"measure": "logit difference", "of": " a", "minus": "\n"}, "logit difference ·a − ↵"),
        ({"measure": "logit difference", "of": None, "minus": " b"}, "logit difference"),
        ({"measure": "logit difference", "of": " a", "minus": None}, "logit difference"),
        ({"measure": "direction", "of": None, "minus": None}, "direction"),
        ({}, "logit"),
    ],
)
def test_plots_say_what_was_split(table, attrs, text):
    table.attrs = attrs
    assert measure(table) == text


def test_one_row_and_position_is_drawn_at_a_time(table):
    for draw in (contributions, largest):
        with pytest.raises(ValueError, match="One position can be drawn at a time"):
            draw(pd.concat([table, table.assign(position=5)]))
    with pytest.raises(ValueError, match="k=0"):
        largest(table, k=0)
