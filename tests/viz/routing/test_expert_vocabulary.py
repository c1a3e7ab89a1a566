# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import pandas as pd
import pytest

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.expert_vocabulary import vocabulary


@pytest.fixture
def table() -> pd.DataFrame:
    lines = [(3, " a$", 9, 0.5), (3, "\n", 2, 0.75), (3, " c", 1, 0.25), (5, " d", 1, 0.1)]
    found = pd.DataFrame(lines, columns=["expert", "token", "tokens", "npmi"])
    return found.assign(layer=1, token_id=range(4), share=1.0)


def test_each_expert_has_a_panel_with_its_first_tokens(table, read):
    ax = vocabulary(table, 1, k=2)
    panels = read.panels(ax)
    assert list(panels) == ["expert 3", "expert 5"]
    assert [bar.get_width() for bar in panels["expert 3"].patches] == [0.75, 0.5]
    assert read.labels(panels["expert 3"].yaxis) == ["↵", r"·a\$"]
    assert panels["expert 3"].patches[0].get_facecolor()[:3] == pytest.approx(expert_color(3))
    assert panels["expert 3"].get_xlim() == panels["expert 5"].get_xlim()
    assert panels["expert 5"].get_xlabel() == "nPMI of token and expert"


def test_experts_and_the_measure_can_be_chosen(table, read):
    panels = read.panels(vocabulary(table, 1, experts=3, column="tokens"))
    assert list(panels) == ["expert 3"]
    assert read.labels(panels["expert 3"].yaxis) == [r"·a\$", "↵", "·c"]


def test_what_is_not_there_is_refused(table):
    with pytest.raises(ValueError, match="expert 3, 5"):
        vocabulary(table, 1, experts=[4])
    with pytest.raises(ValueError, match="k=0"):
        vocabulary(table, 1, k=0)
