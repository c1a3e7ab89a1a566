# matplotlib and pandas declare what they give as wide unions.
# pyright: reportOptionalMemberAccess=false

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

from llama4lab.viz.route_content import effects


@pytest.fixture
def table():
    table = pd.DataFrame({"layer": [1, 3], "none": -2.0, "source": 6.0, "pairs": 4})
    table = table.assign(route_effect=[1.0, 0.0], content_effect=[2.0, 4.0], interaction=[-1.0, 0.5])
    table["total_effect"] = table[["route_effect", "content_effect", "interaction"]].sum(axis=1)
    return table.assign(route_effect_std=0.25, content_effect_std=0.5, interaction_std=0.0)


def heights(ax) -> list[list[float]]:
    return [[bar.get_height() for bar in bars] for bars in bars_of(ax)]


def bars_of(ax) -> list:
    return [container for container in ax.containers if hasattr(container, "patches")]


def test_each_layer_has_a_bar_for_each_part_and_a_line_for_the_total(table):
    ax = effects(table)
    assert heights(ax) == [[1, 0], [2, 4], [-1, 0.5]]
    left = [[bar.get_x() for bar in bars] for bars in bars_of(ax)]
    assert left == sorted(left)
    totals = next(line for line in ax.collections if line.get_label() == "total")
    assert isinstance(totals, LineCollection)
    assert [segment[0][1] for segment in totals.get_segments()] == [2, 4.5]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "3"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["total", "route", "content", "interaction"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "effect on the metric")
    table.attrs["metric"] = "logit difference"
    assert effects(table).get_ylabel() == "effect on the logit difference"


def test_shares_are_of_the_way_to_the_source_run(table):
    ax = effects(table, share=True)
    assert heights(ax) == [[1 / 8, 0], [2 / 8, 4 / 8], [-1 / 8, 0.5 / 8]]
    assert "share of the way" in ax.get_ylabel()


def test_spreads_are_drawn_where_there_are_several_pairs(table):
    spread = bars_of(effects(table))[1].errorbar.lines[2][0].get_segments()[0]
    assert [point[1] for point in spread] == [1.5, 2.5]
    assert bars_of(effects(table, spread="none"))[1].errorbar is None
    assert bars_of(effects(table.assign(pairs=1)))[1].errorbar is None


def test_all_layers_together_are_one_group(table):
    ax = effects(table.head(1).assign(layer="all"))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["all"]


def test_several_positions_or_rows_at_once_are_refused(table):
    for column in ("position", "row"):
        with pytest.raises(ValueError, match=f"One {column} can be drawn at a time"):
            effects(table.assign(**{column: [0, 1]}))
    assert np.isclose(heights(effects(table.assign(position=5)))[0][0], 1)


def test_a_share_of_no_difference_is_refused(table):
    with pytest.raises(ValueError, match="no difference"):
        effects(table.assign(source=-2.0), share=True)
