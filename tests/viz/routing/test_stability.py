# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import pandas as pd

from llama4lab.viz.routing.stability import drift, saturation


def test_agreement_stands_beside_the_chance(read):
    table = pd.DataFrame({"layer": [3, 1], "tokens": 8, "agreement": [0.5, 1.0], "chance": [0.2, 0.1]})
    ax = saturation(table)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 0.5], [0.1, 0.2]]
    assert read.legend(ax) == ["agreement", "chance"]
    assert read.labels(ax.xaxis) == ["1", "3"]


def test_each_layer_is_a_line_over_the_margins_with_larger_dots_for_more_tokens(read):
    table = pd.DataFrame({"layer": [1, 1, 3, 3], "margin": [0.1, 2, 3, 0.2], "tokens": [5, 10, 10, 10]})
    ax = drift(table.assign(agreement=[0.5, 1, 1, 0.75]))
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[0.1, 0.5], [2, 1]], [[0.2, 0.75], [3, 1]]]
    first, second = ax.collections[0].get_sizes()
    assert first < second
    assert read.legend(ax) == ["1", "3"]
    assert sum(ax.lines[0].get_color()) > sum(ax.lines[1].get_color())  # later layers are darker
