"""What attribution does to the model: nothing that stays, whatever the state of the model."""

import pytest
import torch
from accelerate import cpu_offload

import llama4lab as lab
from llama4lab.run.attribution import attribute
from llama4lab.run.metrics import log_prob, logit_diff
from llama4lab.run.recording import record
from llama4lab.run.routes.freeze import frozen_routing

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
NAMES = logit_diff(" Mary", " John")
AT = ["layers.3.resid_mid", "layers.3.feed_forward.router.*", "layers.2.self_attn.q", "layers.5.feed_forward.out"]


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("trainable", [True, False])
def test_parameters_and_hooks_are_left_as_they_were(new_text_model, random_ids, trainable):
    model = new_text_model(dtype=torch.bfloat16).requires_grad_(trainable)
    model.model.norm.weight.requires_grad_(not trainable)
    before = [parameter.requires_grad for parameter in model.parameters()]
    own = attribute(
        *(model, random_ids(2, 6, seed=1), random_ids(2, 6, seed=2)), at="layers.*.**", metric=log_prob(3), steps=2
    )
    assert all(torch.isfinite(own[name]).all() and own[name].dtype == torch.float32 for name in own.names)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_metric_leaves_the_model_as_it_was(tiny):
    def failing(logits):
        raise KeyboardInterrupt

    before = [parameter.requires_grad for parameter in tiny.parameters()]
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny, CLEAN, CORRUPTED, at="layers.*.resid_post", metric=failing)
    assert [parameter.requires_grad for parameter in tiny.parameters()] == before
    assert not any(module._forward_hooks for module in tiny.modules())


@pytest.mark.parametrize("steps", [1, 2])
def test_an_offloaded_model_gives_the_same_estimates(tiny, steps):
    offloaded = lab.load()
    prompts = offloaded.prompt(CLEAN), offloaded.prompt(CORRUPTED)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    own = attribute(tiny, *prompts, at=AT, metric=NAMES, steps=steps)
    away = attribute(offloaded, *prompts, at=AT, metric=NAMES, steps=steps)
    for name in own.names:
        torch.testing.assert_close(away[name], own[name])
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_every_attention_kernel_gives_the_same_estimates(tiny, kernel):
    own = attribute(tiny, CLEAN, CORRUPTED, at=AT, metric=NAMES)
    before = tiny.attn
    try:
        tiny.attn = kernel
        other = attribute(tiny, CLEAN, CORRUPTED, at=AT, metric=NAMES)
    finally:
        tiny.attn = before
    for name in own.names:
        torch.testing.assert_close(other[name], own[name], atol=1e-3, rtol=1e-3)


def test_where_routing_is_frozen_no_router_has_an_effect(tiny):
    with frozen_routing(tiny, record(tiny, CORRUPTED, at="layers.*.feed_forward.router.*")):
        own = attribute(tiny, CLEAN, CORRUPTED, at="layers.*.feed_forward.router.*", metric=NAMES, steps=2)
    assert all((own[name] == 0).all() for name in own.names)


def test_only_what_is_asked_for_has_a_graph(tiny):
    """Below the first hook point that is asked for, nothing requires a gradient."""
    seen = {}
    with lab.patched(tiny, {f"layers.{i}.resid_mid": _noting(seen, i) for i in (1, 6)}):
        attribute(tiny, CLEAN, CORRUPTED, at="layers.5.resid_post", metric=NAMES)
    assert seen[1] == [False, False]
    assert seen[6] == [False, True]


def _noting(seen, layer):
    def note(x):
        seen.setdefault(layer, []).append(x.requires_grad)
        return x

    return note
