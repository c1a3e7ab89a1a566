"""Laws of attribution: where the estimate has to be the effect, it is."""

import pytest
import torch
from torch import nn

import llama4lab as lab
from llama4lab.run.attribution import attribute
from llama4lab.run.metrics import evaluated, log_prob, logit_diff, rank
from llama4lab.run.recording import record

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
NAMES = logit_diff(" Mary", " John")
ROUTER = "feed_forward.router"


def effects(model, clean, corrupted, name, metric):
    """True effects of patching single positions (and heads or slots) of the corrupted run, one run each."""
    clean, corrupted = (model.prompt(prompt) for prompt in (clean, corrupted))
    source = record(model, clean, at=name)[name]
    before = evaluated(metric, record(model, corrupted))
    words = model.hook_points()[name].split()[1:]
    counts = [n for word, n in zip(words, source.shape[1:], strict=True) if word in ("seq", "head", "slot", "patch")]
    found = torch.zeros(source.shape[0] if words[0] == "seq" else 1, *counts)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in counts)).reshape(-1, len(counts)).tolist():

        def put(x, place=(slice(None), *index)):
            x = x.clone()
            x[place] = source[place]
            return x

        with lab.patched(model, {name: put}):
            found[(slice(None), *index)] = evaluated(metric, record(model, corrupted)) - before
    return found


@pytest.fixture
def linear_head(new_text_model):
    """A model whose logits are linear in the last residual: without final norm. Every layer routes to two experts."""

    def make(**changes):
        model = new_text_model(interleave_moe_layer_step=1, num_hidden_layers=3, **changes)
        model.model.norm = nn.Identity()
        return model

    return make


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("name", ["logits", "final_norm"])
def test_where_the_metric_is_linear_the_estimate_is_the_effect(tiny, name):
    estimate = attribute(tiny, CLEAN, CORRUPTED, at=name, metric=NAMES)[name]
    torch.testing.assert_close(estimate, effects(tiny, CLEAN, CORRUPTED, name, NAMES), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("component", "top_k"),
    [
        *((f"{ROUTER}.logits", 1), (f"{ROUTER}.logits", 2), (f"{ROUTER}.indices", 2), (f"{ROUTER}.gates", 2)),
        *(("feed_forward.experts.out", 2), ("feed_forward.out", 1), ("resid_mid", 1), ("resid_mid", 2)),
        *(("resid_post", 1), ("self_attn.out", 2), ("self_attn.head_out", 1)),
    ],
)
def test_in_the_last_layer_the_jump_makes_the_estimate_exact(linear_head, random_ids, component, top_k):
    model, name = linear_head(num_experts_per_tok=top_k), f"layers.2.{component}"
    clean, corrupted = random_ids(2, 5, seed=1), random_ids(2, 5, seed=2)
    own = attribute(model, clean, corrupted, at=name, metric=logit_diff(3, 4))
    torch.testing.assert_close(
        own[name], effects(model, clean, corrupted, name, logit_diff(3, 4)), atol=2e-4, rtol=1e-3
    )
    if component in (f"{ROUTER}.logits", "resid_mid", "self_attn.out"):
        assert own.jump[name][:, -1].abs().max() > 0.01


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize(("layer", "kind"), [(2, "q"), (2, "k_rot"), (3, "k"), (3, "q_rot")])  # RoPE with norm; NoPE
def test_queries_and_keys_are_followed_through_the_softmax(tiny, layer, kind):
    name, z = f"layers.{layer}.self_attn.{kind}", f"layers.{layer}.self_attn.z"
    rows = [CLEAN, "The capital of France is"], [CORRUPTED, "The capital of Spain is"]
    base, source = record(tiny, rows[1], at=[name, z], grad=True), record(tiny, rows[0], at=name)
    evaluated(NAMES, base).sum().backward()
    tiny.zero_grad()
    slope, new = base[z].grad, base[name].detach()
    assert slope is not None
    estimate = attribute(tiny, *rows, at=name, metric=NAMES)[name]
    for position, head in ((-1, 0), (-1, 1), (-5, 0), (3, 1)):
        patch = new.clone()
        patch[:, position, head] = source[name][:, position, head]
        with lab.patched(tiny, {name: patch}):
            change = record(tiny, rows[1], at=z)[z] - base[z].detach()
        expected = (change * slope).sum((1, 2, 3))
        torch.testing.assert_close(estimate[:, position, head], expected, atol=1e-4, rtol=2e-3)
    assert estimate.abs().max() > 1e-3


def test_a_forced_expert_does_not_jump(linear_head, random_ids):
    model, name = linear_head(), f"layers.2.{ROUTER}.logits"
    clean, corrupted = random_ids(2, 5, seed=1), random_ids(2, 5, seed=2)
    with lab.patched(model, {f"layers.*.{ROUTER}.indices": 1}):
        own = attribute(model, clean, corrupted, at=name, metric=logit_diff(3, 4))
        truth = effects(model, clean, corrupted, name, logit_diff(3, 4))
    torch.testing.assert_close(own[name], truth, atol=2e-4, rtol=1e-3)


