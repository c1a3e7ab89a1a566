"""Experts by place against the recorded routers."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false

import pytest
import torch

import llama4lab as lab
from llama4lab.tables.vision import experts
from llama4lab.tables.vision.places import token_places

ROUTER = "layers.*.feed_forward.router.*"


def test_every_choice_is_the_router_s_at_the_place_of_the_token(new_model, small_prompt):
    """Two experts a token, dense layers between, padding, several images and tiles."""
    run = lab.record(new_model(num_experts_per_tok=2), small_prompt, at=ROUTER)
    table = experts(run)
    assert table["layer"].unique().tolist() == run.meta["moe_layers"] != list(range(5))
    for layer, own in table.groupby("layer"):
        where = [torch.tensor(own[name].to_numpy()) for name in ("row", "position", "slot")]
        for column, name in (("expert", "indices"), ("gate", "gates")):
            recorded = run[f"layers.{layer}.feed_forward.router.{name}"][*where]
            assert own[column].to_numpy() == pytest.approx(recorded.numpy())
    places = token_places(small_prompt)
    assert len(table) == len(places) * 2 * len(run.meta["moe_layers"])
    first = table.query("layer == @table.layer.min() and slot == 0").reset_index(drop=True)
    assert first[places.columns.tolist()].equals(places)
    assert table.attrs == {"num_experts": 4}


def test_margins_are_those_of_the_decisions(tiny, two_rows):
    run = lab.record(tiny, two_rows, at=ROUTER)
    both = experts(run).merge(lab.tables.routing.decisions(run), on=["row", "layer", "position", "slot"])
    assert both["margin_x"].tolist() == both["margin_y"].tolist()
    assert set(both["modality"]) == {"image"}


def test_an_edited_route_is_shown_as_it_was_taken(tiny, two_rows):
    with lab.patched(tiny, {"layers.5.feed_forward.router.indices": 2}):
        run = lab.record(tiny, two_rows, at=ROUTER)
    assert (experts(run).query("layer == 5")["expert"] == 2).all()


def test_routers_have_to_be_recorded(tiny, two_rows):
    with pytest.raises(KeyError, match="router"):
        experts(lab.record(tiny, two_rows, at="embed"))
