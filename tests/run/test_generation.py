import pytest
import torch

import llama4lab as lab

TEXT = "When Mary and John went to the store, John gave a drink to"
SHORT = "The capital of France is"

pytestmark = pytest.mark.usefixtures("no_hooks_left")
EVERYTHING = [
    "layers.*.feed_forward.router.*",
    "layers.[37].self_attn.*",
    "layers.2.self_attn.pattern",
    "layers.*.resid_post",
]


def endless(model) -> dict:
    return {"eos_token_id": None, "pad_token_id": model.config.text_config.pad_token_id}


def test_what_is_recorded_step_by_step_is_what_one_pass_over_the_text_gives(tiny):
    run = lab.generate(tiny, TEXT, max_new_tokens=8, at=EVERYTHING, **endless(tiny))
    ids = run.prompt.input_ids
    assert ids.shape == (1, 15 + 8)
    once = lab.record(tiny, ids[:, :-1], at=EVERYTHING)
    for name in run:
        assert run[name].shape == once[name].shape, name
        finite = once[name].isfinite()
        assert torch.equal(finite, run[name].isfinite()), name
        torch.testing.assert_close(run[name][finite], once[name][finite], rtol=1e-4, atol=1e-4, msg=name)
    assert (run.logits - once.logits[:, -8:]).abs().max() < 1e-4


def test_greedy_tokens_are_the_best_of_their_logits(tiny):
    run = lab.generate(tiny, SHORT, max_new_tokens=5, **endless(tiny))
    assert run.logits.shape[1] == 5
    assert torch.equal(run.logits.argmax(-1), run.prompt.input_ids[:, -5:])


def test_generation_across_chunk_borders_aligns_the_patterns(tiny):
    ids = torch.randint(300, 1000, (1, 60), generator=torch.Generator().manual_seed(0))
    at = ["layers.0.self_attn.pattern", "layers.3.self_attn.pattern", "layers.0.self_attn.scores"]
    run = lab.generate(tiny, ids, max_new_tokens=12, at=at, **endless(tiny))
    once = lab.record(tiny, run.prompt.input_ids[:, :-1], at=at)
    assert run["layers.0.self_attn.pattern"].shape == (1, 4, 71, 71)
    assert (run["layers.0.self_attn.pattern"][0, :, 66, :64] == 0).all()  # the second chunk starts at 64
    for name in at:
        assert torch.equal(run[name].isfinite(), once[name].isfinite())
        assert (run[name] - once[name]).nan_to_num().abs().max() < 1e-3


def test_rows_that_end_are_filled_with_padding(tiny):
    run = lab.generate(tiny, [TEXT, SHORT], max_new_tokens=12)
    ends = tiny.generation_config.eos_token_id
    for row in range(2):
        new = run.prompt.input_ids[row, 15:].tolist()
        kinds = run.prompt.modality[row][15:]
        stop = next((place for place, token in enumerate(new) if token in ends), len(new))
        assert all(kind == "pad" for kind in kinds[stop + 1 :])
        assert all(kind != "pad" for kind in kinds[: stop + 1])


def test_an_image_is_seen_once_and_kept_in_the_cache(tiny, asked):
    at = ["image_features", "layers.7.resid_post"]
    run = lab.generate(tiny, asked, max_new_tokens=4, at=at, **endless(tiny))
    with torch.no_grad():
        whole = tiny(input_ids=run.prompt.input_ids, pixel_values=asked.pixel_values).logits
    length = asked.input_ids.shape[1]
    assert (run.logits - whole[:, length - 1 : -1]).abs().max() < 1e-4
    assert run["image_features"].shape[0] == asked.pixel_values.shape[0]


def test_patches_act_at_every_step(tiny):
    with lab.patched(tiny, {"layers.3.feed_forward.router.indices": 1}):
        run = lab.generate(tiny, SHORT, max_new_tokens=4, at="layers.3.feed_forward.router.indices", **endless(tiny))
    assert (run["layers.3.feed_forward.router.indices"] == 1).all()


def test_beams_are_refused(tiny):
    with pytest.raises(ValueError, match="Beams"):
        lab.generate(tiny, SHORT, num_beams=2)


def test_sampling_options_reach_transformers(tiny):
    torch.manual_seed(1)
    first = lab.generate(
        tiny, SHORT, do_sample=True, temperature=5.0, max_new_tokens=6, **endless(tiny)
    ).prompt.input_ids
    torch.manual_seed(2)
    second = lab.generate(
        tiny, SHORT, do_sample=True, temperature=5.0, max_new_tokens=6, **endless(tiny)
    ).prompt.input_ids
    assert not torch.equal(first, second)


def test_cutting_a_generated_run_keeps_the_positions_of_its_logits(tiny):
    run = lab.generate(tiny, TEXT, max_new_tokens=3, at="embed", **endless(tiny))
    assert run.logit_positions == [14, 15, 16]
    assert run.cut(positions=slice(0, 3)).logits.shape[1] == 0
    cut = run.cut(positions=[2, 15])
    assert cut.logit_positions == [15]
    assert torch.equal(cut.logits, run.logits[:, 1:2])
    assert lab.tables.logits.top_tokens(cut)["position"].unique().tolist() == [15]
