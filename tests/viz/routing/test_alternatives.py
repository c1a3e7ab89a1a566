# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.alternatives import counterfactual, regret


@pytest.fixture
def regrets() -> pd.DataFrame:
    layer, position = (axis.ravel() for axis in np.indices((2, 3)))
    table = pd.DataFrame({"row": 0, "layer": 2 * layer + 1, "position": position, "token": "a", "slot": 0})
    table = table.assign(expert=1, best=[1, 2, 3, 1, 1, 0], regret=[0, 0.5, 1, 0, 0, 0.25])
    table["token"] = [" x", "\n", "$"] * 2
    table.attrs = {"metric": "loss"}
    return table


def test_the_best_expert_for_the_metric_is_on_top(effect_table, read):
    ax = counterfactual(effect_table([0.5, -1, 0, 0.25], chosen=2))
    assert [bar.get_width() for bar in ax.patches] == [-1, 0, 0.25, 0.5]
    assert read.labels(ax.yaxis) == ["1", "2", "3", "0"]
    assert ax.yaxis_inverted()
    assert ax.patches[0].get_facecolor()[:3] == pytest.approx(expert_color(1))
    assert ax.get_xlabel() == "effect on loss (negative: better)"
    higher = counterfactual(effect_table([0.5, -1, 0, 0.25], chosen=2, lower_is_better=False))
    assert read.labels(higher.yaxis) == ["0", "3", "2", "1"]
    assert higher.get_xlabel() == "effect on loss (positive: better)"


def test_the_chosen_expert_is_marked_and_next_tokens_stand_beside(effect_table, written):
    ax = counterfactual(effect_table([0.5, -1, 0], chosen=2))
    assert ax.collections[0].get_offsets().tolist() == [[0, 1]]
    weights = {label.get_text(): label.get_fontweight() for label in ax.get_yticklabels()}
    assert weights == {"1": "normal", "2": "bold", "0": "normal"}
    assert "·t2  0.25  (chosen)" in written(ax)
    assert "·t1  0.25" in written(ax)
    assert ax.get_title() == r"·pa\$ta at position 5, layer 3"


@pytest.mark.parametrize("chosen", [0, 1, 4, 50, 95, 98, 99])
def test_of_many_experts_the_best_the_worst_and_the_chosen_are_drawn(effect_table, chosen, written):
    effects = np.linspace(-1, 1, 100)
    ax = counterfactual(effect_table((effects - effects[chosen]).tolist(), chosen), most=9)
    shown = [int(label.get_text()) for label in ax.get_yticklabels()]
    expected = {0, 1, 2, 3, 96, 97, 98, 99, chosen}
    assert expected <= set(shown) <= expected | {4}
    assert shown == sorted(shown)
    places = ax.get_yticks()
    assert places[len([each for each in shown if each < 96 or each == chosen < 96]) :][0] - places[3] >= 2
    assert f"… {100 - len(shown)} others between them" in written(ax)


def test_a_table_of_several_places_or_of_no_expert_is_refused(effect_table):
    table = effect_table([0, 1], chosen=0)
    with pytest.raises(ValueError, match="One position can be drawn"):
        counterfactual(pd.concat([table, table.assign(position=6)]))
    with pytest.raises(ValueError, match="at least 3"):
        counterfactual(table, most=2)


def test_regrets_are_cells_that_name_the_best_expert(regrets, read, written):
    ax = regret(regrets)
    assert read.picture(ax).tolist() == [[0, 0.5, 1], [0, 0, 0.25]]
    assert written(ax) == ["2", "3", "0"]
    assert read.labels(ax.xaxis) == ["·x", "↵", r"\$"]
    assert read.labels(ax.yaxis) == ["1", "3"]
    assert ax.images[0].get_clim() == (0, 1)
    assert ax.images[0].colorbar.ax.get_ylabel() == "regret: loss\n(number: best expert)"
    assert to_rgb(ax.images[0].cmap(0.0)) == (1, 1, 1)


def test_slots_lie_above_each_other_the_first_on_top(regrets, read):
    both = pd.concat([regrets, regrets.assign(slot=1, regret=0.125)])
    picture = read.picture(regret(both))
    assert picture[1].tolist() == [0, 0.5, 1]
    assert picture[0].tolist() == [0.125] * 3
