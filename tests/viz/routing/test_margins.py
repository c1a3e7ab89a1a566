# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.routing.margins import flip_distance


@pytest.fixture
def table() -> pd.DataFrame:
    layer, position = (axis.ravel() for axis in np.indices((2, 3)))
    found = pd.DataFrame({"row": 0, "layer": 2 * layer + 1, "position": position, "token": "a", "expert": 1})
    return found.assign(
        token=[" x", "\n", "$"] * 2, nearest=[0, 2, 3, 4, 5, 6], relative=[1, 2, 3, 0, 0, 6], margin=1.0
    )


def test_the_spread_has_the_median_of_each_layer(table, read):
    ax = flip_distance(table)
    assert ax.lines[0].get_ydata().tolist() == [2, 0]
    assert read.legend(ax) == ["median", "50% of the tokens", "90% of the tokens"]
    assert ax.get_ylim()[0] == 0


def test_the_map_names_the_nearest_other_expert(table, read, written):
    ax = flip_distance(table, row=0)
    assert read.picture(ax).tolist() == [[1, 2, 3], [0, 0, 6]]
    assert written(ax) == ["0", "2", "3", "4", "5", "6"]
    assert read.labels(ax.xaxis) == ["·x", "↵", r"\$"]


def test_what_is_not_there_is_refused(table):
    with pytest.raises(ValueError, match="row 0"):
        flip_distance(table, row=1)
    with pytest.raises(ValueError, match="needs the column 'distance'"):
        flip_distance(table, column="distance")
    with pytest.raises(ValueError, match="choose one of"):
        flip_distance(table, column="cosine")
