"""Reductions of attention from queries and keys, against those of recorded patterns."""

# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

import numpy as np
import pandas as pd
import pytest
import torch

from llama4lab.model.loading import load
from llama4lab.run.attention.streaming import attention_stream
from llama4lab.run.recording import record
from llama4lab.tables.attention.patterns import mass, pattern
from llama4lab.tables.attention.streams import mass_at_distance, reductions, top_keys

AT = ["layers.*.self_attn.q_rot", "layers.*.self_attn.k_rot", "layers.*.self_attn.pattern"]


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(scope="module")
def run(model, random_ids):
    """Chunks of 8; a row of 29 tokens and a padded one of 19."""
    return record(model, [random_ids(29).tolist(), random_ids(19, seed=1).tolist()], at=AT)


@pytest.mark.parametrize("changes", [{}, {"attention_chunk_size": None}, {"num_key_value_heads": 1}])
def test_reductions_are_those_of_the_patterns(new_text_model, random_ids, changes):
    model = new_text_model(**changes)
    run = record(model, [random_ids(29).tolist(), random_ids(19, seed=1).tolist()], at=AT)
    expected = mass(run)
    for found in (reductions(run), reductions(attention_stream(model, run.prompt))):
        pd.testing.assert_frame_equal(found[expected.columns], expected, atol=1e-5, check_dtype=False)


def test_reductions_of_the_tiny_checkpoint_are_those_of_its_patterns():
    run = record(load(), ["one two three " * 8, "two"], at=AT)
    expected = mass(run)
    pd.testing.assert_frame_equal(reductions(run)[expected.columns], expected, atol=1e-5, check_dtype=False)


def test_mass_at_distance_is_that_of_the_patterns(run):
    table = mass_at_distance(run)
    assert list(table.columns) == ["layer", "kind", "head", "nearest", "farthest", "mass"]
    assert table.groupby(["layer", "head"])["mass"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    for (layer, head), own in table.groupby(["layer", "head"]):
        lines = pd.concat([pattern(run, layer, head, row) for row in (0, 1)])
        distance = lines["query"] - lines["key"]
        for line in own.itertuples():
            inside = lines["weight"][(distance >= line.nearest) & (distance <= line.farthest)].sum()
            assert line.mass == pytest.approx(inside / 48, abs=1e-5)


def test_bins_of_distance_follow_one_another_and_double(run):
    bins = mass_at_distance(run).query("layer == 0 and head == 0")
    assert bins["nearest"].tolist() == [0, 1, 2, 4, 8, 16]
    assert bins["farthest"].tolist() == [0, 1, 3, 7, 15, 31]


@pytest.mark.parametrize(("layer", "head"), [(0, 3), (3, 1)])
def test_top_keys_are_the_largest_of_the_pattern(run, layer, head):
    table = top_keys(run, layer, head, k=3)
    weights = {
        row: pattern(run, layer, head, row).pivot(index="query", columns="key", values="weight") for row in (0, 1)
    }
    for (row, query), own in table.groupby(["row", "query"]):
        line = weights[row].loc[query]
        largest = np.sort(line[line > 0].to_numpy())[::-1][:3]
        assert own["weight"].to_numpy() == pytest.approx(largest, abs=1e-5)
        assert line[own["key"]].to_numpy() == pytest.approx(largest, abs=1e-5)
        assert own["rank"].tolist() == list(range(len(largest)))
    assert table.drop_duplicates(["row", "query"]).groupby("row").size().tolist() == [29, 19]


def test_top_keys_have_the_words_of_the_prompt_and_never_padding(make_prompt, make_run):
    """In row "x y" behind padding, y looks at x."""
    q = torch.ones(2, 3, 1, 1)
    k = torch.tensor([[0.0, 9, 0], [0, 9, 0]])[:, :, None, None]
    names = ["layers.3.self_attn.q_rot", "layers.3.self_attn.k_rot"]
    planted = make_run(make_prompt("a b c", "x y"), dict(zip(names, (q, k), strict=True)))
    table = top_keys(planted, 3, 0, k=2)
    last = table[table["row"] == 1]
    assert last[["query", "rank", "key", "query_token", "key_token"]].values.tolist() == [
        [1, 0, 1, "x", "x"],
        [2, 0, 1, "y", "x"],
        [2, 1, 2, "y", "y"],
    ]
    alone = top_keys(planted.cut(rows=1), 3, 0, k=2)
    pd.testing.assert_frame_equal(alone, last.reset_index(drop=True))


def test_what_is_not_there_is_named(run):
    with pytest.raises(IndexError, match="layer 2 has heads 0 to 3"):
        top_keys(run, 2, 4)
    with pytest.raises(ValueError, match="k=0 keys"):
        top_keys(run, 2, 0, k=0)
    with pytest.raises(KeyError, match=r"layers\.9\.self_attn\.q_rot"):
        top_keys(run, 9, 0)
    with pytest.raises(ValueError, match="cut to positions 5"):
        reductions(run.cut(positions=slice(5, 9)))
