"""Plots of attention from chunk to chunk, and by distance."""

# matplotlib and pandas declare what they give as wide unions.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.attention.chunk_maps import chunk_map
from llama4lab.viz.attention.distances import mass_at_distance


@pytest.fixture
def map_table():
    """Chunks 2 to 4 of a RoPE and a NoPE layer with two heads; the second head of the NoPE layer looks back evenly."""
    lines = []
    for layer, kind in [(2, "rope"), (3, "nope")]:
        for head in (0, 1):
            for query in (2, 3, 4):
                for key in range(2, query + 1):
                    even = kind == "nope" and head == 1
                    weight = 1 / (query - 1) if even else float(key == query)
                    lines.append((layer, kind, head, query, key, weight))
    return pd.DataFrame(lines, columns=["layer", "kind", "head", "query_chunk", "key_chunk", "mass"])


@pytest.fixture
def distance_table():
    lines = [
        (layer, kind, head, near, far, weight * (1 + head / 10))
        for layer, kind, weights in [(0, "rope", [0.5, 0.5, 0]), (1, "nope", [0.2, 0, 0.8]), (2, "rope", [0.9, 0, 0])]
        for head in (0, 1)
        for near, far, weight in zip([0, 1, 2], [0, 1, 3], weights, strict=True)
    ]
    return pd.DataFrame(lines, columns=["layer", "kind", "head", "nearest", "farthest", "mass"])


def image(ax):
    return ax.images[0].get_array().filled(np.nan)


def test_a_map_has_queries_downwards_and_no_future(map_table):
    ax = chunk_map(map_table, layer=3, head=1)
    third = 1 / 3
    expected = np.array([[1, np.nan, np.nan], [0.5, 0.5, np.nan], [third, third, third]])
    np.testing.assert_allclose(image(ax), expected)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "3", "4"]
    assert ax.get_title() == "layer 3 (NoPE), head 1"


def test_a_map_is_the_mean_over_heads_by_default(map_table):
    ax = chunk_map(map_table, layer=3)
    np.testing.assert_allclose(image(ax)[1], [0.25, 0.75, np.nan])
    assert ax.get_title() == "layer 3 (NoPE), mean of 2 heads"
    assert chunk_map(map_table, layer=2).get_title() == "layer 2 (RoPE), mean of 2 heads"
    assert chunk_map(map_table.query("head == 1"), layer=2).get_title() == "layer 2 (RoPE), head 1"


def test_cells_with_room_have_their_numbers(map_table, written):
    ax = chunk_map(map_table, layer=3, head=1)
    assert sorted(written(ax)) == ["0.33", "0.33", "0.33", "0.50", "0.50", "1.00"]


def test_layers_and_heads_that_are_not_there_are_named(map_table, distance_table):
    with pytest.raises(ValueError, match=r"layer=7 was to be drawn; the table has layer 2, 3"):
        chunk_map(map_table, layer=7)
    with pytest.raises(ValueError, match=r"head=5 was to be drawn; the table has head 0, 1"):
        chunk_map(map_table, layer=2, head=5)
    with pytest.raises(ValueError, match=r"layer=7 was to be drawn"):
        mass_at_distance(distance_table, layer=7)


def test_distances_have_a_line_for_each_layer_the_mean_of_its_heads(distance_table):
    ax = mass_at_distance(distance_table)
    assert [line.get_label() for line in ax.lines] == ["layer 0", "layer 1 (NoPE)", "layer 2"]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-"]
    assert list(ax.lines[1].get_ydata()) == pytest.approx([0.21, 0, 0.84])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2–3"]


def test_a_line_ends_with_the_last_bin_that_has_anything(distance_table):
    assert [len(line.get_xdata()) for line in mass_at_distance(distance_table).lines] == [2, 3, 1]


def test_one_layer_has_a_line_for_each_head(distance_table):
    ax = mass_at_distance(distance_table, layer=1)
    assert [line.get_label() for line in ax.lines] == ["head 0", "head 1"]
    assert list(ax.lines[1].get_ydata()) == pytest.approx([0.22, 0, 0.88])
    assert ax.get_title() == "layer 1 (NoPE)"
    assert len({str(line.get_color()) for line in ax.lines}) == 2
