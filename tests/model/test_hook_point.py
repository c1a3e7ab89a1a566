"""What a hook point is, and what the tensors that pass through the hook points of a layer mean."""

from functools import partial

import pytest
import torch

from llama4lab.model.hook_point import HookPoint

LAYERS, MOE_LAYERS = 5, (1, 3)


@pytest.fixture(scope="module", params=[1, 2], ids=["top-1", "top-2"])
def model(request, new_text_model):
    return new_text_model(num_experts_per_tok=request.param)


@pytest.fixture(scope="module")
def ids(random_ids):
    return random_ids(2, 15)


@torch.no_grad()
def run(model, ids, hooks: dict, **asked) -> torch.Tensor:
    """The logits of a pass in which each named hook point has a torch hook `(module, args, output)`."""
    handles = [model.hook_points().module(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        return model(ids, **asked).logits
    finally:
        for handle in handles:
            handle.remove()


def hooks_left(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_with_nothing_attached_a_hook_point_gives_back_the_very_tensor(monkeypatch):
    point, x = HookPoint("batch seq"), torch.ones(2, 3)
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # a call of the module machinery would fail
    assert point(x) is x


def test_a_replaced_forward_of_one_instance_is_used():
    """So do nnsight and accelerate."""
    point = HookPoint("batch seq")
    vars(point)["forward"] = lambda x: x + 1
    assert torch.equal(point(torch.zeros(2)), torch.ones(2))


def test_a_hook_point_is_watched_as_long_as_a_hook_of_any_kind_is_attached():
    point = HookPoint("batch seq", lazy=True)
    for register in (
        point.register_forward_hook,
        point.register_forward_pre_hook,
        point.register_full_backward_hook,
        point.register_full_backward_pre_hook,
    ):
        assert not point.watched
        with register(lambda *args: None):
            assert point.watched
    assert not point.watched


def test_a_hook_point_says_its_shape():
    assert repr(HookPoint("batch head query key", lazy=True)) == "HookPoint(batch head query key, lazy)"


def test_the_catalogue_shows_one_line_a_family(model):
    lines = repr(model.hook_points()).splitlines()
    assert lines[0] == f"{len(model.hook_points())} hook points"
    pattern = [line for line in lines if "self_attn.pattern" in line]
    assert len(pattern) == 1
    assert "batch head query key" in pattern[0]
    assert "lazy; 5 layers" in pattern[0]
    assert model.hook_points()._repr_html_().count("<tr>") == len(lines)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_scores_and_pattern_obey_edits_by_meaning(layer, model, ids):
    """A pattern, or scores, that let each token see only itself give every head the value of its own token."""
    kept, itself = {}, torch.eye(15)
    for name, edit in {"scores": itself.log(), "pattern": itself}.items():
        hooks = {
            f"layers.{layer}.self_attn.{name}": lambda module, args, x, edit=edit: edit.expand_as(x),
            f"layers.{layer}.self_attn.v": lambda module, args, x: kept.update(v=x),
            f"layers.{layer}.self_attn.z": lambda module, args, x: kept.update(z=x),
        }
        run(model, ids, hooks)
        torch.testing.assert_close(kept["z"], kept["v"].repeat_interleave(2, dim=2))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_head_of_a_pattern_can_be_edited_alone(layer, model, ids):
    kept = {}

    def silence(module, args, x):
        x = x.clone()
        x[:, 2] = 0
        return x

    hooks = {
        f"layers.{layer}.self_attn.pattern": silence,
        f"layers.{layer}.self_attn.z": lambda module, args, x: kept.update(z=x),
    }
    run(model, ids, hooks)
    assert torch.equal(kept["z"][:, :, 2], torch.zeros(2, 15, 16))
    assert (kept["z"][:, :, [0, 1, 3]].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_parts_add_up(layer, model, ids):
    """Heads sum to the attention's output, experts and shared expert to the MLP's, both to the residual stream."""
    seen = {}
    names = [name for name in model.hook_points() if name.startswith(f"layers.{layer}.")]
    run(model, ids, {name: lambda m, a, x, name=name: seen.update({name.split(".", 2)[2]: x}) for name in names})
    assert_close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    assert_close(seen["self_attn.head_out"].sum(-2), seen["self_attn.out"])
    assert_close(seen["resid_pre"] + seen["self_attn.out"], seen["resid_mid"])
    assert_close(seen["resid_mid"] + seen["feed_forward.out"], seen["resid_post"])
    assert_close(seen["self_attn.scores"].softmax(-1), seen["self_attn.pattern"])
    if layer in MOE_LAYERS:
        routed = seen["feed_forward.experts.out"].sum(-2)
        assert_close(routed + seen["feed_forward.shared_expert.out"], seen["feed_forward.out"])
        top = seen["feed_forward.router.logits"].topk(seen["feed_forward.router.indices"].shape[-1])
        assert torch.equal(top.indices, seen["feed_forward.router.indices"])
        assert_close(top.values.sigmoid(), seen["feed_forward.router.gates"])


@pytest.mark.parametrize("layer", range(LAYERS))
def test_scores_are_products_of_the_rotated_queries_and_keys(layer, model, ids):
    seen = {}
    names = {f"layers.{layer}.self_attn.{name}": name for name in ("q_rot", "k_rot", "scores")}
    run(model, ids, {name: lambda m, a, x, short=short: seen.update({short: x}) for name, short in names.items()})
    keys = seen["k_rot"].repeat_interleave(2, dim=2)
    products = torch.einsum("bqhd,bkhd->bhqk", seen["q_rot"], keys) / 4
    visible = seen["scores"] > -torch.inf
    torch.testing.assert_close(seen["scores"][visible], products[visible], atol=1e-5, rtol=1e-5)


def test_head_out_holds_what_each_head_alone_would_write(model, ids):
    seen = {}

    def only_head_1(module, args, z):
        z = z.clone()
        z[:, :, [0, 2, 3]] = 0
        return z

    run(model, ids, {"layers.2.self_attn.head_out": lambda m, a, x: seen.update(parts=x)})
    hooks = {"layers.2.self_attn.z": only_head_1, "layers.2.self_attn.out": lambda m, a, x: seen.update(out=x)}
    run(model, ids, hooks)
    torch.testing.assert_close(seen["out"], seen["parts"][:, :, 1], atol=1e-5, rtol=0)


def test_head_out_leaves_the_bias_of_the_projection_to_the_sum(new_text_model, ids):
    model, seen = new_text_model(attention_bias=True), {}
    hooks = {
        f"layers.0.self_attn.{name}": lambda m, a, x, name=name: seen.update({name: x}) for name in ("head_out", "out")
    }
    run(model, ids, hooks)
    bias = model.text.layers[0].self_attn.o_proj.bias
    torch.testing.assert_close(seen["head_out"].sum(-2) + bias, seen["out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("failing", ["embed", "layers.2.self_attn.pattern", "layers.3.feed_forward.router.logits"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_exception_inside_the_pass_leaves_no_hook_and_the_same_numbers(failing, error, model, ids):
    def fail(module, args, x):
        raise error("from the user's hook")

    plain = run(model, ids, {})
    asked = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
    with pytest.raises(error):
        run(model, ids, {failing: fail}, **asked)
    assert hooks_left(model) == 0
    assert torch.equal(run(model, ids, {}), plain)


def test_gradients_arrive_at_hook_points(model, ids):
    grads = {}
    point = model.hook_points().module("layers.1.feed_forward.shared_expert.out")
    with point.register_full_backward_hook(lambda module, grad_in, grad_out: grads.update(out=grad_out[0])):
        model(ids).logits.sum().backward()
    model.zero_grad()
    assert grads["out"].shape == (2, 15, 64)
    assert grads["out"].abs().sum() > 0


@pytest.mark.parametrize("name", ["scores", "pattern"])
def test_gradients_flow_through_the_steps_of_attention(name, model, ids):
    """The gradient of a pattern entry is what moving it does."""
    kept = []

    def keep(module, args, x):
        x.retain_grad()
        kept.append(x)

    with model.hook_points().module(f"layers.0.self_attn.{name}").register_forward_hook(keep):
        model(ids).logits[0, 6].sum().backward()
    model.zero_grad()
    assert kept[0].grad is not None
    assert kept[0].grad[0, :, 6, :7].abs().sum() > 0
    assert kept[0].grad[1].abs().sum() == 0
