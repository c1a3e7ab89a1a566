"""Distances to the nearest border of a router, checked by going there."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import numpy as np
import pytest
import torch

from llama4lab.run.recording import record
from llama4lab.tables.routing.margins import flip_distance

AT = ["layers.*.feed_forward.router.*", "layers.*.resid_mid"]


@pytest.mark.parametrize("slots", [1, 2])
def test_going_that_far_flips_the_choice_and_a_little_less_does_not(new_text_model, random_ids, slots):
    model = new_text_model(num_experts_per_tok=slots)
    run = record(model, [random_ids(9).tolist(), [3, 4, 5]], at=AT)
    table = flip_distance(model, run)
    assert len(table) == 12 * table["layer"].nunique()
    for line in table.itertuples():
        block = model.text.layers[line.layer]
        weight = block.feed_forward.router.weight.detach().double()
        x = block.post_attention_layernorm(run[f"layers.{line.layer}.resid_mid"][line.row, line.position]).double()
        chosen = set(run[f"layers.{line.layer}.feed_forward.router.indices"][line.row, line.position].tolist())
        way = weight[line.nearest] - weight[line.expert]
        way = way / way.norm()
        there = [set((weight @ (x + s * line.distance * way)).topk(slots).indices.tolist()) for s in (0.99, 1.01)]
        assert there[0] == chosen
        assert there[1] == chosen - {line.expert} | {line.nearest}
        assert line.relative == pytest.approx(line.distance / x.norm().item(), rel=1e-5)


@pytest.mark.parametrize("slots", [1, 2])
def test_no_direction_flips_a_choice_sooner(new_text_model, random_ids, slots):
    model = new_text_model(num_experts_per_tok=slots)
    run = record(model, random_ids(1, 6).tolist(), at=AT)
    generator = torch.Generator().manual_seed(0)
    for line in flip_distance(model, run).itertuples():
        block = model.text.layers[line.layer]
        weight = block.feed_forward.router.weight.detach().double()
        x = block.post_attention_layernorm(run[f"layers.{line.layer}.resid_mid"][0, line.position]).double()
        chosen = set((weight @ x).topk(slots).indices.tolist())
        ways = torch.randn(500, len(x), generator=generator, dtype=torch.float64)
        ways = torch.cat([ways, (weight[:, None] - weight).flatten(0, 1)])
        ways = ways / ways.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        moved = ((x + 0.99 * line.distance * ways) @ weight.T).topk(slots).indices
        assert all(set(own) == chosen for own in moved.tolist())


def test_the_runner_up_need_not_be_the_nearest(planted_model):
    model = planted_model()
    with torch.no_grad():
        # Token 10 reads (2, 1, 0, 0): expert 1 is the runner-up, but expert 2 is far steeper.
        model.text.layers[0].feed_forward.router.weight[2, 20] = 100.0
    run = record(model, [[10]], at=AT)
    line = flip_distance(model, run).query("layer == 0").iloc[0]
    logits = run["layers.0.feed_forward.router.logits"][0, 0].double()
    assert logits.argsort(descending=True)[:2].tolist() == [0, 1]
    assert (line["expert"], line["nearest"]) == (0, 2)
    assert line["distance"] == pytest.approx((logits[0] / np.sqrt(2 * 0.1**2 + 100**2)).item())


def test_equal_rows_have_no_border_and_all_chosen_experts_no_other(planted_model):
    model = planted_model(num_experts_per_tok=4)
    table = flip_distance(model, record(model, [[10, 20]], at=AT))
    assert table[["expert", "nearest", "margin", "distance"]].isna().all().all()


def test_a_forced_token_has_a_negative_margin_and_no_distance(planted_run):
    model, run = planted_run()
    name = "layers.0.feed_forward.router.indices"
    forced = run[name].clone()
    forced[0, 0, 0] = 3
    table = flip_distance(model, type(run)({**run.tensors, name: forced}, run.shapes, run.logits, run.prompt, run.meta))
    line = table.iloc[0]
    assert (line["expert"], line["nearest"]) == (3, 0)
    assert line["margin"] < 0
    assert np.isnan(line["distance"])


def test_what_is_missing_is_asked_for(new_text_model):
    model = new_text_model()
    with pytest.raises(KeyError, match="logits"):
        flip_distance(model, record(model, [[5]], at="layers.*.feed_forward.router.indices"))
    with pytest.raises(KeyError, match="indices"):
        flip_distance(model, record(model, [[5]], at="layers.*.resid_mid"))
    table = flip_distance(model, record(model, [[5]], at=AT[0]))
    assert table["relative"].isna().all()
    other = new_text_model(num_local_experts=6)
    with pytest.raises(ValueError, match="6 experts"):
        flip_distance(other, record(model, [[5]], at=AT[0]))
