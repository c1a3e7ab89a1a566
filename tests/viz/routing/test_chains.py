# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.chains import information, paths, repetition


def pairs(layers: list[tuple[int, int]]) -> pd.DataFrame:
    table = pd.DataFrame(layers, columns=["from_layer", "to_layer"])
    return table.assign(tokens=9, mutual_information=0.5, entropy=2.0, normalised=0.25, chance=0.1)


def test_information_of_a_chain_is_bars_out_of_the_entropy_with_the_chance(read):
    ax = information(pairs([(1, 3), (3, 5)]))
    assert [bar.get_height() for bar in ax.patches] == [2, 2, 0.5, 0.5]
    assert [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()] == [[0.1, 0.1]] * 2
    assert read.labels(ax.xaxis) == ["1→3", "3→5"]
    assert ax.get_ylabel() == "information (nats)"
    assert set(read.legend(ax)) == {"mutual information", "entropy of the later layer", "chance"}


def test_information_of_all_pairs_is_a_map(read, written):
    ax = information(pairs([(1, 3), (1, 5), (3, 5)]))
    assert read.picture(ax)[0].tolist() == [0.25, 0.25]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("earlier layer", "later layer")
    assert written(ax) == ["0.25"] * 3


def test_repetition_is_a_line_beside_the_chance(read):
    ax = repetition(pd.DataFrame({"layer": [3, 1], "tokens": 8, "share": [0.5, 0.25], "chance": 0.125}))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.25, 0.5], [0.125, 0.125]]
    assert read.legend(ax) == ["same expert", "chance"]


@pytest.fixture
def table() -> pd.DataFrame:
    found = pd.DataFrame({"path": ["3-1", "0-1", "3-90"], "tokens": [5, 3, 2], "share": [0.5, 0.3, 0.2]})
    found.attrs = {"layers": [1, 3]}
    return found


def test_paths_are_strings_in_the_colours_of_their_experts(table, read):
    ax = paths(table)
    strings, bars = (each for each in ax.figure.axes if each is not ax)
    assert read.picture(strings)[2] == pytest.approx(np.stack([expert_color(3), expert_color(90)]))
    assert [text.get_text() for text in strings.texts] == ["3", "1", "0", "1", "3", "90"]
    assert read.labels(strings.xaxis) == ["1", "3"]
    assert [bar.get_width() for bar in bars.patches] == [0.5, 0.3, 0.2]
    assert strings.get_ylim() == bars.get_ylim()
    assert strings.yaxis_inverted()


def test_only_the_commonest_paths_are_drawn(table):
    ax = paths(table, most=2)
    assert [bar.get_width() for bar in ax.figure.axes[2].patches] == [0.5, 0.3]
    with pytest.raises(ValueError, match="most=0"):
        paths(table, most=0)


def test_experts_of_one_layer_stand_side_by_side(read):
    table = pd.DataFrame({"path": ["3+5-1+2"], "tokens": 1, "share": 1.0})
    strings = paths(table).figure.axes[1]
    assert [text.get_text() for text in strings.texts] == ["3", "5", "1", "2"]
    assert strings.get_xticks().tolist() == [0.5, 2.5]


def test_labels_colour_the_bars_and_purities_stand_beside(table, read):
    bars = paths(table.assign(label=["code", "text", "code"], purity=[1, 0.75, 0.5])).figure.axes[2]
    assert read.legend(bars) == ["code", "text"]
    colors = [bar.get_facecolor() for bar in bars.patches]
    assert colors[0] == colors[2] != colors[1]
    assert [text.get_text() for text in bars.texts] == [" 100%", " 75%", " 50%"]


def test_paths_without_labels_are_blue(table):
    bars = paths(table).figure.axes[2]
    assert bars.patches[0].get_facecolor()[:3] == pytest.approx(style.to_rgb(style.BLUE))
