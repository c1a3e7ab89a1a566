"""Cosines of experts, against experts that are copies, mirror images or at right angles."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import numpy as np
import pytest
import torch

from llama4lab.run.corpus.counting import routing_stats
from llama4lab.run.recording import record
from llama4lab.tables.routing.likeness import similarity

AT = ["layers.*.feed_forward.router.*", "layers.*.feed_forward.experts.out"]


def matrix(table, layer):
    own = table[table["layer"] == layer]
    return own.pivot(index="expert", columns="other", values="cosine").to_numpy()


def test_planted_experts_are_at_right_angles_by_router_writes_and_weights(planted_run):
    model, run = planted_run()
    for table in (similarity(model), similarity(run, "activation"), similarity(model, "weights", layers=0)):
        np.testing.assert_allclose(matrix(table, 0), np.eye(4), atol=1e-6)


def test_logits_are_compared_over_the_tokens_that_are_no_padding(planted_run):
    _, run = planted_run()
    real = run.prompt.attention_mask.bool()
    z = run["layers.1.feed_forward.router.logits"][real].double().numpy()
    expected = z.T @ z / np.linalg.norm(z, axis=0) / np.linalg.norm(z, axis=0)[:, None]
    np.testing.assert_allclose(matrix(similarity(run, "logits"), 1), expected)


@torch.no_grad()
def test_order_and_mirrored_signs_of_neurons_make_no_difference(new_text_model):
    model = new_text_model()
    experts = model.text.layers[1].feed_forward.experts
    d_ff = experts.down_proj.shape[1]
    order = torch.randperm(d_ff)
    sign = torch.where(torch.rand(d_ff) < 0.5, -1.0, 1.0)
    gate, up = experts.gate_up_proj[0].chunk(2, dim=-1)
    experts.gate_up_proj[1] = torch.cat([gate[:, order], (up * sign)[:, order]], dim=-1)
    experts.down_proj[1] = (experts.down_proj[0] * sign[:, None])[order]
    cosine = matrix(similarity(model, "weights", layers=1), 1)
    assert cosine[0, 1] == pytest.approx(1, abs=1e-5)
    assert (cosine[0, 2:] < 0.5).all()
    np.testing.assert_allclose(cosine, cosine.T)


def test_experts_without_tokens_have_no_cosine(planted_model):
    model = planted_model()
    cosine = matrix(similarity(record(model, [[10, 20]], at=AT), "activation"), 0)
    assert np.isnan(cosine[2]).all()
    assert cosine[0, 0] == pytest.approx(1)


def test_statistics_of_a_corpus_give_what_a_run_gives(new_text_model, random_ids):
    model = new_text_model(num_experts_per_tok=2)
    ids = random_ids(1, 12).tolist()
    stats = routing_stats(model, [model.prompt(ids)], progress=False)
    one, other = similarity(record(model, ids, at=AT), "activation"), similarity(stats, "activation")
    np.testing.assert_allclose(one["cosine"], other["cosine"], atol=1e-4)


def test_the_model_may_come_beside_a_run(planted_run):
    model, run = planted_run()
    assert similarity(run, "router", model=model).equals(similarity(model, "router"))
    with pytest.raises(TypeError, match="pass the model"):
        similarity(run, "router")
    with pytest.raises(TypeError, match="pass a run"):
        similarity(model, "logits")
    with pytest.raises(ValueError, match="Layer"):
        similarity(run, "logits", layers=7)