def test_a_change_of_route_that_no_slope_sees_is_estimated(linear_head, random_ids):
    """The gate of the old expert hardly moves, another expert takes over."""
    model, name = linear_head(), f"layers.2.{ROUTER}.logits"
    clean, corrupted = random_ids(8, 5, seed=1), random_ids(8, 5, seed=2)
    metric = logit_diff(3, 4)
    own = attribute(model, clean, corrupted, at=name, metric=metric)
    truth = effects(model, clean, corrupted, name, metric)[:, -1]
    error = {"first order": own.first_order[name], "estimate": own[name]}
    error = {part: (values[:, -1] - truth).norm() / truth.norm() for part, values in error.items()}
    assert error["estimate"] < 1e-3
    assert error["first order"] > 0.3


@pytest.mark.parametrize(
    "name",
    [
        *("embed_merged", "layers.0.resid_pre", "layers.1.resid_mid", "layers.2.resid_post", "layers.1.self_attn.z"),
        *("layers.0.self_attn.q", "layers.2.self_attn.k_rot", "layers.1.self_attn.v", "layers.3.self_attn.pattern"),
        *("layers.2.self_attn.scores", "layers.1.feed_forward.experts.hidden", "layers.0.feed_forward.hidden"),
        *("layers.3.feed_forward.shared_expert.hidden", f"layers.1.{ROUTER}.gates", f"layers.3.{ROUTER}.logits"),
    ],
)
def test_a_small_difference_has_the_effect_that_the_slope_tells(new_text_model, random_ids, name):
    model, ids, metric = new_text_model(num_experts_per_tok=2), random_ids(2, 7), log_prob(5)
    with torch.no_grad():  # token 91 is nearly token 90
        model.model.embed_tokens.weight[91] = model.model.embed_tokens.weight[90] + 0.002 * torch.randn(64)
    ids[:, 2] = 90
    near = torch.where(ids == 90, 91, ids)
    estimate = attribute(model, near, ids, at=name, metric=metric)[name].flatten(1).sum(1)
    with lab.patched(model, {name: record(model, near, at=name)[name]}):
        truth = evaluated(metric, record(model, ids))
    truth = truth - evaluated(metric, record(model, ids))
    assert truth.abs().max() > 1e-5
    assert (estimate - truth).abs().max() < 0.08 * truth.abs().max() + 2e-6


