"""Known faults of other Llama 4 code about decoding, experts and hooks, absent here.

Each docstring says where it went wrong.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


def point(model, name: str):
    return model.hook_points().module(name)


@torch.no_grad()
@pytest.mark.parametrize("prefill", [1, 5, 7, 8, 9, 16, 20])
def test_steps_of_one_token_stay_in_their_chunk(prefill, model, random_ids):
    """D1: with Meta's cache, such a step attends to everything: logits off by up to 9 from the second chunk on."""
    ids, seen = random_ids(1, 30), []
    cache = model(ids[:, :prefill], use_cache=True).cache
    with point(model, "layers.0.self_attn.pattern").register_forward_hook(lambda m, a, x: seen.append(x)):
        steps = [model(ids[:, at : at + 1], cache=cache).logits for at in range(prefill, 30)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits[:, prefill:], atol=1e-5, rtol=0)
    for at, pattern in zip(range(prefill, 30), seen, strict=True):
        assert (pattern[0, 0, 0] > 0).sum() == at % 8 + 1


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(4,), (10,), (6, 9), (3, 19), (7, 8), (8, 16), (1, 2)])
def test_a_cache_goes_on_with_several_tokens(cuts, model, random_ids):
    """D1b: Meta's mask is as long as the pass, without the cache: RuntimeError."""
    ids, cache, pieces = random_ids(2, 25), None, []
    for piece in torch.tensor_split(ids, cuts, dim=1):
        output = model(piece, cache=cache, use_cache=True)
        cache = output.cache
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_ragged_rows_with_images_are_embedded_whole(new_model, image_batch):
    """D10: Meta's generation embeds images only up to the shortest prompt of the batch."""
    model, batch, seen = new_model(), image_batch([[1], [5]]), []
    with point(model, "embed_merged").register_forward_hook(lambda m, a, x: seen.append(x)):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    features = model.multi_modal_projector(model.vision(batch["pixel_values"])).flatten(0, 1)
    torch.testing.assert_close(seen[0][batch["input_ids"] == 127], features)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"num_local_experts": 4}, {"num_local_experts": 7, "num_experts_per_tok": 2}])
