# matplotlib and pandas declare what they give as wide unions.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from llama4lab.viz import style
from llama4lab.viz.logits import compare


@pytest.fixture
def table() -> pd.DataFrame:
    lines = {"row": 0, "position": 4, "token_id": [1, 2], "token": [" Paris", "\n"]}
    return pd.DataFrame(lines | {"prob_before": [0.75, 0.125], "prob_after": [0.25, 0.5], "difference": [-0.5, 0.375]})


def test_each_token_has_a_dot_before_and_one_after(table):
    ax = compare(table)
    before, after = ax.collections[1:]
    assert before.get_offsets().tolist() == [[0.75, 0], [0.125, 1]]
    assert after.get_offsets().tolist() == [[0.25, 0], [0.5, 1]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["·Paris", "↵"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["before", "after"]
    assert ax.get_xlabel() == "probability"


def test_the_first_token_is_on_top(table):
    ax = compare(table)
    assert ax.transData.transform((0, 0))[1] > ax.transData.transform((0, 1))[1]


def test_rise_and_fall_have_different_colours(table):
    lines = compare(table).collections[0]
    assert [tuple(color) for color in lines.get_colors()] == [to_rgba(style.ORANGE), to_rgba(style.BLUE)]


def test_a_row_that_is_not_there_is_refused(table):
    with pytest.raises(ValueError, match="row 0"):
        compare(table, row=1)
