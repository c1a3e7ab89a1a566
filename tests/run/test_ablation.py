import pytest
import torch

import llama4lab as lab
from llama4lab.run import ablation

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHERS = ["The capital of France is", "John has seven red apples", "three plus four is"]

pytestmark = pytest.mark.usefixtures("no_hooks_left")


def values(model, texts: list[str], name: str) -> torch.Tensor:
    """The values of all tokens of texts, each run by itself."""
    return torch.cat([lab.record(model, text, at=name)[name][0] for text in texts])


def test_zero_silences_what_it_is_put_into(tiny):
    names = ["layers.2.feed_forward.out", "layers.3.feed_forward.experts.out", "layers.3.self_attn.pattern"]
    with lab.patched(tiny, ablation.zero(tiny, at=names)):
        run = lab.record(tiny, TEXT, at=[*names, "layers.3.self_attn.z"])
    assert all((tensor == 0).all() for tensor in run.values())


@pytest.mark.parametrize("name", ["layers.3.resid_post", "layers.5.feed_forward.router.logits", "layers.2.self_attn.z"])
def test_the_mean_is_that_of_all_tokens_without_padding(tiny, name):
    mean = ablation.mean(tiny, OTHERS, at=name)[name]
    torch.testing.assert_close(mean, values(tiny, OTHERS, name).mean(0), atol=1e-4, rtol=1e-4)
    with lab.patched(tiny, {name: mean}):
        patched = lab.record(tiny, TEXT, at=name)[name]
    assert torch.equal(patched, mean.expand_as(patched))


def test_prompts_runs_and_texts_give_the_same_mean(tiny):
    name = "layers.3.resid_post"
    many = OTHERS * 7  # more than one pass
    expected = values(tiny, many, name).mean(0)
    for examples in (many, lab.record(tiny, many, at=name), [tiny.prompt(text) for text in many]):
        torch.testing.assert_close(ablation.mean(tiny, examples, at=name)[name], expected, atol=1e-4, rtol=1e-4)


def test_the_mean_by_position_counts_only_rows_with_a_token_there(tiny):
    name = "layers.3.self_attn.out"
    run = lab.record(tiny, OTHERS, at=name)
    mean = ablation.mean(tiny, run, at=name, by_position=True)[name]
    mask = run.prompt.attention_mask.bool()
    assert not mask.all()
    for position in range(mask.shape[1]):
        expected = run[name][mask[:, position], position].mean(0)
        torch.testing.assert_close(mean[position], expected, atol=1e-6, rtol=1e-5)
    with lab.patched(tiny, {name: mean}):
        assert torch.equal(lab.record(tiny, OTHERS, at=name)[name][1], mean)


def test_the_mean_over_image_patches_reaches_the_vision_tower(tiny, asked):
    name = "vision_model.layers.2.resid_post"
    mean = ablation.mean(tiny, asked, at=name)[name]
    torch.testing.assert_close(mean, lab.record(tiny, asked, at=name)[name].flatten(0, 1).mean(0))
    with lab.patched(tiny, {name: mean}):
        blind = lab.record(tiny, asked)
    assert (blind.logits - lab.record(tiny, asked).logits).abs().max() > 0.1


def test_resampled_values_are_those_of_real_tokens_the_same_token_at_every_hook_point(tiny):
    names = ["layers.1.feed_forward.router.indices", "layers.1.feed_forward.router.gates", "layers.3.resid_post"]
    drawn = ablation.resample(tiny, [TEXT, OTHERS[0]], OTHERS, at=names, seed=3)
    run = lab.record(tiny, OTHERS, at=names)
    mask = run.prompt.attention_mask.bool()
    pool = torch.cat([run[name][mask].float() for name in names], dim=-1)
    new = torch.cat([drawn[name].float() for name in names], dim=-1)
    assert new.shape[:2] == (2, 15)
    assert (new.flatten(0, 1)[:, None] == pool).all(-1).any(1).all()
    assert len(new.flatten(0, 1).unique(dim=0)) > 5
    with lab.patched(tiny, drawn):
        patched = lab.record(tiny, [TEXT, OTHERS[0]], at=names)
    assert all(torch.equal(patched[name], drawn[name]) for name in names)


def test_a_draw_is_the_same_for_the_same_seed(tiny):
    name = "layers.3.resid_post"
    one, again, other = (ablation.resample(tiny, TEXT, OTHERS, at=name, seed=seed)[name] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_every_token_of_the_examples_is_drawn_as_often(tiny):
    name = "layers.0.resid_pre"
    pool = values(tiny, OTHERS, name)
    drawn = ablation.resample(tiny, [TEXT] * 40, OTHERS, at=name)[name].flatten(0, 1)
    counts = (drawn[:, None] == pool).all(-1).float().sum(0)
    # A token that occurs twice is two tokens of the pool with one value, so both count all draws of either.
    expected = len(drawn) / len(pool) * (pool[:, None] == pool).all(-1).sum(0)
    assert (counts - expected).abs().max() < 6 * expected.sqrt().max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ablation.mean(m, OTHERS, at="layers.1.feed_forward.router.indices"), "numbers of experts"),
        (lambda m: ablation.zero(m, at="layers.1.feed_forward.router.*"), "draw indices with resample"),
        (lambda m: ablation.zero(m, at="layers.1.self_attn.scores"), "Zero layers.1.self_attn.pattern instead"),
        (lambda m: ablation.mean(m, OTHERS, at="layers.1.self_attn.pattern"), "self_attn.head_out"),
        (lambda m: ablation.resample(m, TEXT, OTHERS, at="layers.1.self_attn.pattern"), "no value for each token"),
        (
            lambda m: ablation.mean(m, [m.prompt(t) for t in OTHERS], at="layers.1.resid_post", by_position=True),
            "examples of one length; there are 6 and 12",
        ),
        (
            lambda m: ablation.mean(m, m.prompt(OTHERS).row(0), at="layers.1.resid_post", by_position=True),
            "place 0 is padding in all examples",
        ),
        (lambda m: ablation.mean(m, OTHERS, at="vision_model.patch_embed", by_position=True), "it has no positions"),
        (lambda m: ablation.mean(m, [], at="embed"), "there are none"),
    ],
)
def test_what_has_no_such_value_is_refused_with_what_would_work(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


def test_a_sweep_takes_ablations_as_values(tiny):
    prompt, metric = tiny.prompt([TEXT, TEXT]), lab.metrics.logit_diff(" Mary", " John")
    at = "layers.*.feed_forward.out"
    for values in (ablation.mean(tiny, OTHERS, at=at), ablation.resample(tiny, prompt, OTHERS, at=at)):
        sweep = lab.sweep(tiny, prompt, None, at=at, over=["layer"], metric=metric, values=values, progress=False)
        for layer, patched in zip(sweep.table["layer"], sweep.table["patched"], strict=True):
            name = f"layers.{layer}.feed_forward.out"
            with lab.patched(tiny, {name: values[name]}):
                expected = lab.metrics.evaluated(metric, lab.record(tiny, prompt)).mean().item()
            assert patched == pytest.approx(expected, abs=1e-4)
