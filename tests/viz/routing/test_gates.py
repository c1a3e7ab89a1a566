# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.gates import gate_curve


@pytest.fixture
def table():
    def make(position: int = 0, expert: int = 3) -> pd.DataFrame:
        gates = np.array([0, 0.25, 0.5, 1, 1.5])
        lines = pd.DataFrame({"gate": gates, "own": gates == 0.5, "gain": (2 * gates) ** 2, "value": 3 - gates})
        lines = lines.assign(row=0, layer=3, position=position, token=" a", slot=0, expert=expert, cosine=1.0)
        lines.attrs = {"metric": "loss"}
        return lines

    return make


def test_gain_stands_above_the_metric_on_the_same_gates(table):
    ax = gate_curve(table())
    upper, lower = (each for each in ax.figure.axes if each is not ax)
    assert upper.lines[0].get_ydata().tolist() == [0, 0.25, 1, 4, 9]
    assert lower.lines[0].get_ydata().tolist() == [3, 2.75, 2.5, 2, 1.5]
    assert upper.lines[0].get_color() == pytest.approx(expert_color(3))
    assert upper.get_xlim() == lower.get_xlim()
    assert (lower.get_xlabel(), lower.get_ylabel()) == ("gate (factor on the expert's input)", "loss")


def test_the_own_gate_is_a_dot(table):
    ax = gate_curve(table())
    upper, lower = (each for each in ax.figure.axes if each is not ax)
    assert upper.collections[0].get_offsets().tolist() == [[0.5, 1]]
    assert lower.collections[0].get_offsets().tolist() == [[0.5, 2.5]]


def test_references_run_through_the_own_gate(table):
    ax = gate_curve(table())
    upper = next(each for each in ax.figure.axes if each is not ax)
    names = {line.get_label(): line for line in upper.lines}
    for name, power in (("proportional", 1), ("quadratic", 2)):
        x, y = names[name].get_data()
        assert y == pytest.approx((x / 0.5) ** power)


def test_several_places_have_the_colours_of_their_experts_and_names(table, read):
    ax = gate_curve(pd.concat([table(0, 3), table(1, 5), table(2, 3)]), column="cosine")
    upper, lower = (each for each in ax.figure.axes if each is not ax)
    assert [tuple(line.get_color()) for line in upper.lines] == [tuple(expert_color(each)) for each in (3, 5, 3)]
    assert upper.lines[0].get_linestyle() != upper.lines[2].get_linestyle()
    assert read.legend(upper)[1] == "·a [1], layer 3, expert 5"
    assert lower.get_ylabel().startswith("cosine")


def test_too_many_curves_are_refused(table):
    with pytest.raises(ValueError, match="11 curves"):
        gate_curve(pd.concat([table(position) for position in range(11)]))
