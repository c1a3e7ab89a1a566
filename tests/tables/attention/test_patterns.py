"""Attention tables against planted patterns, and against the patterns of models with chunks and padding."""

# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import math

import pytest
import torch

from llama4lab.run.recording import record
from llama4lab.tables.attention import chunks, mass, pattern

PATTERN = "layers.1.self_attn.pattern"


@pytest.fixture
def planted(make_prompt, make_run):
    """Rows "a b c" and "x y" behind one place of padding; chunks of two tokens; a head on itself, a head spread out."""
    itself = torch.eye(3).expand(2, 3, 3)
    spread = torch.tensor([[[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]], [[1, 0, 0], [0, 1, 0], [0, 0.75, 0.25]]])
    return make_run(make_prompt("a b c", "x y"), {PATTERN: torch.stack([itself, spread], dim=1)})


def test_chunks_begin_anew_every_chunk_size_tokens_and_skip_padding(planted):
    table = chunks(planted)
    first = table[table["layer"] == 0]
    assert first[["row", "chunk", "start", "stop"]].values.tolist() == [[0, 0, 0, 2], [0, 1, 2, 3], [1, 0, 1, 3]]
    assert set(first["chunk_size"]) == {2}
    assert set(first["kind"]) == {"rope"}


def test_a_nope_layer_is_one_chunk_without_a_size(planted):
    last = chunks(planted).query("layer == 3")
    assert last[["row", "chunk", "start", "stop"]].values.tolist() == [[0, 0, 0, 3], [1, 0, 1, 3]]
    assert last["chunk_size"].isna().all()
    assert set(last["kind"]) == {"nope"}


def test_attention_stays_inside_the_chunks_of_the_table(new_text_model):
    model = new_text_model()
    run = record(model, [list(range(1, 21)), list(range(5, 16))], at="layers.*.self_attn.pattern")
    for line in chunks(run).itertuples():
        weights = run[f"layers.{line.layer}.self_attn.pattern"][line.row, :, line.start : line.stop]
        inside = weights[..., line.start : line.stop]
        assert inside.sum(-1).allclose(torch.ones(inside.shape[:-1]))
        assert (inside.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_mass_is_the_mean_over_tokens_of_what_was_planted(planted):
    table = mass(planted).set_index("head")
    # Five tokens; head 0 looks at itself, and only the third token of row 0 has a chunk before its own.
    assert table.loc[0, ["own_chunk", "earlier", "first_token", "itself"]].tolist() == pytest.approx([1, 0, 2 / 5, 1])
    assert table.loc[1, "own_chunk"] == pytest.approx((1 + 1 + 0.25 + 1 + 1) / 5)
    assert table.loc[1, "earlier"] == pytest.approx(0.75 / 5)
    assert table.loc[1, "first_token"] == pytest.approx((1 + 0.5 + 0.5 + 1 + 0.75) / 5)
    assert table.loc[1, "itself"] == pytest.approx((1 + 0.5 + 0.25 + 1 + 0.25) / 5)


def test_entropy_of_attention_is_in_nats(planted):
    table = mass(planted).set_index("head")
    quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert table.loc[0, "entropy"] == 0
    assert table.loc[1, "entropy"] == pytest.approx((math.log(2) + 1.5 * math.log(2) + quarter) / 5)


def test_only_nope_layers_reach_earlier_chunks(new_text_model):
    model = new_text_model()
    run = record(model, [list(range(1, 31)), list(range(5, 25))], at="layers.*.self_attn.pattern")
    table = mass(run)
    assert (table["own_chunk"] + table["earlier"]).tolist() == pytest.approx([1] * len(table))
    assert (table["earlier"] > 0).tolist() == (table["kind"] == "nope").tolist()
    assert set(table["kind"]) == {"rope", "nope"}


def test_mass_of_a_model_without_chunks_is_all_in_the_own_one(new_text_model):
    run = record(new_text_model(attention_chunk_size=None), [list(range(1, 31))], at="layers.*.self_attn.pattern")
    assert mass(run)["earlier"].tolist() == [0] * 20


def test_mass_of_a_cut_run_is_of_the_queries_that_are_left(planted):
    table = mass(planted.cut(rows=0, positions=2)).set_index("head")
    assert table.loc[1, ["own_chunk", "earlier", "first_token", "itself"]].tolist() == [0.25, 0.75, 0.5, 0.25]


def test_a_pattern_has_one_line_for_each_query_and_key_but_none_for_padding(planted):
    table = pattern(planted, layer=1, head=1, row=1)
    assert table[["query_token", "key_token", "query", "key", "weight"]].values.tolist() == [
        ["x", "x", 1, 1, 1],
        ["x", "y", 1, 2, 0],
        ["y", "x", 2, 1, 0.75],
        ["y", "y", 2, 2, 0.25],
    ]
    assert set(table["query_chunk"]) == set(table["key_chunk"]) == {0}


def test_a_pattern_says_which_chunks_query_and_key_are_in(planted):
    table = pattern(planted, layer=1, head=0).set_index(["query_token", "key_token"])
    assert table.loc[("c", "a"), ["query_chunk", "key_chunk"]].tolist() == [1, 0]
    assert table.loc[("b", "a"), ["query_chunk", "key_chunk"]].tolist() == [0, 0]


def test_a_pattern_of_a_cut_run_keeps_the_positions_of_the_prompt(planted):
    table = pattern(planted.cut(positions=[2]), layer=1, head=1, row=0)
    assert table[["query", "key", "weight"]].values.tolist() == [[2, 0, 0.5], [2, 1, 0.25], [2, 2, 0.25]]


def test_what_is_not_there_is_named(planted):
    with pytest.raises(KeyError, match=r"layers\.2\.self_attn\.pattern"):
        pattern(planted, layer=2, head=0)
    with pytest.raises(IndexError, match="heads 0 to 1"):
        pattern(planted, layer=1, head=2)
    with pytest.raises(IndexError, match="rows 0"):
        pattern(planted.cut(rows=0), layer=1, head=0, row=1)
    del planted.tensors[PATTERN]
    with pytest.raises(KeyError, match=r"self_attn\.pattern"):
        mass(planted)
