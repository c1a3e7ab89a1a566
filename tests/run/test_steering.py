import pytest
import torch

import llama4lab as lab
from llama4lab.run.metrics import evaluated, logit_diff
from llama4lab.run.steering import steered
from llama4lab.run.steering_vectors import steering_vector
from llama4lab.tiny.domains import chat, translation

TEXT = "When Mary and John went to the store, John gave a drink to"
ROWS = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
AT = "layers.1.resid_post"


def random_vector(model, *names: str, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: size * torch.randn(model.text.config.hidden_size, generator=generator) for name in names}


@pytest.fixture(scope="module")
def small(new_text_model):
    """Two experts a token, a dense layer beside each layer with experts, chunks of 8."""
    return new_text_model(num_experts_per_tok=2, interleave_moe_layer_step=2)


def test_scale_0_changes_nothing(tiny, no_hooks_left):
    plain = lab.record(tiny, TEXT).logits
    with steered(tiny, random_vector(tiny, AT), 0):
        assert torch.equal(lab.record(tiny, TEXT).logits, plain)


def test_the_opposite_vector_undoes_a_vector(tiny):
    vector = random_vector(tiny, AT, "layers.4.resid_pre")
    plain = lab.record(tiny, TEXT).logits
    with steered(tiny, vector):
        assert (lab.record(tiny, TEXT).logits - plain).abs().max() > 0.1
        with steered(tiny, vector, -1):
            torch.testing.assert_close(lab.record(tiny, TEXT).logits, plain, atol=1e-3, rtol=1e-3)


def test_steering_is_adding_the_vector_to_the_residual_stream_by_hand(tiny):
    vector = random_vector(tiny, AT)
    with lab.patched(tiny, {AT: lambda x: x + 2.5 * vector[AT]}):
        by_hand = lab.record(tiny, TEXT).logits
    with steered(tiny, vector, 2.5):
        assert torch.equal(lab.record(tiny, TEXT).logits, by_hand)


@pytest.mark.parametrize(
    ("positions", "meant"),
    [
        (3, [3]),
        (-1, [14]),
        ([0, -2, 5], [0, 5, 13]),
        (slice(2, 9, 3), [2, 5, 8]),
        (slice(-3, None), [12, 13, 14]),
        (slice(None, -13), [0, 1]),
        (None, list(range(15))),
    ],
)
def test_only_the_chosen_positions_are_steered(tiny, positions, meant):
    plain = lab.record(tiny, TEXT, at=AT)[AT]
    with steered(tiny, random_vector(tiny, AT), positions=positions):
        changed = (lab.record(tiny, TEXT, at=AT)[AT] != plain).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == meant


def test_padding_is_not_steered_and_padded_rows_are_steered_as_if_alone(small):
    vector = random_vector(small, AT, "layers.3.resid_mid")
    prompt = small.prompt(ROWS)
    with steered(small, vector, positions=slice(4, None)):
        run = lab.record(small, prompt, at=AT)
    padding = prompt.attention_mask == 0
    assert torch.equal(run[AT][padding], lab.record(small, prompt, at=AT)[AT][padding])
    for row, ids in enumerate(ROWS):
        pad = 7 - len(ids)
        with steered(small, vector, positions=slice(4 - pad, None)):
            alone = lab.record(small, [ids]).logits
        torch.testing.assert_close(run.logits[row, pad:], alone[0], atol=1e-4, rtol=1e-4)


