# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import pandas as pd
import pytest

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.writes import contributions, expert_attribution


def test_norms_are_medians_over_tokens_by_layer(read):
    table = pd.DataFrame({"row": 0, "layer": [1, 1, 3, 3], "position": [0, 1, 0, 1], "token": "a"})
    table = table.assign(routed_norm=[1, 3, 2, 2], shared_norm=4.0, attention_norm=float("nan"))
    ax = contributions(table)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[2, 2], [4, 4]]
    assert read.legend(ax) == ["routed experts", "shared expert"]
    assert ax.get_ylim()[0] == 0


@pytest.fixture
def table() -> pd.DataFrame:
    lines = [(1, "routed", 3, 0.5), (1, "shared", None, -1.0), (3, "routed", 7, -0.25), (3, "shared", None, 2.0)]
    found = pd.DataFrame(lines, columns=["layer", "kind", "expert", "contribution"]).astype({"expert": "Int64"})
    found.attrs = {"measure": "logit", "of": " Paris"}
    return found.assign(row=0, position=4, token=" is")


def test_routed_and_shared_bars_stand_side_by_side(table, written):
    ax = expert_attribution(table)
    assert [bar.get_height() for bar in ax.patches] == [0.5, -0.25, -1, 2]
    assert ax.patches[1].get_facecolor()[:3] == pytest.approx(expert_color(7))
    assert ax.patches[0].get_x() + ax.patches[0].get_width() == pytest.approx(ax.patches[2].get_x())
    assert written(ax) == ["3", "7"]
    assert ax.get_ylabel() == "contribution to logit of ·Paris"
    assert ax.get_title() == "·is at position 4"


def test_slots_have_bars_of_their_own(table):
    both = pd.concat([table, table[table["kind"] == "routed"].assign(expert=9)])
    assert len({bar.get_x() for bar in expert_attribution(both).patches}) == 6


def test_one_position_is_drawn_at_a_time(table):
    with pytest.raises(ValueError, match="One position"):
        expert_attribution(pd.concat([table, table.assign(position=5)]))
