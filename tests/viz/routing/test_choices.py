# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing import decisions, expert_load


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def picture(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def load_table(shares: dict[int, list[float]], **columns) -> pd.DataFrame:
    num_experts = len(next(iter(shares.values())))
    lines = [
        {"layer": layer, "expert": expert, "tokens": round(100 * share), "expert_load": share}
        for layer, row in shares.items()
        for expert, share in enumerate(row)
    ]
    return pd.DataFrame(lines).assign(uniform=1 / num_experts, **columns)


def test_each_cell_has_the_colour_of_its_expert(decision_table):
    ax = decisions(decision_table({1: [0, 3, 5], 3: [2, 2, 7]}, ["a", "b", "c"]))
    assert picture(ax)[0, 1] == pytest.approx(expert_color(3))
    assert picture(ax)[1, 2] == pytest.approx(expert_color(7))
    assert labels(ax.yaxis) == ["1", "3"]
    assert labels(ax.xaxis) == ["a", "b", "c"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("token", "layer")


def test_a_weak_gate_makes_the_colour_lighter(decision_table):
    strong, weak = (picture(decisions(decision_table({1: [4]}, ["a"], gate=gate))) for gate in (0.9, 0.1))
    assert (weak > strong).all()


def test_the_number_of_the_expert_stands_in_its_cell(decision_table, written):
    ax = decisions(decision_table({1: [0, 127], 3: [2, 64]}, ["a", "b"]))
    assert written(ax) == ["0", "127", "2", "64"]
    assert [text.get_position() for text in ax.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert legend(ax) == ["gate 1", "gate 0.5", "gate 0"]


def test_small_cells_get_a_legend_instead_of_numbers(decision_table, written):
    ax = decisions(decision_table({1: [0, 1] * 150}, [" a", "b"] * 150))
    assert written(ax) == []
    assert legend(ax)[:2] == ["0", "1"]


def test_a_legend_of_many_experts_names_the_most_chosen(decision_table):
    experts = [*range(100), *[77] * 100, *[101] * 100]
    ax = decisions(decision_table({1: experts}, list("ab") * 150))
    assert "77" in legend(ax)
    assert "101" in legend(ax)
    assert "+ 85 more" in legend(ax)


def test_slots_lie_above_each_other_the_first_on_top(decision_table, written):
    ax = decisions(decision_table({1: [(0, 5)], 3: [(2, 6)]}, ["a"]))
    assert picture(ax)[:, 0] == pytest.approx(np.stack([expert_color(expert) for expert in (5, 0, 6, 2)]))
    assert ax.get_yticks().tolist() == [0.5, 2.5]


def test_a_choice_that_is_not_in_the_table_is_grey(decision_table, written):
    table = decision_table({1: [0, 1], 3: [2, 3]}, ["a", "b"])
    ax = decisions(table.drop(index=1))
    assert np.ptp(picture(ax)[0, 1]) == 0
    assert written(ax) == ["0", "2", "3"]


def test_a_row_that_is_not_there_is_refused(decision_table):
    with pytest.raises(ValueError, match="row 0"):
        decisions(decision_table({1: [0]}, ["a"]), row=2)


def test_given_axes_are_drawn_into_and_given_back(decision_table):
    _, axes = plt.subplots(1, 2)
    assert decisions(decision_table({1: [0]}, ["a"]), ax=axes[1]) is axes[1]
    assert not axes[0].images
    assert len(plt.get_fignums()) == 1


def test_load_map_has_a_cell_for_each_layer_and_expert(written):
    ax = expert_load(load_table({1: [0.5, 0.5, 0], 3: [0.2, 0.2, 0.6]}))
    assert picture(ax).tolist() == [[0.5, 0.5, 0], [0.2, 0.2, 0.6]]
    assert labels(ax.yaxis) == ["1", "3"]
    assert labels(ax.xaxis) == ["0", "1", "2"]
    assert ax.images[0].get_clim() == (0, 0.6)


def test_load_map_marks_idle_experts_where_there_is_room():
    ax = expert_load(load_table({1: [0.5, 0.5, 0]}))
    assert ax.collections[0].get_offsets().tolist() == [[2, 0]]
    many = load_table({layer: [0, *[1 / 127] * 127] for layer in range(48)})
    assert not expert_load(many, ax=plt.subplots(figsize=(4, 3))[1]).collections


def test_the_scale_of_the_map_has_a_line_at_the_uniform_share():
    ax = expert_load(load_table({1: [0.5, 0.25, 0.25, 0]}))
    bar = ax.images[0].colorbar
    assert bar is not None
    assert bar.ax.lines[-1].get_ydata() == pytest.approx([0.25, 0.25])
    assert "uniform" in bar.ax.get_ylabel()


def test_bars_of_a_layer_have_the_load_and_the_colour_of_their_expert():
    ax = expert_load(load_table({1: [0, 0, 1], 3: [0.2, 0.3, 0.5]}), layer=3)
    assert [bar.get_height() for bar in ax.patches] == [0.2, 0.3, 0.5]
    assert ax.patches[1].get_facecolor()[:3] == pytest.approx(expert_color(1))
    assert ax.lines[0].get_ydata() == pytest.approx([1 / 3, 1 / 3])
    assert legend(ax) == ["uniform"]


def test_bars_of_groups_stand_side_by_side():
    table = pd.concat([load_table({1: [0.2, 0.8]}, modality="text"), load_table({1: [0.9, 0.1]}, modality="image")])
    ax = expert_load(table, layer=1)
    assert legend(ax) == ["image", "text", "uniform"]
    assert [bar.get_height() for bar in ax.patches] == [0.9, 0.1, 0.2, 0.8]
    with pytest.raises(ValueError, match='table\\["modality"\\]'):
        expert_load(table)
    one = table[table["modality"] == "text"]
    assert picture(expert_load(one)).tolist() == [[0.2, 0.8]]


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="layer 1, 3"):
        expert_load(load_table({1: [1], 3: [1]}), layer=2)


def test_experts_are_numbered_as_far_as_there_is_room():
    ax = expert_load(load_table({1: [1 / 128] * 128}))
    assert labels(ax.xaxis)[:3] == ["0", "4", "8"]
