# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pytest
from matplotlib import pyplot as plt

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.strip import tokens


def boxes(ax) -> list[np.ndarray]:
    return [path.vertices for path in ax.collections[0].get_paths()]


def test_each_token_stands_in_a_box_of_the_colour_of_its_expert(decision_table, written):
    ax = tokens(decision_table({1: [0, 3], 3: [5, 90]}, ["When", " Mary"], gate=0.5), 3)
    assert written(ax) == ["When", "·Mary", "5", "90"]
    assert ax.collections[0].get_facecolor()[:, :3] == pytest.approx(
        np.stack([expert_color(5, 0.5), expert_color(90, 0.5)])
    )
    assert ax.get_title(loc="left") == "layer 3"


def test_texts_stand_in_their_boxes_and_boxes_do_not_overlap(decision_table):
    words = [" internationalisation", "a", " $x$", "\u4e2d", " of"] * 20
    ax = tokens(decision_table({1: list(range(100))}, words), 1)
    right = [corners[:, 0].max() for corners in boxes(ax)]
    left = [corners[:, 0].min() for corners in boxes(ax)]
    line = [corners[:, 1].min() for corners in boxes(ax)]
    for place in range(1, 100):
        assert line[place] > line[place - 1] or left[place] > right[place - 1]
    assert max(right) <= ax.get_xlim()[1]
    for text, corners in zip(ax.texts, boxes(ax), strict=False):
        assert corners[:, 0].min() < text.get_position()[0] < corners[:, 0].max()


def test_a_line_ends_where_the_text_has_a_line_end(decision_table):
    ax = tokens(decision_table({1: [0, 1, 2]}, ["a", "\n", "b"]), 1)
    top = [corners[:, 1].min() for corners in boxes(ax)]
    assert top[0] == top[1] < top[2]


def test_further_experts_of_a_token_are_stripes_below_the_first(decision_table, written):
    ax = tokens(decision_table({1: [(4, 7)]}, ["a"]), 1)
    first, second = boxes(ax)
    assert np.ptp(first[:, 1]) > np.ptp(second[:, 1])
    assert second[:, 1].min() == first[:, 1].max()
    assert written(ax) == ["a", "4 7"]


def test_one_slot_alone_can_be_drawn(decision_table, written):
    table = decision_table({1: [(4, 7), (5, 6)]}, ["a", "b"])
    assert written(tokens(table[table["slot"] == 1], 1)) == ["a", "b", "7", "6"]


def test_image_tokens_have_no_text(decision_table, written):
    table = decision_table({1: [0, 1]}, ["<|patch|>", "b"])
    table.loc[0, "modality"] = "image"
    assert written(tokens(table, 1)) == ["", "b", "0", "1"]


def test_small_axes_get_small_text_without_numbers_but_a_legend(decision_table, written, read):
    words = [" token", " word"] * 100
    ax = plt.subplots(figsize=(3, 2))[1]
    tokens(decision_table({1: [3, 90] * 100}, words), 1, ax=ax)
    assert len(written(ax)) == 200
    assert read.legend(ax)[:2] == ["3", "90"]


def test_a_layer_or_row_that_is_not_there_is_refused(decision_table):
    table = decision_table({1: [0]}, ["a"])
    with pytest.raises(ValueError, match="the table has layer 1"):
        tokens(table, 2)
    with pytest.raises(ValueError, match="the table has row 0"):
        tokens(table, 1, row=3)
