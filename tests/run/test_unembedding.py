import accelerate
import pytest
import torch

import llama4lab as lab
from llama4lab.run import unembedding
from llama4lab.run.unembedding import Unembedding, token_ids


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(scope="module")
def run(model, random_ids):
    return lab.record(model, random_ids(2, 7), at=["layers.4.resid_post", "final_norm"])


@torch.no_grad()
def test_the_end_of_the_residual_stream_gives_the_logits_of_the_model(model, run):
    way = Unembedding(model)
    for name, normed in (("layers.4.resid_post", False), ("final_norm", True)):
        assert torch.allclose(way.logits(run[name].flatten(0, 1), normed=normed), run.logits.flatten(0, 1), atol=1e-5)


def test_directions_are_rows_of_the_output_matrix(model):
    ids = torch.tensor([5, 100, 5])
    assert torch.equal(Unembedding(model).directions(ids), model.lm_head.weight[ids])
    assert model.lm_head.weight.grad is None
    assert Unembedding(model).directions(torch.tensor([], dtype=torch.long)).shape == (0, 64)


def test_a_token_outside_the_vocabulary_is_refused(model):
    for token in (-1, 128):
        with pytest.raises(IndexError, match="0 to 127"):
            Unembedding(model).directions(torch.tensor([3, token]))


def test_through_the_frozen_norm_a_logit_is_linear_in_the_stream(model, run):
    way, x = Unembedding(model), run["layers.4.resid_post"].flatten(0, 1)
    ids = torch.arange(len(x))
    along = way.through_norm(way.directions(ids), x)
    assert torch.allclose((along * x).sum(-1), run.logits.flatten(0, 1)[ids, ids], atol=1e-5)
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.text.norm.eps)
    part = torch.randn_like(x)
    frozen = (part * scale * model.text.norm.weight) @ model.lm_head.weight.T
    assert torch.allclose((along * part).sum(-1), frozen[ids, ids], atol=1e-5)


def test_chunks_hold_as_many_logits_as_the_limit_allows(model, monkeypatch):
    monkeypatch.setattr(unembedding, "CHUNK_NBYTES", 4 * 128 * 3)
    way = Unembedding(model)
    assert [(own.start, own.stop) for own in way.chunks(7)] == [(0, 3), (3, 6), (6, 7)]
    assert list(way.chunks(0)) == []
    whole = way.directions(torch.arange(128))
    assert torch.equal(whole, model.lm_head.weight)


def test_offloaded_weights_are_read_where_they_wait(new_text_model, model, run):
    away = new_text_model()
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    x, ids = run["layers.4.resid_post"][0], torch.tensor([3, 9, 3, 1, 2, 4, 8])
    own, other = Unembedding(model), Unembedding(away)
    with torch.no_grad():
        assert torch.equal(own.logits(x), other.logits(x))
    assert torch.equal(own.directions(ids), other.directions(ids))
    assert torch.equal(own.through_norm(own.directions(ids), x), other.through_norm(other.directions(ids), x))
    assert all(parameter.device.type == "meta" for parameter in away.parameters())


def test_tokens_are_given_once_or_for_each_row(tiny):
    prompt = tiny.prompt(["The capital of France is", "Mary went to"])
    paris = prompt.token_id(" Paris")
    assert token_ids(" Paris", prompt).tolist() == [paris, paris]
    assert token_ids([" Paris", 7], prompt).tolist() == [paris, 7]
    with pytest.raises(ValueError, match="3 tokens were given for the 2 rows"):
        token_ids([1, 2, 3], prompt)
