"""Every cell of a sweep has the value that a single patched run gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llama4lab as lab
from llama4lab.run.metrics import evaluated

TOLERANCE = 2e-5


def sampled(labels: list[dict], most: int, seed: int = 0) -> list[int]:
    """All cells, or some of them."""
    return sorted(np.random.default_rng(seed).permutation(len(labels))[:most].tolist())


def assert_like_single_runs(model, clean, corrupted, *, metric, most: int = 12, **options):
    """Compares cells of a sweep with ordinary patched runs."""
    result = lab.sweep(model, clean, corrupted, metric=metric, progress=False, **options)
    assert result.complete
    assert len(result)
    options.pop("over")
    into = options.get("into", "corrupted") if corrupted is not None else "clean"
    options["into"] = into
    base = clean if into == "clean" else corrupted
    for index in sampled(result.labels, most):
        patches = lab.cell_patches(model, clean, corrupted, cell=result.labels[index], **options)
        if not patches:
            expected = evaluated(metric, lab.record(model, base))
        else:
            with lab.patched(model, patches):
                expected = evaluated(metric, lab.record(model, base))
        scale = max(1.0, float(expected.abs().max()))
        assert (result.patched[index] - expected).abs().max() < TOLERANCE * scale, result.labels[index]
    return result


@pytest.fixture(scope="module")
def model(new_text_model):
    """Dense and MoE layers in turn, two experts a token, chunks of 8 tokens, a NoPE layer."""
    return new_text_model(num_experts_per_tok=2)


@pytest.fixture(scope="module")
def pair(model, random_ids):
    """Two rows of 19 and 15 tokens, padded on the left; they differ in one token and in all from there."""
    ids = random_ids(2, 19)
    other = ids.clone()
    other[0, 3] = 5
    other[1, 6:] = random_ids(13, seed=7)
    return (
        model.prompt([ids[0].tolist(), ids[1, 4:].tolist()]),
        model.prompt([other[0].tolist(), other[1, 4:].tolist()]),
    )


METRIC = lab.metrics.logit_diff([7, 8], [9, 10])
GRIDS = {
    "residual stream": ("layers.*.resid_*", ["component", "layer", "position"]),
    "residual stream before layers": ("layers.*.resid_pre", ["layer", "position"]),
    "residual stream behind layers": ("layers.*.resid_post", ["layer", "position"]),
    "embedding": (["embed", "embed_merged"], ["hook_point", "position"]),
    "head": (["final_norm", "logits"], ["hook_point", "position"]),
    "queries": (["layers.*.self_attn.q", "layers.*.self_attn.q_rot"], ["component", "layer", "head"]),
    "keys and values": ("layers.*.self_attn.[kv]", ["component", "layer", "head", "position"]),
    "rotated keys": ("layers.*.self_attn.k_rot", ["layer", "position"]),
    "heads": ("layers.*.self_attn.z", ["layer", "head"]),
    "heads at positions": ("layers.*.self_attn.head_out", ["layer", "head", "position"]),
    "patterns": ("layers.*.self_attn.pattern", ["layer", "head"]),
    "patterns of queries": ("layers.*.self_attn.scores", ["layer", "head", "position"]),
    "patterns by key": ("layers.*.self_attn.pattern", ["layer", "key"]),
    "attention": ("layers.*.self_attn.out", ["layer", "position"]),
    "router logits": ("layers.*.feed_forward.router.logits", ["layer", "expert"]),
    "router logits at positions": ("layers.*.feed_forward.router.logits", ["layer", "position"]),
    "routes": ("layers.*.feed_forward.router.indices", ["layer", "position"]),
    "gates": ("layers.*.feed_forward.router.gates", ["layer", "position", "slot"]),
    "experts": ("layers.*.feed_forward.experts.out", ["layer", "expert"]),
    "experts at positions": ("layers.*.feed_forward.experts.out", ["layer", "expert", "position"]),
    "slots": ("layers.*.feed_forward.experts.out", ["layer", "slot"]),
    "neurons of experts": ("layers.*.feed_forward.experts.hidden", ["layer", "expert", "neuron"]),
    "neurons of slots": ("layers.*.feed_forward.experts.hidden", ["layer", "slot", "neuron"]),
    "neurons of the shared expert": ("layers.*.feed_forward.shared_expert.hidden", ["layer", "neuron"]),
    "neurons of dense layers": ("layers.*.feed_forward.hidden", ["layer", "neuron"]),
    "feed-forward": ("layers.*.feed_forward.out", ["layer", "position"]),
    "features": ("layers.*.resid_mid", ["layer", "feature"]),
    "positions over all layers": ("layers.*.self_attn.z", ["position"]),
    "single hook points": (["layers.1.self_attn.z", "layers.2.resid_mid", "final_norm"], ["hook_point"]),
    "routes and experts together": (
        ["layers.*.feed_forward.router.indices", "layers.*.feed_forward.experts.out"],
        ["layer", "position"],
    ),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_sweep_equals_single_runs_on_every_axis(model, pair, grid):
    at, over = GRIDS[grid]
    assert_like_single_runs(model, *pair, at=at, over=over, metric=METRIC)


@pytest.mark.parametrize("into", ["clean", "corrupted"])
@pytest.mark.parametrize("values", ["zero", "mean", "function"])
def test_constants_and_functions_equal_single_runs(model, pair, into, values):
    names = [name for name in model.hook_points() if name.endswith(("self_attn.z", "experts.out"))]
    run = lab.record(model, pair[0], at=names)
    chosen = {
        "zero": 0,
        "mean": {name: run[name].mean((0, 1, 2) if name.endswith("out") else (0, 1)) for name in names},
        "function": lambda now, other: now.flip(-1) - 0.5 * other,
    }[values]
    for at, over in ((names[:5], ["layer", "head"]), ("layers.*.feed_forward.experts.out", ["layer", "expert"])):
        at = [n for n in names if n.endswith("z")] if over[1] == "head" else at
        assert_like_single_runs(model, *pair, at=at, over=over, metric=METRIC, values=chosen, into=into, most=6)


def test_a_function_of_patterns_may_look_ahead(model, pair):
    assert_like_single_runs(
        model, *pair, at="layers.*.self_attn.pattern", over=["layer", "position"], metric=METRIC,
        values=lambda now, other: torch.softmax(now + other, -1),
    )  # fmt: skip


METRICS = {
    "loss": lab.metrics.loss(),
    "middle": lab.metrics.log_prob(7, position=9),
    "rank": lab.metrics.rank(7),
    "own": lambda logits: logits[:, -3:].amax((1, 2)) - logits[:, :, 3].mean(),
    "one number for the batch": lambda logits: logits[..., 3].max(),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("grid", ["residual stream before layers", "heads", "head", "routes"])
def test_any_metric_equals_single_runs(model, pair, metric, grid):
    at, over = GRIDS[grid]
    assert_like_single_runs(model, *pair, at=at, over=over, metric=METRICS[metric], most=8)


def test_a_divergence_from_a_run_is_a_metric(model, pair):
    reference = lab.record(model, pair[0])
    result = assert_like_single_runs(
        model, *pair, at="layers.*.resid_pre", over=["layer"], metric=lab.metrics.kl_to(reference)
    )
    assert result.clean.abs().max() < 1e-5
    assert result.patched[0].abs().max() < 1e-5


@settings(max_examples=12)
@given(data=st.data())
def test_random_models_prompts_and_functions_equal_single_runs(new_text_model, random_ids, data):
    draw = data.draw
    model = new_text_model(
        num_experts_per_tok=draw(st.sampled_from([1, 2])),
        interleave_moe_layer_step=draw(st.sampled_from([1, 2])),
        attention_chunk_size=draw(st.sampled_from([None, 4, 8])),
        num_key_value_heads=draw(st.sampled_from([1, 2, 4])),
        num_hidden_layers=draw(st.sampled_from([3, 5])),
        seed=draw(st.integers(0, 50)),
    )
    lengths = draw(st.lists(st.integers(3, 14), min_size=1, max_size=3))
    rows = [[random_ids(n, seed=10 * s + i).tolist() for i, n in enumerate(lengths)] for s in (0, 1)]
    kept = draw(st.integers(0, 2))
    rows[1] = [[*a[:kept], *b[kept:]] for a, b in zip(*rows, strict=True)]
    at, over = GRIDS[draw(st.sampled_from(sorted(GRIDS)))]
    if model.text.config.interleave_moe_layer_step == 1 and at == "layers.*.feed_forward.hidden":
        return
    factor = draw(st.floats(-2, 2))
    values = draw(st.sampled_from(["other", "function"]))
    floating = "indices" not in str(at)
    assert_like_single_runs(
        model, model.prompt(rows[0]), model.prompt(rows[1]), at=at, over=over, most=4,
        metric=lab.metrics.log_prob(3), into=draw(st.sampled_from(["clean", "corrupted"])),
        values=(lambda now, other: factor * now + torch.tanh(other)) if values == "function" and floating else "other",
    )  # fmt: skip
