"""Circuits of heads, against passes of the model, dense matrices of small vocabularies, and planted heads."""

# torch and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pytest
import torch

from llama4lab.model.loading import load
from llama4lab.run.recording import record
from llama4lab.tables.attention import copying, ov, qk

BIAS = [{}, {"attention_bias": True}]


def dense_ov(model, layer: int, head: int, *, bias: bool = True) -> torch.Tensor:
    """What each token (row) adds to each logit through a head, by the weights."""
    block, config = model.text.layers[layer], model.text.config
    attention, d = block.self_attn, config.head_dim
    kv_head = head // (config.num_attention_heads // config.num_key_value_heads)
    x = block.input_layernorm(model.get_input_embeddings().weight)
    own = slice(kv_head * d, (kv_head + 1) * d)
    value = x @ attention.v_proj.weight[own].T
    if bias and attention.v_proj.bias is not None:
        value = value + attention.v_proj.bias[own]
    out = value @ attention.o_proj.weight[:, head * d : (head + 1) * d].T
    return ((out * model.text.norm.weight) @ model.get_output_embeddings().weight.T).detach()


@pytest.fixture
def planted(new_text_model):
    """Tokens are directions of their own; head 0 copies, head 1 takes down, head 2 shifts, head 3 is silent."""
    model = new_text_model(num_hidden_layers=1, vocab_size=16, bos_token_id=1)
    attention, names = model.text.layers[0].self_attn, torch.eye(16, 64)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(names)
        model.get_output_embeddings().weight.copy_(names)
        for norm in (model.text.norm, model.text.layers[0].input_layernorm):
            norm.weight.fill_(1)
        attention.v_proj.weight.copy_(torch.cat([names, names]))
        shifted = names.roll(1, dims=0)
        attention.o_proj.weight.copy_(torch.cat([names, -names, shifted, 0 * names]).T)
    return model


def test_a_planted_head_copies_takes_down_or_shifts(planted):
    first = [ov(planted, 0, head, k=1).set_index("in_id") for head in range(3)]
    assert first[0]["out_id"].tolist() == list(range(16))
    assert set(first[0]["own_rank"]) == {0}
    assert set(first[1]["own_rank"]) == {15}
    assert first[2]["out_id"].tolist() == [(token - 1) % 16 for token in range(16)]
    # Tokens have length 1 in 64 dimensions: the norm makes them 8. The mean over 16 tokens is taken off.
    assert first[0]["score"].tolist() == pytest.approx([8 * 15 / 16] * 16, rel=1e-3)


def test_copying_scores_of_planted_heads_are_1_and_minus_1(planted):
    table = copying(planted).set_index("head")
    assert table["own_first"].tolist()[:3] == [1, 0, 0]
    assert table["own_rank"].tolist()[:2] == [0, 15]
    assert table["eigenvalues"].tolist()[:2] == pytest.approx([1, -1])
    assert abs(table.loc[2, "eigenvalues"]) < 0.2  # a cycle: eigenvalues on a circle
    assert np.isnan(table.loc[3, "eigenvalues"])
    assert table["kv_head"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("changes", BIAS)
@pytest.mark.parametrize("head", [0, 3])
def test_ov_is_what_a_head_adds_to_the_logits_of_a_token_that_sees_only_itself(new_text_model, changes, head):
    model = new_text_model(**changes)
    ids = [3, 77, 120]
    run = record(model, [[token] for token in ids], at="layers.0.self_attn.head_out")
    out = run["layers.0.self_attn.head_out"][:, 0, head] * model.text.norm.weight.detach()
    logits = model.get_output_embeddings()(out).detach()
    best, found = (logits - logits.mean(1, keepdim=True)).topk(5)
    table = ov(model, 0, head, ids, k=5)
    assert table["in_id"].tolist() == np.repeat(ids, 5).tolist()
    assert table["rank"].tolist() == [0, 1, 2, 3, 4] * 3
    assert table["out_id"].tolist() == found.flatten().tolist()
    np.testing.assert_allclose(table["score"], best.flatten(), atol=1e-4)
    assert table["token_out"].tolist() == [f"<{token}>" for token in found.flatten().tolist()]


def test_ov_of_the_whole_vocabulary_is_the_same_in_pieces(new_text_model, monkeypatch):
    model = new_text_model()
    dense = dense_ov(model, 3, 2)
    dense = dense - dense.mean(1, keepdim=True)
    whole = ov(model, 3, 2, k=3)
    monkeypatch.setattr("llama4lab.tables.attention.head_circuits.CHUNK_NBYTES", 7 * 4 * 128)
    monkeypatch.setattr("llama4lab.tables.attention.head_weights.ROWS", 30)
    pieces = ov(model, 3, 2, k=3)
    np.testing.assert_allclose(whole["score"].to_numpy().reshape(-1, 3), dense.topk(3).values, atol=1e-4)
    ranks = (dense > dense.diagonal()[:, None]).sum(1)
    assert whole["own_rank"].tolist() == ranks.repeat_interleave(3).tolist()
    assert set(whole["kind"]) == {"nope"}
    assert pieces["out_id"].tolist() == whole["out_id"].tolist()
    np.testing.assert_allclose(pieces["score"], whole["score"], atol=1e-5)


@pytest.mark.parametrize("changes", BIAS)
@pytest.mark.parametrize("tokens", [None, [4, 9, 31, 80, 81]])
def test_copying_is_that_of_the_dense_circuit(new_text_model, changes, tokens):
    model = new_text_model(**changes)
    table = copying(model, [1, 3], tokens).set_index(["layer", "head"])
    ids = list(range(128)) if tokens is None else tokens
    for layer, head in ((1, 0), (3, 3)):
        dense = dense_ov(model, layer, head)
        ranks = (dense > dense.diagonal()[:, None]).sum(1)[ids].double()
        assert table.loc[(layer, head), "own_first"] == pytest.approx(float((ranks == 0).double().mean()))
        assert table.loc[(layer, head), "own_rank"] == pytest.approx(float(ranks.mean()))
        linear = dense_ov(model, layer, head, bias=False).double()
        linear = (linear - linear.mean(1, keepdim=True))[ids][:, ids]
        values = torch.linalg.eigvals(linear)
        share = float(values.sum().real / values.abs().sum())
        assert table.loc[(layer, head), "eigenvalues"] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False, "attention_bias": True}, {"no_rope_layers": [0] * 5}])
