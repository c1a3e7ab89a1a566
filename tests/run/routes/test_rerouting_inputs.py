"""What cannot be rerouted, and what the messages say."""

from typing import Any

import pytest
import torch

import llama4lab as lab
from llama4lab.run.routes.rerouting import rerouted

ROWS = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
ROUTER = "layers.*.feed_forward.router.*"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "No change was asked for; rerouted takes ban"),
        ({"layers": 2, "ban": 0}, "in layer 2; the layers with a router are 1, 3"),
        ({"layers": [], "ban": 0}, "in layer none"),
        ({"ban": {0: [1]}}, "in layer 0; the layers with a router are 1, 3"),
        ({"ban": {1: [1]}, "layers": 3}, r"names layer 1, but layers=\[3\]"),
        ({"ban": 4}, "ban holds expert 4; the model has experts 0 to 3"),
        ({"ban": [-1]}, "ban holds expert -1"),
        ({"ban": [1, 1]}, "names an expert twice"),
        ({"ban": [0, 1, 2]}, '(?s)3 of 4 experts were banned in layer 1, but a token goes to 2.*only="shared"'),
        ({"ban": [0], "top_k": 4}, "1 of 4 experts were banned"),
        ({"ban": [0], "prefer": [0]}, "both banned and preferred"),
        ({"ban": [0], "force": [0]}, "both banned and forced"),
        ({"prefer": {1: float("nan")}}, "biases are finite"),
        ({"force": [0, 1, 2]}, "(?s)names 3 experts, but a token goes to 2.*top_k"),
        ({"force": []}, "names 0 experts"),
        ({"force": torch.zeros(1, 7, 2, dtype=torch.long)}, "same expert in two slots"),
        ({"force": torch.ones(1, 7, 1, dtype=torch.long)}, r"whole numbers of shape \[batch, seq, 2\]"),
        ({"force": torch.rand(1, 7, 2)}, "whole numbers"),
        ({"force": torch.tensor([[[1, 9]]])}, "holds experts 1 to 9"),
        ({"swap": (0, 1, 2)}, "two experts that trade places"),
        ({"swap": {0: 1}}, "(?s)one of them twice, as it has 2 slots.*permutation"),
        ({"top_k": 0}, "top_k=0 was asked for; the model has 4 experts, so 1 to 4"),
        ({"top_k": 5}, "so 1 to 4"),
        (
            {"top_k": 3, "positions": [1]},
            r"(?s)3 slots instead of 2 .*\[1\].*leave positions",
        ),
        ({"gate": "mine"}, "'own', 'original', a number or a function"),
        ({"gate": -0.5}, "not below 0"),
        ({"gate": float("inf")}, "a gate is a number"),
        ({"gate": [0.5]}, "of type list"),
        ({"only": "both"}, "'shared' or 'routed'"),
        ({"replay": "run"}, "takes a Run, a RoutedExperts"),
        ({"force": 1, "swap": (0, 1)}, "(?s)force and swap were asked for together.*one block into another"),
        ({"ban": 1, "swap": (0, 1)}, "swap and ban were asked for together"),
        ({"ban": 1, "force": torch.tensor([[[1, 0]]])}, "force and ban were asked for together"),
        ({"positions": "last", "ban": 0}, "only 'new' has one"),
    ],
)
def test_changes_without_a_meaning_are_refused_before_anything_runs(small, changes: dict[str, Any], message):
    with pytest.raises(ValueError, match=message), rerouted(small, **changes):
        pass


def test_changes_that_do_not_fit_the_pass_or_the_model_are_refused(small, tiny, new_text_model):
    run = lab.record(small, [ROWS[0]], at=ROUTER)
    for other in ("force", "top_k", "prefer"):
        with pytest.raises(ValueError, match=f"replay and {other}|{other} and replay"):  # noqa: SIM117
            with rerouted(small, replay=run, **dict[str, Any]({other: 1})):
                pass
    with pytest.raises(ValueError, match=r"does not have layers\.1.*indices"):  # noqa: SIM117
        with rerouted(small, replay=lab.record(small, [ROWS[0]], at="layers.*.resid_post")):
            pass
    with (
        pytest.raises(ValueError, match=r"force has shape \[1, 4, 2\]; the prompt is 1 x 7"),
        rerouted(small, force=torch.tensor([0, 1]).expand(1, 4, 2)),
    ):
        lab.record(small, [ROWS[0]])
    with (
        pytest.raises(ValueError, match=r"gates returned \[1, 7\]; they have shape \[1, 7, 2\]"),
        rerouted(small, gate=lambda gates: gates[..., 0]),
    ):
        lab.record(small, [ROWS[0]])
    with (
        pytest.raises(ValueError, match=r"router of layer 1 was given .* by itself"),
        rerouted(small, layers=1, ban=0),
    ):
        small.text.layers[1].feed_forward(torch.zeros(1, 2, 64))
    dense = new_text_model(moe_layers=[])
    with pytest.raises(ValueError, match="are none"), rerouted(dense, only="shared"):
        pass
    with (
        pytest.raises(TypeError, match="does not know 'bans'; it takes ban, prefer"),
        rerouted(small, **dict[str, Any](bans=1)),
    ):
        pass


def test_a_block_that_reroutes_nothing_is_an_error(small):
    with pytest.raises(RuntimeError, match="no pass of the model ran"), rerouted(small, ban=0):
        pass
    for positions, message in ((20, "No token was rerouted: .* positions 0 to 6"), ("new", "(?s)No token.*generation")):
        with pytest.raises(RuntimeError, match=message), rerouted(small, ban=0, positions=positions):
            lab.record(small, [ROWS[0]])
