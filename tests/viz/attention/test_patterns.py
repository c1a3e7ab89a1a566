# matplotlib and pandas declare what they give as wide unions.
# pyright: reportOptionalMemberAccess=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.attention import mass, pattern


def squares(ax) -> list[tuple]:
    return [(square.get_x(), square.get_y(), square.get_width(), square.get_height()) for square in ax.patches]


def test_a_pattern_is_drawn_queries_down_and_keys_across(pattern_table):
    ax = pattern(pattern_table(["a", "b", "c"], size=2))
    assert np.asarray(ax.images[0].get_array()).tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]
    assert ax.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.yaxis_inverted()


def test_chunks_are_squares_solid_in_rope_layers_and_dotted_in_nope_layers(pattern_table):
    tokens = ["a", "b", "c", "d", "e"]
    rope, nope = (pattern(pattern_table(tokens, size=2, kind=kind, first=7)) for kind in ("rope", "nope"))
    assert squares(rope) == squares(nope) == [(-0.5, -0.5, 2, 2), (1.5, 1.5, 2, 2), (3.5, 3.5, 1, 1)]
    assert {square.get_linestyle() for square in rope.patches} == {"-"}
    assert {square.get_linestyle() for square in nope.patches} == {":"}
    assert "RoPE" in rope.get_title()
    assert "NoPE" in nope.get_title()


def test_a_pattern_of_some_queries_has_squares_where_they_are(pattern_table):
    table = pattern_table(["a", "b", "c", "d"], size=2)
    ax = pattern(table[table["query"] >= 3])
    assert squares(ax) == [(1.5, -0.5, 2, 1)]


def test_a_single_chunk_has_no_square(pattern_table):
    assert squares(pattern(pattern_table(["a", "b"], size=2))) == []


def test_several_heads_at_once_are_refused(pattern_table):
    table = pattern_table(["a"], size=2)
    with pytest.raises(ValueError, match=r'One head .* has 1, 2\.\nChoose one: table\[table\["head"\] == 1\]'):
        pattern(pd.concat([table, table.assign(head=2)]))


def test_mass_has_a_bar_for_each_head_in_two_parts():
    table = pd.DataFrame({"layer": [2, 2, 3, 3], "kind": ["rope"] * 2 + ["nope"] * 2, "head": [0, 1, 0, 1]})
    table["earlier"] = [0, 0, 0.25, 0.75]
    table["own_chunk"] = 1 - table["earlier"]
    ax = mass(table)
    own, earlier = ax.containers
    assert [bar.get_height() for bar in own] == [1, 1, 0.75, 0.25]
    assert [(bar.get_y(), bar.get_height()) for bar in earlier] == [(1, 0), (1, 0), (0.75, 0.25), (0.25, 0.75)]
    assert [bar.get_x() + bar.get_width() / 2 for bar in own] == sorted(
        bar.get_x() + bar.get_width() / 2 for bar in own
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "3\nNoPE"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["earlier chunks", "own chunk"]
