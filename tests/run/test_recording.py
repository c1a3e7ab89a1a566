import pytest
import torch

import llama4lab as lab

TEXT = "When Mary and John went to the store, John gave a drink to"
SHORT = "The capital of France is"

pytestmark = pytest.mark.usefixtures("no_hooks_left")


def test_recording_leaves_the_logits_as_they_are(tiny):
    prompt = tiny.prompt(TEXT)
    with torch.no_grad():
        bare = tiny(**prompt.inputs()).logits
    run = lab.record(tiny, prompt, at=["layers.*.resid_post", "layers.*.feed_forward.router.*"])
    assert torch.equal(run.logits, bare)
    lazy = lab.record(
        tiny,
        prompt,
        at=["layers.*.self_attn.scores", "layers.*.self_attn.head_out", "layers.*.feed_forward.experts.hidden"],
    )
    assert (lazy.logits - bare).abs().max() < 1e-4


def test_every_hook_point_of_an_image_prompt_can_be_recorded_at_once(tiny, asked):
    run = lab.record(tiny, asked, at="**")
    assert run.names == list(tiny.hook_points())
    assert run.nbytes > lab.recorded_nbytes(tiny, asked, "layers.*.resid_post")


@pytest.mark.parametrize(
    "at", ["**", "layers.*.self_attn.*", ["image_features", "vision_model.layers.*.self_attn.pattern"]]
)
def test_the_estimate_is_the_size_of_what_is_recorded(tiny, asked, at):
    assert lab.recorded_nbytes(tiny, asked, at) == lab.record(tiny, asked, at=at).nbytes + (
        0 if at != "**" else -lab.record(tiny, asked).nbytes
    )


def test_text_chats_and_token_ids_are_taken_where_a_prompt_is(tiny):
    ids = tiny.prompt(SHORT).input_ids
    text = lab.record(tiny, SHORT).logits
    assert torch.equal(lab.record(tiny, ids).logits, text)
    assert torch.equal(lab.record(tiny, ids[0].tolist()).logits, text)
    assert lab.record(tiny, [{"role": "user", "content": "Hello"}]).logits.shape[0] == 1


def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(tiny):
    both = lab.record(tiny, [TEXT, SHORT], at="layers.5.resid_post")
    for row, text in enumerate((TEXT, SHORT)):
        alone = lab.record(tiny, text, at="layers.5.resid_post")
        length = alone.logits.shape[1]
        assert (both.logits[row, -length:] - alone.logits[0]).abs().max() < 2e-5
        torch.testing.assert_close(
            both["layers.5.resid_post"][row, -length:], alone["layers.5.resid_post"][0], rtol=1e-5, atol=2e-5
        )


def test_a_hook_point_that_never_fires_is_an_error(tiny):
    with pytest.raises(RuntimeError, match=r"never fired: vision_model.layers.0.resid_post\.\nThe prompt has no image"):
        lab.record(tiny, TEXT, at="vision_model.layers.0.resid_post")


def test_gradients_reach_recorded_tensors(tiny):
    run = lab.record(tiny, TEXT, at=["layers.2.resid_post", "layers.3.feed_forward.router.logits"], grad=True)
    run.logits[0, -1].max().backward()
    for tensor in run.values():
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0
    assert not lab.record(tiny, TEXT, at="layers.2.resid_post")["layers.2.resid_post"].requires_grad


def test_tensors_can_be_kept_elsewhere(tiny):
    run = lab.record(tiny, SHORT, at="embed", to="cpu")
    assert run["embed"].device.type == "cpu"


def test_a_recording_that_does_not_fit_is_refused_with_both_figures(tiny, monkeypatch):
    monkeypatch.setattr("llama4lab.run.recording.free_nbytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"would take 0\.0 GiB on cpu, where 0\.0 GiB are free"):
        lab.record(tiny, SHORT, at="layers.*.resid_post")


def test_an_interrupt_leaves_no_hook(tiny):
    def interrupt(_module, _inputs, _output):
        raise KeyboardInterrupt

    handle = tiny.text.layers[4].resid_mid.register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            lab.record(tiny, SHORT, at="**")
    except RuntimeError:
        pass
    finally:
        handle.remove()
    assert lab.record(tiny, SHORT).logits.isfinite().all()


def test_a_recording_sees_what_an_earlier_hook_made(tiny):
    with lab.patched(tiny, {"layers.1.resid_post": 0.0}):
        run = lab.record(tiny, SHORT, at=["layers.1.resid_post", "layers.2.resid_pre"])
    assert run["layers.1.resid_post"].abs().max() == 0
    assert run["layers.2.resid_pre"].abs().max() == 0
