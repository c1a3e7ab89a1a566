# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import pandas as pd
import pytest

from llama4lab.viz.routing.loads import balance


@pytest.fixture
def table() -> pd.DataFrame:
    columns = {"layer": [1, 3, 5], "tokens": 9, "gini": [0.1, 0.2, 0.3], "entropy": [1, 0.9, 0.8]}
    return pd.DataFrame({**columns, "max_violation": [2.0, 4.0, 3.0], "dead": [0, 1, 2]})


def test_each_measure_is_a_line_over_the_layers(table, read):
    ax = balance(table)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.1, 0.2, 0.3], [1, 0.9, 0.8]]
    assert ax.lines[0].get_xdata().tolist() == [1, 3, 5]
    assert read.legend(ax) == ["Gini coefficient (0: even)", "entropy (1: even)"]
    assert read.labels(ax.xaxis) == ["1", "3", "5"]


def test_one_measure_names_the_axis_and_starts_at_zero(table, read):
    ax = balance(table, "max_violation")
    assert ax.get_ylabel() == "largest load / mean − 1"
    assert ax.get_ylim()[0] == 0
    assert read.legend(ax) == []


def test_groups_are_lines_of_one_measure(table, read):
    both = pd.concat([table.assign(modality="text"), table.assign(modality="image", gini=0.5)])
    ax = balance(both, "gini")
    assert read.legend(ax) == ["text", "image"]
    assert ax.get_legend().get_title().get_text() == "modality"
    assert ax.lines[1].get_ydata().tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="2 measures of 2 groups"):
        balance(both)


def test_a_measure_that_is_not_there_is_refused(table):
    with pytest.raises(ValueError, match="needs the column 'utilization'"):
        balance(table, "utilization")
