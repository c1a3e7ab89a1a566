# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.attention import angles, score_bands, score_split

SHARES = [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0]


@pytest.fixture
def angle_table():
    """Layer 2 of two heads and NoPE layer 3 of two heads; the cosine is the quantile minus the head."""
    lines = [
        {"layer": layer, "kind": kind, "head": head, "pairs": 9, "quantile": share, "cosine": share - head}
        for layer, kind in ((2, "rope"), (3, "nope"))
        for head in (0, 1)
        for share in SHARES
    ]
    table = pd.DataFrame(lines)
    return table.assign(angle=np.degrees(np.arccos(table["cosine"])), score=4 * table["cosine"])


@pytest.fixture
def score_table():
    """Query 7 and the keys 5, 6, 7, in two bands."""
    table = pd.DataFrame({"row": 0, "layer": 1, "kind": "rope", "head": 2, "query": 7, "key": [5, 5, 6, 6, 7, 7]})
    table["query_token"], table["key_token"] = "c", [*"aabbcc"]
    table["band"], table["wavelength"] = [0, 1] * 3, [6.28, 19869.0] * 3
    table["contribution"] = [1.0, -2, 0, 0.5, 3, 1]
    return table.assign(content=1.0, positional=table["contribution"] - 1)


def test_angles_are_spans_of_each_head_in_its_layer(angle_table):
    ax = angles(angle_table)
    spans = [[segment[:, 1].tolist() for segment in lines.get_segments()] for lines in ax.collections]
    assert spans[0] == [[0, 1], [-1, 0]] * 2
    assert np.allclose(spans[2], [[0.25, 0.75], [-0.75, -0.25]] * 2)
    place, median = ax.lines[0].get_data()
    assert median.tolist() == [0.5, -0.5, 0.5, -0.5]
    assert np.round(place).tolist() == [0, 0, 1, 1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "3\nNoPE"]
    assert "degrees" in angles(angle_table, column="angle").get_ylabel()


def test_angles_without_the_quantiles_that_are_drawn_are_refused(angle_table):
    with pytest.raises(ValueError, match=r"no quantile 0\.5"):
        angles(angle_table[angle_table["quantile"] != 0.5])
    with pytest.raises(ValueError, match="columns are cosine, angle, score"):
        angles(angle_table, column="weight")


def test_a_score_is_a_bar_of_content_a_bar_of_position_and_a_dot(score_table):
    table = score_table[score_table["band"] == 0].rename(columns={"contribution": "score"})
    ax = score_split(table)
    content, position = ax.containers
    assert [bar.get_height() for bar in content] == [1, 1, 1]
    assert [bar.get_height() for bar in position] == [0, -1, 2]
    assert ax.lines[0].get_ydata().tolist() == [1, 0, 3]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert ax.get_title() == "layer 1 (RoPE), head 2, query 7 c"


def test_bands_are_drawn_the_fastest_at_the_bottom_around_zero(score_table):
    ax = score_bands(score_table)
    assert np.asarray(ax.images[0].get_array()).tolist() == [[1, 0, 3], [-2, 0.5, 1]]
    assert ax.images[0].get_clim() == (-3, 3)
    assert not ax.yaxis_inverted()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["6.3", "19.9k"]
    moved = score_bands(score_table, column="positional")
    assert np.asarray(moved.images[0].get_array()).tolist() == [[0, -1, 2], [-3, -0.5, 0]]


def test_bands_that_do_not_turn_have_no_end_of_a_wave(score_table):
    ax = score_bands(score_table.assign(kind="nope", wavelength=np.inf))
    assert {label.get_text() for label in ax.get_yticklabels()} == {"∞"}


def test_several_queries_at_once_and_unknown_columns_are_refused(score_table):
    for draw in (score_split, score_bands):
        with pytest.raises(ValueError, match="One query can be drawn"):
            draw(pd.concat([score_table, score_table.assign(query=8)]))
    with pytest.raises(ValueError, match="columns are contribution"):
        score_bands(score_table, column="key")
