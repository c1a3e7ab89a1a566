# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from llama4lab.viz.routing.domains import risk_difference, specialization

COUNTS = {1: {"code": [6, 2, 0], "facts": [2, 2, 4]}, 3: {"code": [0, 0, 8], "facts": [8, 0, 0]}}


def test_groups_are_rows_and_experts_columns(group_table, read, written):
    ax = specialization(group_table(COUNTS), 1)
    assert read.picture(ax).tolist() == [[0.75, 0.25, 0], [0.25, 0.25, 0.5]]
    assert read.labels(ax.yaxis) == ["code", "facts"]
    assert read.labels(ax.xaxis) == ["0", "1", "2"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("expert", "group", "layer 1")
    assert written(ax) == ["0.75", "0.25", "0.25", "0.25", "0.50"]


def test_an_expert_without_tokens_of_the_group_has_a_cross(group_table):
    ax = specialization(group_table(COUNTS), 1)
    assert ax.collections[0].get_offsets().tolist() == [[2, 0]]


def test_the_scale_of_shares_has_a_line_at_the_uniform_share(group_table):
    bar = specialization(group_table(COUNTS), 1).images[0].colorbar
    assert bar.ax.lines[-1].get_ydata() == pytest.approx([1 / 3, 1 / 3])


def test_lift_is_drawn_in_doublings_around_the_white_of_no_difference(group_table, read):
    ax = specialization(group_table(COUNTS), 1, column="lift")
    picture = read.picture(ax)
    assert picture[0, :2] == pytest.approx(np.log2([0.75 / 0.5, 1.0]))
    assert picture[0, 2] == -4  # a lift of zero is the end of the scale
    assert ax.images[0].get_clim() == (-4, 4)
    assert ax.images[0].colorbar.ax.get_yticklabels()[0].get_text() == "1/16"


def test_all_layers_are_one_panel_for_each_group_on_one_scale(group_table, read):
    ax = specialization(group_table(COUNTS, by="modality"))
    panels = read.panels(ax)
    assert {"code", "facts"} <= set(panels)
    assert read.picture(panels["code"]).tolist() == [[0.75, 0.25, 0], [0, 0, 1]]
    assert read.labels(panels["code"].yaxis) == ["1", "3"]
    assert panels["code"].images[0].get_clim() == panels["facts"].images[0].get_clim() == (0, 1)


def test_panels_stand_apart_from_the_scale(group_table, read):
    ax = specialization(group_table(COUNTS))
    ax.figure.draw_without_rendering()
    right = max(panel.get_position().x1 for title, panel in read.panels(ax).items() if title)
    scale = next(each for each in ax.figure.axes if each.get_label() == "<colorbar>")
    assert scale.get_position().x0 > right


def test_axes_without_a_grid_can_have_panels_too(group_table):
    ax = plt.figure().add_axes((0.1, 0.1, 0.8, 0.8))
    assert specialization(group_table(COUNTS), ax=ax) is ax
    assert len(ax.child_axes) == 2


def test_what_is_not_there_is_refused(group_table):
    table = group_table(COUNTS)
    with pytest.raises(ValueError, match="layer 1, 3"):
        specialization(table, 2)
    with pytest.raises(ValueError, match="share or lift"):
        specialization(table, column="tokens")
    with pytest.raises(ValueError, match="no column of groups"):
        specialization(table.drop(columns="group"))


def test_risk_differences_have_layers_upwards_and_zero_in_white(read):
    table = pd.DataFrame({"layer": [1, 1, 3, 3], "expert": [0, 1, 0, 1], "risk_difference": [0.5, -0.25, 0, 0.1]})
    ax = risk_difference(table)
    assert read.picture(ax).tolist() == [[0.5, -0.25], [0, 0.1]]
    assert ax.images[0].get_clim() == (-0.5, 0.5)
    assert not ax.yaxis_inverted()
