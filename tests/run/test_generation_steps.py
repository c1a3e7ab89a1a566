"""What a caller sees of a generation step by step, and what it may ask for."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import llama4lab as lab
from llama4lab.run.listening import is_hooked

TEXTS = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]
PATTERN, INDICES = "layers.3.self_attn.pattern", "layers.*.feed_forward.router.indices"

pytestmark = pytest.mark.usefixtures("no_hooks_left")


def seen(model, prompt, **options) -> list:
    steps = []
    lab.generate(model, prompt, each_step=steps.append, **({"max_new_tokens": 5, "eos_token_id": None} | options))
    return steps


def test_each_step_has_its_tokens_and_the_logits_they_were_chosen_from(tiny):
    steps = seen(tiny, TEXTS, at=INDICES)
    run = steps[-1].run()
    assert [step.number for step in steps] == [0, 1, 2, 3, 4]
    for step in steps:
        assert torch.equal(step.tokens, run.prompt.input_ids[:, 15 + step.number])
        assert torch.equal(step.logits, run.logits[:, step.number])
        assert step.tensors["layers.1.feed_forward.router.indices"].shape[1] == (15 if step.number == 0 else 1)


def test_what_passes_by_is_of_single_tokens_and_is_not_kept(tiny):
    steps = seen(tiny, TEXTS, passing=PATTERN)
    kept = seen(tiny, TEXTS, at=PATTERN)[-1].run()
    assert PATTERN not in steps[0].tensors
    assert not steps[-1].run().names
    for step in steps[1:]:
        row = kept[PATTERN][:, :, 14 + step.number : 15 + step.number, : 15 + step.number]
        torch.testing.assert_close(step.tensors[PATTERN], row)


def test_a_caller_can_stop(tiny):
    run = lab.generate(tiny, TEXTS, each_step=lambda step: step.number == 2, eos_token_id=None, at=INDICES)
    whole = lab.generate(tiny, TEXTS, max_new_tokens=3, eos_token_id=None, at=INDICES)
    assert torch.equal(run.prompt.input_ids, whole.prompt.input_ids)
    assert all(torch.equal(run[name], whole[name]) for name in whole)


def test_a_caller_that_fails_leaves_no_hook(tiny):
    def fail(step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.generate(tiny, TEXTS, at=INDICES, each_step=fail)


def test_while_the_recording_is_away_another_pass_is_not_recorded(tiny):
    expected = lab.generate(tiny, TEXTS, at=INDICES, max_new_tokens=4, eos_token_id=None)

    def look_elsewhere(step) -> None:
        with step.away():
            assert not is_hooked(tiny)
            lab.record(tiny, TEXTS[1], at=INDICES)

    run = lab.generate(tiny, TEXTS, at=INDICES, max_new_tokens=4, eos_token_id=None, each_step=look_elsewhere)
    assert torch.equal(run.prompt.input_ids, expected.prompt.input_ids)
    assert all(torch.equal(run[name], expected[name]) for name in expected)


def test_a_prompt_read_in_pieces_gives_the_run_of_a_prompt_read_at_once(tiny):
    options: dict[str, Any] = {"at": [INDICES, "layers.*.resid_post"], "max_new_tokens": 4, "eos_token_id": None}
    pieces, once = (lab.generate(tiny, TEXTS, **options, prefill_chunk_size=size) for size in (4, None))
    assert pieces.logits.shape == once.logits.shape
    assert pieces.logit_positions == once.logit_positions
    torch.testing.assert_close(pieces.logits, once.logits, rtol=1e-4, atol=1e-4)
    valid = once.prompt.attention_mask[:, :-1].bool()
    for name in once:
        torch.testing.assert_close(pieces[name][valid], once[name][valid], rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_are_those_of_single_prompts(tiny):
    together = lab.generate(tiny, TEXTS, at="layers.*.resid_post", max_new_tokens=5, eos_token_id=None)
    for row, text in enumerate(TEXTS):
        alone = lab.generate(tiny, text, at="layers.*.resid_post", max_new_tokens=5, eos_token_id=None)
        length = alone.prompt.input_ids.shape[1]
        assert torch.equal(together.prompt.input_ids[row, -length:], alone.prompt.input_ids[0])
        for name in alone:
            own = together[name][row, 1 - length :]
            torch.testing.assert_close(own, alone[name][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("given", ["keyword", "config"])
def test_tokens_after_an_end_that_the_caller_names_are_padding(given, tiny):
    end = int(lab.generate(tiny, TEXTS[0], max_new_tokens=2).prompt.input_ids[0, -2])
    config = GenerationConfig(eos_token_id=end, pad_token_id=tiny.generation_config.pad_token_id)
    options: dict[str, Any] = {"eos_token_id": end} if given == "keyword" else {"generation_config": config}
    run = lab.generate(tiny, TEXTS, max_new_tokens=4, **options)
    assert run.prompt.modality[0][-4:] == ["text", "pad", "pad", "pad"]
    assert run.prompt.attention_mask[0, -4:].tolist() == [1, 0, 0, 0]
    assert "pad" not in run.prompt.modality[1][-2:-1]


def test_an_end_that_the_caller_ignores_is_an_ordinary_token(tiny):
    first = int(lab.generate(tiny, TEXTS[0], max_new_tokens=1).prompt.input_ids[0, -1])
    before, tiny.generation_config.eos_token_id = tiny.generation_config.eos_token_id, first
    try:
        run = lab.generate(tiny, TEXTS[0], max_new_tokens=4, eos_token_id=None)
    finally:
        tiny.generation_config.eos_token_id = before
    assert run.prompt.attention_mask[0, -4:].tolist() == [1, 1, 1, 1]


REFUSED = {
    "use_cache": (False, "read the whole text again"),
    "num_beams": (3, "Beams"),
    "num_return_sequences": (2, "repeat the prompt"),
    "prompt_lookup_num_tokens": (3, "Guessed"),
    "return_dict_in_generate": (True, "A run is given"),
}


@pytest.mark.parametrize(("name", "value", "message"), [(name, *rest) for name, rest in REFUSED.items()])
def test_options_that_would_mix_up_the_steps_are_refused(name, value, message, tiny):
    with pytest.raises(ValueError, match=message):
        lab.generate(tiny, TEXTS[0], at="embed", **{name: value})
    config = GenerationConfig(do_sample=True, **{name: value})
    with pytest.raises(ValueError, match=message):
        lab.generate(tiny, TEXTS[0], at="embed", generation_config=config)


def test_a_cache_with_tokens_is_refused(tiny):
    cache = DynamicCache(config=tiny.config)
    with torch.no_grad():
        tiny(**tiny.prompt(TEXTS[0]).inputs(), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="empty cache"):
        lab.generate(tiny, TEXTS[0], cache=cache)
