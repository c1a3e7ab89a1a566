"""What `output_...=True` returns is what the pass computed, whichever kernel runs and whoever else has hooks."""

import pytest
import torch

LAYERS = 5
KERNELS = ["auto", "sdpa", "eager"]


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(autouse=True)
def _auto(model):
    model.attn = "auto"


@pytest.fixture
def ids(random_ids):
    return random_ids(2, 20)


@torch.no_grad()
def run(model, ids, hooks=None, **asked):
    handles = [model.hook_points().module(name).register_forward_hook(hook) for name, hook in (hooks or {}).items()]
    try:
        return model(ids, **asked)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kernel", KERNELS)
def test_attentions_are_truthful_under_every_kernel(kernel, model, ids):
    """N5: transformers returns an empty tuple under sdpa."""
    model.attn = kernel
    output = run(model, ids, output_attentions=True)
    assert len(output.attentions) == LAYERS
    for layer, pattern in enumerate(output.attentions):
        assert pattern.shape == (2, 4, 20, 20)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 20))
        position = torch.arange(20)
        visible = position[None, :] <= position[:, None]
        if layer != 3:
            visible &= position[None, :] // 8 == position[:, None] // 8
        assert ((pattern > 0) == visible).all()
    torch.testing.assert_close(output.logits, run(model, ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_hidden_states_are_the_input_of_every_layer_and_the_normed_output(kernel, model, ids):
    model.attn = kernel
    seen = {}
    names = [f"layers.{i}.resid_pre" for i in range(LAYERS)] + ["final_norm"]
    hooks = {name: lambda m, a, x, i=i: seen.update({i: x}) for i, name in enumerate(names)}
    output = run(model, ids, hooks, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    assert all(torch.equal(output.hidden_states[i], seen[i]) for i in range(LAYERS + 1))
    assert torch.equal(output.hidden_states[0], model.text.embed_tokens(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


def test_the_residual_stream_of_the_last_layer_can_be_read_before_the_norm(model, ids):
    """N9: transformers returns it nowhere."""
    seen = []
    output = run(
        model, ids, {f"layers.{LAYERS - 1}.resid_post": lambda m, a, x: seen.append(x)}, output_hidden_states=True
    )
    assert torch.equal(model.text.norm(seen[0]), output.hidden_states[-1])
    assert not torch.equal(seen[0], output.hidden_states[-1])


def test_router_logits_are_one_table_a_layer_with_experts(model, ids):
    """transformers#48889: there, a tuple of flattened tables whose layers are not said."""
    seen = {}
    hooks = {
        f"layers.{i}.feed_forward.router.logits": lambda m, a, x, i=i: seen.update({i: x})
        for i in model.config.moe_layers
    }
    router_logits = run(model, ids, hooks, output_router_logits=True).router_logits
    assert list(router_logits) == [1, 3]
    for layer, table in router_logits.items():
        assert table.shape == (2, 20, 4)
        assert torch.equal(table, seen[layer])


def test_what_the_config_asks_for_is_returned(new_text_model, ids):
    output = run(new_text_model(output_router_logits=True), ids)
    assert set(output.router_logits) == {1, 3}


def test_what_nobody_asked_for_is_none(model, ids):
    output = run(model, ids)
    assert (output.attentions, output.hidden_states, output.router_logits, output.loss) == (None,) * 4


@pytest.mark.parametrize("moment", ["before", "after"])
def test_returned_tensors_show_edits_of_hooks_whenever_they_were_set(moment, model, ids):
    """N8: in transformers a hook set after the first such call is not seen in the entry of its layer."""
    if moment == "after":
        run(model, ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    edits = {
        "layers.2.resid_pre": lambda m, a, x: x + 1,
        "layers.2.self_attn.pattern": lambda m, a, x: x.roll(1, -1),
        "layers.3.feed_forward.router.logits": lambda m, a, x: -x,
    }
    seen = {}
    hooks = {name: lambda m, a, x, name=name: seen.setdefault(name, edits[name](m, a, x)) for name in edits}
    output = run(model, ids, hooks, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert torch.equal(output.hidden_states[2], seen["layers.2.resid_pre"])
    assert torch.equal(output.attentions[2], seen["layers.2.self_attn.pattern"])
    assert torch.equal(output.router_logits[3], seen["layers.3.feed_forward.router.logits"])


def test_no_hook_stays_after_outputs_were_asked_for(model, ids):
    """N8: transformers leaves 24."""
    run(model, ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_outputs_of_a_decoding_step_are_of_that_step(model, ids):
    cache = run(model, ids[:, :18], use_cache=True).cache
    output = run(model, ids[:, 18:], cache=cache, output_attentions=True, output_hidden_states=True)
    full = run(model, ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 2, 64)] * (LAYERS + 1)
    # The NoPE layer attends to all 20 tokens, a chunked one to those that its cache gave.
    torch.testing.assert_close(output.attentions[3], full.attentions[3][:, :, 18:], atol=1e-5, rtol=0)
    held = output.attentions[0].shape[-1]
    torch.testing.assert_close(output.attentions[0], full.attentions[0][:, :, 18:, 20 - held :], atol=1e-5, rtol=0)


def test_generation_returns_them_for_every_step(model, ids):
    asked = {"max_new_tokens": 4, "return_dict_in_generate": True, "do_sample": False}
    output = model.generate(ids, output_hidden_states=True, output_attentions=True, output_logits=True, **asked)
    assert len(output.hidden_states) == len(output.attentions) == len(output.logits) == 4
    assert [step[0].shape[1] for step in output.hidden_states] == [20, 1, 1, 1]


@pytest.mark.parametrize("kept", [1, 5, torch.tensor([0, 7, 19])], ids=["last", "last five", "an index"])
def test_logits_to_keep_are_those_of_the_whole_pass(kept, model, ids):
    whole = run(model, ids).logits
    expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
    torch.testing.assert_close(run(model, ids, logits_to_keep=kept).logits, expected, atol=1e-5, rtol=0)


def test_a_tuple_is_returned_where_one_is_asked_for(model, ids):
    output = run(model, ids, return_dict=False, labels=ids)
    assert isinstance(output, tuple)
    assert torch.equal(output[1], run(model, ids).logits)
    torch.testing.assert_close(output[0], run(model, ids, labels=ids).loss)


def test_logits_have_the_dtype_of_the_model(new_text_model, ids):
    """D13: as in transformers; Meta's code gives float32. `.float()` is a caller's choice."""
    for dtype in (torch.float32, torch.bfloat16):
        assert run(new_text_model(dtype=dtype), ids).logits.dtype == dtype


def test_outputs_of_the_model_with_vision_are_those_of_its_text_stack(new_model, image_batch):
    model, batch = new_model(), image_batch([[2], [1]])
    with torch.no_grad():
        output = model(**batch, output_attentions=True, output_hidden_states=True, output_router_logits=True)
    assert len(output.attentions) == LAYERS
    assert len(output.hidden_states) == LAYERS + 1
    assert set(output.router_logits) == {1, 3}
    assert output.image_hidden_states.shape == (3, 4, 40)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_that_was_set_is_the_kernel_that_is_told(kernel, model):
    model.attn = kernel
    assert model.attn == kernel


def test_an_unknown_kernel_is_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match=r"'flash'.*auto, sdpa, eager"):
        model.attn = "flash"
