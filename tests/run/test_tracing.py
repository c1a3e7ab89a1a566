import pytest
import torch

import llama4lab as lab

TEXT = "When Mary and John went to the store, John gave a drink to"
SHORT = "The capital of France is"


@pytest.fixture(scope="module")
def model() -> lab.HookedLlama4:
    """A model of its own, because nnsight leaves its wrappers on the modules."""
    return lab.load()  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def traced(model):
    return lab.nnsight(model)


def test_a_trace_reads_what_a_recording_reads(model, traced):
    names = ["layers.2.self_attn.q_rot", "layers.3.self_attn.pattern", "layers.3.feed_forward.router.logits", "logits"]
    run = lab.record(model, TEXT, at=names)
    with torch.no_grad(), traced.trace(TEXT):
        q = traced.hook("layers.2.self_attn.q_rot").output.save()
        pattern = traced.hook("layers.3.self_attn.pattern").output.save()
        router = traced.hook("layers.3.feed_forward.router.logits").output.save()
        logits = traced.hook("logits").output.save()
    for name, tensor in zip(names, (q, pattern, router, logits), strict=True):
        assert (run[name] - tensor).abs().max() < 1e-5, name


def test_editing_a_lazy_hook_point_changes_the_output(model, traced):
    plain = lab.record(model, TEXT).logits
    with torch.no_grad(), traced.trace(TEXT):
        pattern = traced.hook("layers.5.self_attn.pattern").output
        traced.hook("layers.5.self_attn.pattern").output = torch.zeros_like(pattern)
        logits = traced.hook("logits").output.save()
    with lab.patched(model, {"layers.5.self_attn.pattern": 0.0}):
        expected = lab.record(model, TEXT).logits
    assert (logits - expected).abs().max() < 1e-5
    assert (logits - plain).abs().max() > 1e-3


LEAKY = [
    "embed",
    "layers.1.feed_forward.router.logits",
    "layers.1.feed_forward.router.gates",
    "layers.1.feed_forward.out",
]
LEAKY += ["layers.3.feed_forward.experts.out", "layers.3.feed_forward.shared_expert.out", "layers.3.self_attn.pattern"]
LEAKY += ["layers.3.self_attn.z", "layers.6.resid_mid", "layers.6.feed_forward.hidden", "final_norm"]


@pytest.mark.parametrize("name", LEAKY)
def test_an_edit_in_one_invoke_does_not_reach_another(model, traced, name):
    alone = lab.record(model, SHORT).logits
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(TEXT):
            old = traced.hook(name).output
            traced.hook(name).output = old.roll(1, -1) * 2
            edited = traced.hook("logits").output.save()
        with tracer.invoke(SHORT):
            other = traced.hook("logits").output.save()
    length = alone.shape[1]
    assert (other[:, -length:] - alone).abs().max() < 1e-5
    assert (edited - lab.record(model, TEXT).logits).abs().max() > 1e-3


def test_invokes_with_images_see_their_own_tiles(model, traced, asked, picture):
    other = model.prompt("<|image|>" + SHORT, images=picture.rotate(180))
    runs = [lab.record(model, prompt, at="vision_model.layers.1.resid_post") for prompt in (asked, other)]
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(asked):
            first = traced.hook("vision_model.layers.1.resid_post").output.save()
        with tracer.invoke(other):
            second = traced.hook("vision_model.layers.1.resid_post").output.save()
    for run, seen in zip(runs, (first, second), strict=True):
        expected = run["vision_model.layers.1.resid_post"]
        assert seen.shape == expected.shape
        assert (seen - expected).abs().max() < 1e-5


def test_rows_and_tiles_that_cannot_be_told_apart_are_refused(model, traced, picture):
    two = model.prompt("<|image|><|image|>" + SHORT, images=[picture, picture])
    with pytest.raises(ValueError, match="2 rows and as many image tiles"), traced.trace() as tracer:  # noqa: PT012
        with tracer.invoke(two):
            traced.hook("layers.1.resid_post").output.save()
        with tracer.invoke(SHORT):
            traced.hook("layers.1.resid_post").output.save()


def test_gradients_flow_in_a_trace(traced):
    with traced.trace(TEXT):
        router = traced.hook("layers.3.feed_forward.router.logits").output
        router.retain_grad()
        loss = traced.hook("logits").output[0, -1].max()
        loss.backward()
        grad = router.grad.save()
    assert grad.abs().sum() > 0


def test_generation_can_be_traced(model, traced):
    tokens = model.generate(**model.prompt(TEXT).inputs(), max_new_tokens=3, do_sample=False)
    with traced.trace(TEXT, fn="generate", max_new_tokens=3, do_sample=False) as tracer:
        result = tracer.result.save()
    assert torch.equal(result, tokens)


def test_a_wrapped_model_still_records_and_patches(model, traced):
    run = lab.record(model, SHORT, at="layers.3.self_attn.pattern")
    assert run["layers.3.self_attn.pattern"].shape[1] == 4
    assert not model.text.layers[3].self_attn.pattern.watched
