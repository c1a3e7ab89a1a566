"""What hook points show beside what forward hooks on transformers' modules show."""

import pytest
import torch

LAYERS = 5
MODULES = {  # our hook point of a layer -> transformers' module of the layer
    "resid_post": "",
    "self_attn.out": ".self_attn",
    "feed_forward.out": ".feed_forward",
}
ROUTED = {
    "feed_forward.router.logits": ".feed_forward.router",
    "feed_forward.shared_expert.hidden": ".feed_forward.shared_expert.down_proj",
}


def first(x):
    return x[0] if isinstance(x, tuple) else x


@torch.no_grad()
def activations(ours, theirs, ids) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of a hook point -> (our tensor, transformers' tensor in the same shape)."""
    seen, expected, handles = {}, {}, []
    pairs = {"embed": "model.embed_tokens", "final_norm": "model.norm", "logits": "lm_head"}
    for layer in range(LAYERS):
        routed = ROUTED if layer in ours.config.moe_layers else {}
        for name, path in (MODULES | routed).items():
            pairs[f"layers.{layer}.{name}"] = f"model.layers.{layer}{path}"
    for name, path in pairs.items():

        def keep(module, args, x, name=name):
            seen[name] = x

        def keep_theirs(module, args, x, name=name):
            if name.endswith(".hidden"):
                x = args[0]
            expected[name] = (x[1] if name.endswith("router.logits") else first(x)).clone()

        handles.append(ours.hook_points().module(name).register_forward_hook(keep))
        handles.append(theirs.get_submodule(path).register_forward_hook(keep_theirs))
    ours(ids)
    theirs(ids)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(expected) == set(pairs)
    return {name: (seen[name], expected[name].reshape(seen[name].shape)) for name in pairs}


@pytest.mark.parametrize("length", [8, 30])
@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 2, "interleave_moe_layer_step": 1}], ids=str)
def test_activations_of_every_layer_equal_those_of_transformers(changes, length, text_twins, random_ids):
    ours, theirs = text_twins(**changes)
    for mine, other in activations(ours, theirs, random_ids(2, length)).values():
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [8, 30])
@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 2, "interleave_moe_layer_step": 1}], ids=str)
def test_bfloat16_activations_equal_those_of_transformers_to_the_bit(changes, length, text_twins, random_ids):
    ours, theirs = text_twins(dtype=torch.bfloat16, **changes)
    ours.attn = "sdpa"
    pairs = activations(ours, theirs, random_ids(2, length))
    assert [name for name, (mine, other) in pairs.items() if not torch.equal(mine, other)] == []


@torch.no_grad()
def test_patterns_equal_the_attention_weights_of_transformers(text_twins, random_ids):
    ours, theirs = text_twins()
    theirs.set_attn_implementation("eager")
    ids = random_ids(2, 30)
    patterns = ours(ids, output_attentions=True).attentions
    expected = theirs(ids, output_attentions=True).attentions
    assert len(patterns) == len(expected) == LAYERS
    for mine, other in zip(patterns, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_expert_indices_and_gates_are_the_choices_of_transformers(text_twins, random_ids):
    ours, theirs = text_twins(num_experts_per_tok=2)
    ids, seen, handles = random_ids(2, 30), {}, []
    for model, path in ((ours, "router.indices"), (ours, "router.gates"), (theirs, "router")):
        module = model.model.layers[3].feed_forward.get_submodule(path)
        key = path if model is ours else "scores"
        handles.append(module.register_forward_hook(lambda module, args, x, key=key: seen.update({key: first(x)})))
    ours(ids)
    theirs(ids)
    scores = torch.zeros(2, 30, 4).scatter(-1, seen["router.indices"], seen["router.gates"])
    torch.testing.assert_close(scores.flatten(0, 1), seen["scores"], atol=1e-6, rtol=0)
