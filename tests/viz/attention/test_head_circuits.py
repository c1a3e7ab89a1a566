# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.attention import copying, ov, qk


@pytest.fixture
def ov_table():
    """Token 4 raises itself and token 9; token 9 raises tokens 7 and 4."""
    table = pd.DataFrame({"layer": 1, "kind": "rope", "head": 2, "kv_head": 1, "in_id": [4, 4, 9, 9]})
    table["token_in"], table["rank"] = [" four", " four", "nine", "nine"], [0, 1, 0, 1]
    table["out_id"], table["token_out"] = [4, 9, 7, 4], [" four", "nine", "$seven", " four"]
    return table.assign(score=[3.0, 1, 2, -0.5], own_rank=[0, 0, 5, 5])


@pytest.fixture
def qk_table(ov_table):
    names = {"in_id": "query_id", "token_in": "query_token", "out_id": "key_id", "token_out": "key_token"}
    return ov_table.rename(columns=names).assign(distance=3)


def test_what_a_head_writes_is_a_grid_of_tokens_with_the_token_itself_framed(ov_table):
    ax = ov(ov_table)
    assert np.asarray(ax.images[0].get_array()).tolist() == [[3, 1], [2, -0.5]]
    assert ax.images[0].get_clim() == (-3, 3)
    assert [text.get_text() for text in ax.texts] == ["·four", "nine", r"\$seven", "·four"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["·four", "nine"]
    assert [(round(frame.get_x()), round(frame.get_y())) for frame in ax.patches] == [(0, 0)]
    assert ax.get_title() == "layer 1 (RoPE), head 2 writes"


def test_what_a_head_looks_for_names_the_distance_where_it_counts(qk_table):
    assert qk(qk_table).get_title() == "layer 1 (RoPE), head 2 looks for, 3 tokens back"
    assert qk(qk_table.assign(kind="nope")).get_title() == "layer 1 (NoPE), head 2 looks for"
    with pytest.raises(ValueError, match="One distance can be drawn"):
        qk(pd.concat([qk_table, qk_table.assign(distance=4)]))


def test_of_many_tokens_the_strongest_are_drawn_and_the_title_says_so(ov_table):
    parts = [ov_table.iloc[:2].assign(in_id=token, token_in=f"t{token}", score=[token, 0]) for token in range(40)]
    ax = ov(pd.concat(parts))
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"t{token}" for token in range(39, 15, -1)]
    assert "(24 of 40 tokens)" in ax.get_title()


def test_several_heads_at_once_are_refused(ov_table):
    with pytest.raises(ValueError, match="One head can be drawn"):
        ov(pd.concat([ov_table, ov_table.assign(head=3)]))


def test_copying_is_a_map_of_heads_with_a_cross_for_a_silent_one():
    table = pd.DataFrame({"layer": [2, 2, 3, 3], "kind": ["rope"] * 2 + ["nope"] * 2, "head": [0, 1, 0, 1]})
    table = table.assign(eigenvalues=[0.5, -1, 1, np.nan], own_first=[0.1, 0, 1, 0], own_rank=[4.0, 9, 0, 5])
    ax = copying(table)
    values = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert values[0].tolist() == [0.5, -1]
    assert ax.images[0].get_clim() == (-1, 1)
    assert [text.get_text() for text in ax.texts] == ["×"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "NoPE 3"]
    assert copying(table, "own_rank").images[0].get_clim() == (0, 9)
    with pytest.raises(ValueError, match="columns are own_first"):
        copying(table, "kind")