def test_qk_of_the_first_layer_are_its_scores(new_text_model, changes):
    model, ids = new_text_model(**changes), [11, 90, 3, 44, 90, 7]
    scores = record(model, [ids], at="layers.0.self_attn.scores")["layers.0.self_attn.scores"][0]
    for head in (1, 2):
        table = qk(model, 0, head, ids[-2:], distances=[0, 1, 4], k=128)
        found = table.set_index(["distance", "query_id", "key_id"])["score"]
        for query in (4, 5):
            for distance in (0, 1, 4):
                own = found[distance, ids[query], ids[query - distance]]
                assert own == pytest.approx(float(scores[head, query, query - distance]), abs=1e-4)
        assert table.groupby(["distance", "query_id"])["score"].is_monotonic_decreasing.all()


def test_only_rope_layers_care_for_distance(new_text_model):
    model = new_text_model()
    for layer, same in ((1, False), (3, True)):
        near, far = (qk(model, layer, 0, 5, distances=[d], k=128).sort_values("key_id")["score"] for d in (0, 6))
        assert np.allclose(near, far) == same


def test_the_own_rank_of_a_query_is_its_place_in_the_list(new_text_model):
    table = qk(new_text_model(), 2, 1, [5, 60], k=128)
    own = table[table["query_id"] == table["key_id"]]
    assert own["own_rank"].tolist() == own["rank"].tolist()


def test_induction_heads_of_the_tiny_checkpoint_copy():
    model = load()
    table = copying(model, [0, 7])
    last, first = (table.loc[table["layer"] == layer, "eigenvalues"] for layer in (7, 0))
    assert last.min() > 0.5 > first.max()
    assert set(ov(model, 7, 0, [" Mary"], k=2)["token_in"]) == {" Mary"}
    assert set(qk(model, 7, 0, " Mary", k=2)["query_token"]) == {" Mary"}


def test_bad_input_is_named(new_text_model):
    model = new_text_model()
    with pytest.raises(IndexError, match="heads 0 to 3"):
        ov(model, 0, 4)
    with pytest.raises(IndexError, match="layers are 0 to 4"):
        copying(model, 5)
    with pytest.raises(IndexError, match="ids are 0 to 127"):
        qk(model, 0, 0, [128])
    with pytest.raises(ValueError, match="k is at least 1"):
        ov(model, 0, 0, [1], k=0)
    with pytest.raises(ValueError, match="no tokenizer"):
        ov(model, 0, 0, " Mary")
    with pytest.raises(ValueError, match="distance -1"):
        qk(model, 0, 0, 1, distances=[-1])
