"""Attention from chunk to chunk: planted, and against patterns."""

# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

import numpy as np
import pandas as pd
import pytest
import torch

from llama4lab.model.loading import load
from llama4lab.run.attention.reductions import Wanted
from llama4lab.run.attention.streaming import attention_stream
from llama4lab.run.recording import record
from llama4lab.tables.attention.chunk_maps import chunk_map, streamed_chunk_map
from llama4lab.tables.attention.patterns import mass, pattern

QUERIES_AND_KEYS = ["layers.*.self_attn.q_rot", "layers.*.self_attn.k_rot"]
COLUMNS = ["layer", "kind", "head", "query_chunk", "key_chunk", "mass"]


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(scope="module")
def run(model, random_ids):
    """Chunks of 8; a row of 29 tokens and a padded one of 19."""
    rows = [random_ids(29).tolist(), random_ids(19, seed=1).tolist()]
    return record(model, rows, at=[*QUERIES_AND_KEYS, "layers.*.self_attn.pattern"])


def test_a_map_is_that_of_the_patterns(run):
    table = chunk_map(run)
    assert list(table.columns) == COLUMNS
    for (layer, head), own in table.groupby(["layer", "head"]):
        lines = pd.concat([pattern(run, layer, head, row) for row in (0, 1)])
        by_query = lines.groupby(["row", "query", "query_chunk", "key_chunk"])["weight"].sum().reset_index()
        queries = by_query.drop_duplicates(["row", "query"]).groupby("query_chunk").size()
        expected = by_query.groupby(["query_chunk", "key_chunk"])["weight"].sum().to_dict()
        for line in own.itertuples():
            mean = expected[line.query_chunk, line.key_chunk] / queries[line.query_chunk]
            assert line.mass == pytest.approx(mean, abs=1e-5)


def test_mass_sums_to_one_and_chunked_layers_stay_on_the_diagonal(run):
    table = chunk_map(run)
    assert table.groupby(["layer", "head", "query_chunk"])["mass"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    beside = table[table["query_chunk"] != table["key_chunk"]]
    assert (beside["key_chunk"] < beside["query_chunk"]).all()
    assert ((beside["mass"] > 0) == (beside["kind"] == "nope")).all()
    assert set(beside["kind"]) == {"rope", "nope"}


def test_the_diagonal_is_the_own_chunk_of_mass(run):
    table = chunk_map(run).query("query_chunk == key_chunk")
    queries = np.array([16, 16, 11, 5])  # by chunk, of rows of 29 and 19 tokens
    table = table.assign(part=table["mass"] * queries[table["query_chunk"]] / queries.sum())
    own = table.groupby(["layer", "head"])["part"].sum()
    assert own.to_numpy() == pytest.approx(mass(run)["own_chunk"].to_numpy(), abs=1e-5)


def test_a_streamed_map_is_that_of_the_recording(model, run):
    pd.testing.assert_frame_equal(streamed_chunk_map(model, run.prompt), chunk_map(run), atol=1e-6)
    some = streamed_chunk_map(model, run.prompt, layers=[3, 1])
    assert some["layer"].unique().tolist() == [3, 1]


def test_a_planted_jump_shows_in_its_cell(make_prompt, make_run):
    """Chunks of 2; in a NoPE layer all queries of the last chunk look at the third token, the others at the first."""
    q = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])[None, :, None]
    k = 90.0 * torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 0], [0, 0], [0, 0]])[None, :, None]
    names = ["layers.3.self_attn.q_rot", "layers.3.self_attn.k_rot"]
    table = chunk_map(make_run(make_prompt("a b c d e f"), dict(zip(names, (q, k), strict=True))))
    assert set(table["kind"]) == {"nope"}
    found = table.pivot(index="query_chunk", columns="key_chunk", values="mass").fillna(0).to_numpy()
    assert found == pytest.approx(np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]]), abs=1e-5)


def test_a_model_without_chunks_has_one(new_text_model):
    table = streamed_chunk_map(new_text_model(attention_chunk_size=None), [list(range(1, 20))])
    assert len(table) == 5 * 4
    assert table["mass"].to_numpy() == pytest.approx(1)


def test_what_was_not_summed_or_recorded_is_named(model, run):
    stream = attention_stream(model, run.prompt, layers=[0], wanted=Wanted(chunk_mass=False))
    with pytest.raises(ValueError, match=r"Wanted\(chunk_mass=True\)"):
        chunk_map(stream)
    with pytest.raises(KeyError, match="q_rot"):
        chunk_map(record(model, run.prompt, at="layers.*.self_attn.pattern"))


def test_the_tiny_checkpoint_reaches_back_only_in_nope_layers():
    table = streamed_chunk_map(load(), "one two three " * 60)
    beside = table[table["query_chunk"] != table["key_chunk"]]
    reached = beside.groupby(["layer", "kind"])["mass"].sum().reset_index()
    assert len(reached) == 8
    assert ((reached["mass"] > 0) == (reached["kind"] == "nope")).all()