def test_the_heads_of_a_layer_sum_to_its_output(tiny):
    own = attribute(tiny, CLEAN, CORRUPTED, at=["layers.*.self_attn.head_out", "layers.*.self_attn.out"], metric=NAMES)
    z = attribute(tiny, CLEAN, CORRUPTED, at="layers.*.self_attn.z", metric=NAMES)
    for layer in range(8):
        head_out, out = (own.first_order[f"layers.{layer}.self_attn.{part}"] for part in ("head_out", "out"))
        torch.testing.assert_close(head_out.sum(-1), out, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(z[f"layers.{layer}.self_attn.z"], head_out, atol=1e-3, rtol=1e-3)


def test_shared_and_routed_experts_sum_to_the_output(tiny):
    own = attribute(tiny, CLEAN, CORRUPTED, at="layers.3.feed_forward.**", metric=NAMES)
    parts = own["layers.3.feed_forward.experts.out"].sum(-1) + own["layers.3.feed_forward.shared_expert.out"]
    torch.testing.assert_close(parts, own["layers.3.feed_forward.out"], atol=1e-3, rtol=1e-3)
    by_expert = own.by_expert["layers.3.feed_forward.experts.out"].sum(-1)
    torch.testing.assert_close(by_expert, own["layers.3.feed_forward.experts.out"].sum(-1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("into", ["clean", "corrupted"])
def test_with_many_steps_the_inputs_account_for_the_whole_difference(new_text_model, random_ids, into):
    model, metric = new_text_model(num_local_experts=1), logit_diff(3, 4)  # one expert: nothing can jump
    clean, corrupted = random_ids(3, 6, seed=1), random_ids(3, 6, seed=2)
    own = attribute(model, clean, corrupted, at="embed", metric=metric, into=into, steps=30)
    difference = (own.clean - own.corrupted) * (1 if into == "corrupted" else -1)
    torch.testing.assert_close(own.first_order["embed"].sum(1), difference, atol=0.02, rtol=0.01)


def test_the_direction_is_a_matter_of_names(tiny):
    one = attribute(tiny, CLEAN, CORRUPTED, at="layers.3.**", metric=NAMES, into="clean", steps=2)
    other = attribute(tiny, CORRUPTED, CLEAN, at="layers.3.**", metric=NAMES, steps=2)
    assert all(torch.equal(one[name], other[name]) for name in one.names)
    assert torch.equal(one.clean, other.corrupted)


def test_a_row_of_a_padded_batch_is_as_alone(tiny):
    rows = ["The capital of France is", CLEAN], ["The capital of Spain is", CORRUPTED]
    at = ["layers.3.resid_mid", f"layers.3.{ROUTER}.*", "layers.3.self_attn.z", "layers.2.self_attn.k"]
    metric = logit_diff(" Paris", " Madrid")
    both = attribute(tiny, *rows, at=at, metric=metric, steps=2)
    alone = attribute(tiny, rows[0][0], rows[1][0], at=at, metric=metric, steps=2)
    seq = alone.prompt.input_ids.shape[1]
    for name in alone.names:
        torch.testing.assert_close(both[name][:1, -seq:], alone[name], atol=2e-3, rtol=1e-3)
        assert (both[name][0, :-seq] == 0).all()


def test_aligned_prompts_are_compared_at_the_mapped_positions(tiny):
    clean, corrupted = tiny.prompt(" dog" + CLEAN), tiny.prompt(CORRUPTED)
    length = corrupted.input_ids.shape[1]
    align = {0: 0} | {i + 1: i for i in range(2, length)}
    own = attribute(tiny, clean, corrupted, at="layers.4.self_attn.v", metric=NAMES, align=align)
    name = "layers.4.self_attn.v"
    run = record(tiny, corrupted, at=name, grad=True)
    evaluated(NAMES, run).sum().backward()
    source = record(tiny, clean, at=name)[name][:, [0, 2, *range(3, length + 1)]]
    slope = run[name].grad
    assert slope is not None
    expected = ((source - run[name]) * slope).sum(-1)
    assert (own[name][0, 1] == 0).all()
    torch.testing.assert_close(own[name][0, 2:], expected[0, 2:], atol=1e-4, rtol=1e-4)
    tiny.zero_grad()
    with pytest.raises(ValueError, match="has keys"):
        attribute(tiny, clean, corrupted, at="layers.4.self_attn.pattern", metric=NAMES, align=align)
    with pytest.raises(ValueError, match="align"):
        attribute(tiny, clean, corrupted, at=name, metric=NAMES)


def test_image_patches_are_estimated_too(new_model, image_batch):
    model, inputs = new_model(), image_batch([[1], [2]])
    base = lab.Prompt(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], *_described(inputs))
    pixels = inputs["pixel_values"] + 0.001 * torch.randn_like(inputs["pixel_values"])
    near = lab.Prompt(base.input_ids, base.attention_mask, pixels, base.tokens, base.modality)
    names = ["vision_model.layers.0.resid_post", "vision_model.layers.1.mlp.out", "image_features"]
    for steps in (1, 2):
        own = attribute(model, near, base, at=names, metric=logit_diff(3, 4), steps=steps)
        for name in names:
            with lab.patched(model, {name: record(model, near, at=name)[name]}):
                truth = evaluated(logit_diff(3, 4), record(model, base))
            truth = (truth - evaluated(logit_diff(3, 4), record(model, base))).sum()
            torch.testing.assert_close(own[name].sum(), truth, atol=2e-5, rtol=0.1)


def _described(inputs):
    kinds = [["image" if i == 127 else "text" if i else "pad" for i in row] for row in inputs["input_ids"].tolist()]
    return [[f"<{i}>" for i in row] for row in inputs["input_ids"].tolist()], kinds


def test_a_function_of_the_logits_is_a_metric_by_row_or_for_the_batch(tiny):
    mary, john = (tiny.prompt(CLEAN).token_id(name) for name in (" Mary", " John"))
    rows = [CLEAN, CORRUPTED], [CORRUPTED, CLEAN]

    def each(logits):
        return logits[:, -1, mary] - logits[:, -1, john]

    at = ["layers.2.resid_post", f"layers.3.{ROUTER}.logits"]
    built_in = attribute(tiny, *rows, at=at, metric=NAMES)
    by_row = attribute(tiny, *rows, at=at, metric=each)
    whole = attribute(tiny, *rows, at=at, metric=lambda logits: each(logits).mean())
    for name in at:
        torch.testing.assert_close(by_row[name], built_in[name])
        torch.testing.assert_close(whole[name].mean(0), built_in[name].mean(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": rank(" Mary")}, "rank has no derivative"),
        ({"steps": 0}, "steps=0"),
        ({"at": "layers.*.nothing"}, "matches none"),
    ],
)
def test_what_cannot_be_estimated_is_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        attribute(tiny, CLEAN, CORRUPTED, **{"at": "layers.0.resid_post", "metric": NAMES, **changes})
