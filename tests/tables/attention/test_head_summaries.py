"""All heads in one table, against the tables they come from and against values planted by hand."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pytest
import torch

from llama4lab.model.loading import load
from llama4lab.run.generation import generate
from llama4lab.run.recording import record
from llama4lab.tables import heads as head_scores
from llama4lab.tables.attention import heads, mass, value_weighted
from llama4lab.tables.attention.head_summaries import NEEDED

ROWS = [[5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6, 7], [8, 9, 10, 8, 9, 10, 8]]


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(scope="module")
def run(model):
    return record(model, ROWS, at=[*NEEDED, "layers.*.self_attn.head_out"])


def norms_by_hand(model, run, layer: int, head: int) -> torch.Tensor:
    """Norm of what the value of each key is in the residual stream, [batch, key]."""
    attention = model.text.layers[layer].self_attn
    weight = attention.o_proj.weight.detach()[:, 16 * head : 16 * (head + 1)]
    return torch.einsum("bkd,md->bkm", run[f"layers.{layer}.self_attn.v"][:, :, head // 2], weight).norm(dim=-1)


def test_heads_have_the_numbers_of_the_tables_of_attention(run):
    table = heads(run)
    for own, other in ((mass(run), ["entropy", "first_token", "itself", "earlier"]), (head_scores.scores(run), None)):
        columns = other or ["previous_token", "duplicate_token", "induction"]
        np.testing.assert_array_equal(table[columns], own[columns])
        assert table[["layer", "kind", "head"]].equals(own[["layer", "kind", "head"]])
    assert table["kv_head"].tolist() == [0, 0, 1, 1] * 5


@pytest.mark.parametrize("through", [False, True])
def test_value_weighted_attention_is_attention_times_norms_as_shares(model, run, through):
    for layer, head, row in ((1, 3, 1), (3, 0, 0)):
        table = value_weighted(run, layer, head, row, model=model if through else None)
        weight = run[f"layers.{layer}.self_attn.pattern"][row, head]
        norms = run[f"layers.{layer}.self_attn.v"][row, :, head // 2].norm(dim=-1)
        norms = norms_by_hand(model, run, layer, head)[row] if through else norms
        brought = weight * norms
        brought = brought / brought.sum(-1, keepdim=True)
        found = [float(brought[line.query, line.key]) for line in table.itertuples()]
        np.testing.assert_allclose(table["value_weighted"], found, atol=1e-6)
        np.testing.assert_allclose(table.groupby("query")["value_weighted"].sum(), 1, atol=1e-5)
        assert table["query"].min() == table["key"].min() == (0 if row == 0 else 5)


@pytest.mark.parametrize("through", [False, True])
def test_the_first_token_has_the_mean_of_its_value_weighted_attention(model, run, through):
    chosen = model if through else None
    table = heads(run, chosen).set_index(["layer", "head"])
    for layer, head in ((0, 1), (3, 2)):
        shares = [value_weighted(run, layer, head, row, model=chosen) for row in (0, 1)]
        first = [share.loc[share["key"] == share["key"].min(), "value_weighted"] for share in shares]
        assert table.loc[(layer, head), "value_first_token"] == pytest.approx(np.concatenate(first).mean(), abs=1e-6)


def test_a_head_that_rests_on_a_token_without_value_brings_nothing_from_it(make_prompt, make_run):
    pattern = torch.tensor([[[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.1, 0.1]]]).expand(1, 2, 3, 3)
    values = torch.tensor([0.0, 3.0, 1.0])[None, :, None, None].expand(1, 3, 1, 2).clone()
    run = make_run(make_prompt("a b c"), {"layers.3.self_attn.pattern": pattern, "layers.3.self_attn.v": values})
    table = heads(run)
    assert table["first_token"].tolist() == pytest.approx([0.9, 0.9])
    assert table["value_first_token"].tolist() == [0, 0]
    assert table["kv_head"].tolist() == [0, 0]
    weighted = value_weighted(run, 3, 1).pivot(index="query", columns="key", values="value_weighted").to_numpy()
    assert np.isnan(weighted[0]).all()  # it sees only what has no value
    np.testing.assert_allclose(weighted[1:], [[0, 1, 0], [0, 0.75, 0.25]], rtol=1e-6)


def test_heads_of_the_tiny_checkpoint_and_of_generated_text_can_be_told():
    model = load()
    table = heads(generate(model, "The capital of France is", max_new_tokens=4, at=NEEDED), model)
    assert len(table) == model.text.config.num_hidden_layers * model.text.config.num_attention_heads
    assert table["value_first_token"].between(0, 1).all()


def test_missing_values_are_named(run):
    with pytest.raises(ValueError, match="keys, but there are values of 2"):
        heads(run.cut(positions=[9, 10]))
    with pytest.raises(KeyError, match=r"layers\.1\.self_attn\.v"):
        value_weighted(
            type(run)(
                {"layers.1.self_attn.pattern": run["layers.1.self_attn.pattern"]},
                run.shapes,
                run.logits,
                run.prompt,
                run.meta,
            ),
            1,
            0,
        )
    with pytest.raises(IndexError, match="heads 0 to 3"):
        value_weighted(run, 1, 4)