def test_a_layer_of_experts_gives_the_sum_that_its_definition_says(changes, new_text_model):
    """transformers#40609 (scores not transposed), vllm#16744, sglang#7889 (gate on the output)."""
    layer = new_text_model(**changes).text.layers[1].feed_forward
    x = torch.randn(2, 5, 64)
    out = layer(x)
    for row in range(2):
        for at in range(5):
            token = x[row, at]
            scores = layer.router.weight @ token
            total = layer.shared_expert(token[None, None])[0, 0]
            for expert in scores.topk(changes.get("num_experts_per_tok", 1)).indices:
                scaled = token * scores[expert].sigmoid()
                gate, up = (scaled @ layer.experts.gate_up_proj[expert]).chunk(2)
                total = total + (up * gate * gate.sigmoid()) @ layer.experts.down_proj[expert]
            torch.testing.assert_close(out[row, at], total, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_chooses_its_experts_whatever_the_other_tokens_choose(model):
    """llama-models#299: the docstring there speaks of expert choice; it is token choice, without capacity."""
    layer, x = model.text.layers[1].feed_forward, torch.randn(1, 6, 64)
    crowd = torch.cat([x, x[:, :1].expand(1, 40, 64)], 1)
    torch.testing.assert_close(layer(crowd)[:, :6], layer(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_no_tensor_is_as_large_as_all_experts_on_all_tokens(new_text_model, random_ids):
    """transformers#37325: every expert computes every token; 34 GB a layer for Maverick at 8,192 tokens."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in weights:
                    self.numel = max(self.numel, x.numel())
            return result

    model = new_text_model(num_local_experts=64, interleave_moe_layer_step=1, num_hidden_layers=2)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with Largest() as largest:
        model(random_ids(1, 128), use_cache=False)
    assert largest.numel < 64 * 128 * 64 / 8


def test_the_output_of_the_shared_expert_is_not_overwritten(model, random_ids):
    """N7, nnsight#630: transformers adds the routed experts into it; who saved it without a copy reads the sum."""
    seen, copies = {}, {}

    def keep(name):
        def hook(module, args, x):
            seen[name], copies[name] = x, x.clone()

        return hook

    names = ["shared_expert.out", "experts.out", "out"]
    handles = [point(model, f"layers.1.feed_forward.{name}").register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(random_ids(2, 9))
    for handle in handles:
        handle.remove()
    assert all(torch.equal(seen[name], copies[name]) for name in names)
    torch.testing.assert_close(seen["out"], seen["shared_expert.out"] + seen["experts.out"].sum(-2))


def test_a_tensor_that_a_user_patches_in_is_not_written_to(model, random_ids):
    """N7: in transformers it is, and a leaf that needs a gradient raises."""
    patch = torch.randn(2, 9, 64, requires_grad=True)
    before = patch.detach().clone()
    with point(model, "layers.1.feed_forward.shared_expert.out").register_forward_hook(lambda m, a, x: patch):
        model(random_ids(2, 9)).logits.sum().backward()
    model.zero_grad()
    assert torch.equal(patch.detach(), before)
    assert patch.grad is not None
    assert patch.grad.abs().sum() > 0


def test_full_backward_hooks_work_on_every_module(model, random_ids):
    """N7: on the shared expert of transformers they raise, for the addition in place."""
    called, ids = set(), random_ids(2, 9)
    handles = [
        module.register_full_backward_hook(lambda m, gi, go, name=name: called.add(name))
        for name, module in model.named_modules()
        if "layers." in name and not name.endswith(("router", "router.indices"))  # these give whole numbers
    ]
    model(ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    assert "model.layers.1.feed_forward.shared_expert" in called
    assert "model.layers.3.self_attn.pattern" in called


def test_every_module_output_keeps_batch_and_sequence(model, random_ids):
    """N10: in transformers dense layers give a tensor, layers of experts a tuple of flattened ones."""
    shapes, handles = {}, []
    for layer in range(5):
        for name in ("", ".self_attn", ".feed_forward"):
            module = model.get_submodule(f"model.layers.{layer}{name}")
            key = f"{layer}{name}"
            handles.append(module.register_forward_hook(lambda m, a, x, key=key: shapes.update({key: tuple(x.shape)})))
    with torch.no_grad():
        model(random_ids(2, 9))
    for handle in handles:
        handle.remove()
    assert set(shapes.values()) == {(2, 9, 64)}
    assert len(shapes) == 15


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3])
def test_step_by_step_attention_is_as_exact_as_the_fused_kernel_in_bfloat16(layer, new_text_model, random_ids):
    """N14: transformers softmaxes in bfloat16 there, and the logits move by up to 1.6 for looking at a pattern."""
    model, ids, seen = new_text_model(dtype=torch.bfloat16), random_ids(2, 30), {}

    def keep(name):
        return lambda m, a, x: seen.update({name: x})

    attention = f"layers.{layer}.self_attn"
    # The input of the layer is fixed, so that only this attention differs.
    entry = torch.randn(2, 30, 64, dtype=torch.bfloat16)
    for kernel in ("fused", "steps"):
        hooks = {f"layers.{layer}.resid_pre": lambda m, a, x: entry, f"{attention}.z": keep(kernel)}
        if kernel == "steps":
            hooks[f"{attention}.pattern"] = keep("pattern")
        handles = [point(model, name).register_forward_hook(hook) for name, hook in hooks.items()]
        model(ids)
        for handle in handles:
            handle.remove()
    assert seen["pattern"].dtype == torch.float32
    error = (seen["steps"].float() - seen["fused"].float()).abs()
    assert error.max() <= 2**-7 * seen["fused"].float().abs().max()  # a rounding of the result, not of the softmax


def test_the_same_input_gives_the_same_bits_again(model, random_ids):
    ids = random_ids(2, 40)
    with torch.no_grad():
        first = model(ids).logits
        assert all(torch.equal(model(ids).logits, first) for _ in range(5))


def test_two_models_of_unlike_size_do_not_share_tables(new_text_model, random_ids):
    ids = random_ids(1, 20)
    small, large = (
        new_text_model(),
        new_text_model(head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    )
    with torch.no_grad():
        before = small(ids).logits
        large(ids)
        assert torch.equal(small(ids).logits, before)