def test_a_mask_steers_one_row_and_leaves_the_other_as_it_was(small):
    prompt = small.prompt(ROWS)
    mask = torch.zeros_like(prompt.input_ids, dtype=torch.bool)
    mask[0] = True
    plain = lab.record(small, prompt).logits
    with steered(small, random_vector(small, AT), positions=mask):
        changed = lab.record(small, prompt).logits
    torch.testing.assert_close(changed[1:], plain[1:], atol=1e-5, rtol=1e-5)
    assert (changed[0] - plain[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("positions", "of_the_text"),
    [
        (None, None),
        (slice(3, 12), slice(3, 12)),
        ([2, 8, 9, 11], [2, 8, 9, 11]),
        ("new", slice(7, None)),
        (-1, 6),
        (slice(None, -2), slice(None, 5)),
    ],
)
def test_generation_is_steered_like_one_pass_over_its_text(small, positions, of_the_text):
    vector = random_vector(small, AT, "layers.2.self_attn.out", "embed_merged", size=2.0)
    prompt = small.prompt(ROWS)
    plain = lab.generate(small, prompt, max_new_tokens=12)
    with steered(small, vector, positions=positions):
        run = lab.generate(small, prompt, max_new_tokens=12)
    assert not torch.equal(run.prompt.input_ids, plain.prompt.input_ids)
    with steered(small, vector, positions=of_the_text):
        whole = lab.record(small, run.prompt)
    torch.testing.assert_close(run.logits, whole.logits[:, run.logit_positions], atol=1e-4, rtol=1e-4)
    assert torch.equal(whole.logits[:, run.logit_positions].argmax(-1), run.prompt.input_ids[:, 7:])


def test_generation_without_a_cache_is_steered_alike_where_positions_count_from_the_front(small):
    vector = random_vector(small, AT, size=2.0)
    with steered(small, vector, positions=slice(5, None)):
        cached = lab.generate(small, small.prompt(ROWS), max_new_tokens=6)
        uncached = lab.generate(small, small.prompt(ROWS), max_new_tokens=6, use_cache=False)
    assert torch.equal(cached.prompt.input_ids, uncached.prompt.input_ids)
    for positions in ("new", -1):
        with (
            pytest.raises(ValueError, match="passes of 7 and of 8 tokens"),
            steered(small, vector, positions=positions),
        ):
            lab.generate(small, small.prompt(ROWS), max_new_tokens=6, use_cache=False)


def test_positions_of_a_question_about_an_image_are_steered(tiny, asked):
    image = [position for position, kind in enumerate(asked.modality[0]) if kind == "image"]
    plain = lab.record(tiny, asked, at=AT)
    with steered(tiny, random_vector(tiny, AT, size=9.0), positions=image):
        run = lab.record(tiny, asked, at=AT)
    assert (run[AT] != plain[AT]).any(-1)[0].nonzero().flatten().tolist() == image
    assert (run.logits[0, -1] - plain.logits[0, -1]).abs().max() > 0.1


def test_gradients_flow_to_the_vector(small):
    vector = random_vector(small, AT)
    vector[AT].requires_grad_()
    with steered(small, vector, positions=-1):
        lab.record(small, small.prompt(ROWS), grad=True).logits[:, -1].sum().backward()
    gradient = vector[AT].grad
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize(
    ("name", "shape", "positions", "error", "message"),
    [
        (AT, 127, None, ValueError, r"has shape \[127\]; the hook point has \[1, 15, 128\]"),
        ("layers.1.self_attn.pattern", 15, None, ValueError, "is batch head query key, not batch seq"),
        ("embed", 128, None, ValueError, "take embed_merged"),
        ("layers.1.resid_pots", 128, None, KeyError, "layers.1.resid_post"),
        (AT, 128, "last", ValueError, "only 'new' has one"),
        (AT, 128, torch.ones(1, 15), ValueError, "Pass a boolean one"),
        (AT, 128, torch.ones(2, 15, dtype=torch.bool), ValueError, "the prompt is 1 x 15"),
        (AT, 128, [3, -16], ValueError, "the prompt has 15 places"),
        (AT, 128, 15, RuntimeError, "No token was steered: .* positions 0 to 14"),
        (AT, 128, "new", RuntimeError, "(?s)No token was steered.*Only steps of generation"),
    ],
)
def test_what_steers_nothing_is_refused(tiny, no_hooks_left, name, shape, positions, error, message):
    with pytest.raises(error, match=message), steered(tiny, {name: torch.ones(shape)}, positions=positions):
        lab.record(tiny, TEXT)


def test_a_block_in_which_nothing_ran_is_an_error(tiny):
    with pytest.raises(RuntimeError, match="no pass of the model ran"), steered(tiny, random_vector(tiny, AT)):
        pass


def test_passes_of_other_lengths_are_refused_where_positions_count_from_the_end(tiny):
    message = r"(?s)passes of 15 and of 6 tokens.*from the front"
    with steered(tiny, random_vector(tiny, AT), positions=-1):
        lab.record(tiny, TEXT)
        with pytest.raises(ValueError, match=message):
            lab.record(tiny, "The capital of France is")


def test_the_sentiment_vector_turns_held_out_reviews_round(tiny):
    def reviews(words, things, wording):
        asked = [f"Review: {chat.REVIEWS[wording].format(thing, word)}" for thing in things for word in words]
        return tiny.prompt([[{"role": "user", "content": text}] for text in asked], add_generation_prompt=True)

    known, unknown = chat.REVIEWED[:4], chat.REVIEWED[6:]
    vector = steering_vector(
        tiny, reviews(chat.GOOD[:4], known, 0), reviews(chat.BAD[:4], known, 0), at="layers.6.resid_post"
    )
    good, bad = (reviews(words[5:], unknown, 3) for words in (chat.GOOD, chat.BAD))
    metric = logit_diff("positive", "negative")
    assert (evaluated(metric, lab.record(tiny, good)) > 0).all()
    assert (evaluated(metric, lab.record(tiny, bad)) < 0).all()
    with steered(tiny, vector, positions=-1):
        assert (evaluated(metric, lab.record(tiny, bad)) > 0).all()
    with steered(tiny, vector, -1, positions=-1):
        assert (evaluated(metric, lab.record(tiny, good)) < 0).all()


def test_the_vector_from_french_to_spanish_translates_numbers_it_was_not_made_from(tiny):
    def prompt(language, numbers):
        return tiny.prompt(
            [translation.translation("English", language, n, 2).segments[0][0] for n in numbers]
        )  # fmt: skip

    at = "layers.3.resid_post"
    vector = steering_vector(tiny, prompt("Spanish", range(12)), prompt("French", range(12)), at=at)
    held_out = range(12, 17)
    with steered(tiny, vector, 2, positions=-1):
        steered_ids = lab.record(tiny, prompt("French", held_out)).logits[:, -1].argmax(-1).tolist()
    words = translation.NUMBER_WORDS["Spanish"]
    spanish = [tiny.prompt("Spanish").token_id(f" {words[n]}") for n in held_out]
    assert steered_ids == spanish
