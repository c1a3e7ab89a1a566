# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import inspect

import pandas as pd
import pytest

from llama4lab.viz import routing

PLOTS = {name: plot for name, plot in inspect.getmembers(routing, inspect.isfunction) if name not in ("expert_card",)}
COLUMNS = {
    *("row", "layer", "position", "slot", "token", "modality", "expert", "other", "gate", "own", "gain", "value"),
    *("effect", "chosen", "best", "regret", "tokens", "expert_load", "uniform", "share", "lift", "group", "chance"),
    *("gini", "entropy", "from_layer", "to_layer", "from_expert", "to_expert", "mutual_information", "normalised"),
    *("path", "cosine", "npmi", "reap", "zero", "frequency", "agreement", "margin", "routed_norm", "kind"),
    *("contribution", "nearest", "relative", "first", "last", "risk_difference"),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_table_without_lines_is_refused_with_the_reason(name):
    layer = {"layer": 1} if inspect.signature(PLOTS[name]).parameters.get("layer") is not None else {}
    empty = pd.DataFrame({column: [] for column in COLUMNS})
    with pytest.raises(ValueError, match=r"no line|needs the column|the table has|One group"):
        PLOTS[name](empty, **layer)


@pytest.mark.parametrize("name", PLOTS)
def test_a_table_of_something_else_is_refused(name):
    layer = {"layer": 1} if inspect.signature(PLOTS[name]).parameters.get("layer") is not None else {}
    if name == "rank_correlation":
        pytest.skip("any square table is a matrix")
    with pytest.raises(ValueError, match="needs the column"):
        PLOTS[name](pd.DataFrame({"layer": [1], "row": [0]}), **layer)


@pytest.mark.parametrize("name", PLOTS)
def test_plots_take_axes_and_few_keywords(name):
    parameters = inspect.signature(PLOTS[name]).parameters
    assert parameters["ax"].default is None
    assert sum(each.default is not inspect.Parameter.empty for each in parameters.values()) <= 5
