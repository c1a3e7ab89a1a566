# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import pandas as pd
import pytest

from llama4lab.viz.attention import temperature


def test_layers_of_one_curve_are_one_line_of_steps():
    parts = [pd.DataFrame({"layer": layer, "position": [0, 7, 15], "temperature": [1, 1.3, 1.5]}) for layer in (3, 7)]
    other = pd.DataFrame({"layer": 11, "position": [0, 7, 15], "temperature": 1.0})
    ax = temperature(pd.concat([*parts, other]))
    assert [line.get_label() for line in ax.lines] == ["layers 3, 7", "layer 11"]
    assert ax.lines[0].get_xdata().tolist() == [0, 7, 15]
    assert ax.lines[0].get_ydata().tolist() == [1, 1.3, 1.5]
    assert ax.lines[0].get_drawstyle() == "steps-post"
    assert len({line.get_color() for line in ax.lines}) == 2


def test_a_table_without_layers_is_refused():
    with pytest.raises(ValueError, match="no layer with a temperature"):
        temperature(pd.DataFrame(columns=["layer", "position", "temperature"]))
