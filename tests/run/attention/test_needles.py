"""Needles stand where they should."""

import pytest
import torch

import llama4lab as lab
from llama4lab.run.attention.editing import edited
from llama4lab.run.attention.needles import Needle, chunk_of, found, made, owners


@pytest.mark.parametrize("distance", [4, 5, 9, 23, 64, 101])
def test_the_fact_stands_so_far_before_the_end_and_is_asked_for(tiny, distance):
    for needle in made(tiny, owners(tiny, seed=3), distance, 8):
        words = [tiny.tokenizer.decode([token]) for token in needle.ids]
        assert needle.ids[needle.place] == needle.answer
        assert len(needle.ids) - 1 - needle.place == distance
        owner = words[-3]
        assert words[needle.place - 3 : needle.place + 1] == [owner, " has", " the", words[needle.place]]
        assert words[-3:] == [owner, " has", " the"]
        assert words.count(owner) == 2
        assert needle.ids.count(needle.answer) == 1
        assert tiny.prompt("".join(words[1:])).input_ids[0].tolist() == needle.ids  # as the tokenizer has it


@pytest.mark.parametrize("distance", [4, 23, 101])
def test_the_control_differs_in_the_owner_of_the_needle_alone(tiny, distance):
    for needle in made(tiny, owners(tiny, seed=3), distance, 8):
        assert needle.control is not None
        changed = [
            place for place, pair in enumerate(zip(needle.ids, needle.control, strict=True)) if len(set(pair)) > 1
        ]
        assert changed == [needle.place - 3]
        assert needle.control[changed[0]] not in needle.ids


def test_the_same_seed_gives_the_same_needles(tiny):
    first, second, other = (made(tiny, owners(tiny, seed=seed), 30, 4) for seed in (1, 1, 2))
    assert first == second
    assert first != other


@pytest.mark.parametrize("border", [None, -1, 0, 3, 9])
def test_a_border_moves_positions_and_nothing_else(small, random_ids, border):
    """Against one row at a time, at the positions that the border asks for."""
    needles = [Needle(random_ids(length, seed=length).tolist(), length, length // 2) for length in (9, 14, 21)]
    expected = []
    for needle in needles:
        offset = next(o for o in range(8) if border is None or (needle.place + o - border) % 8 == 0)
        positions = torch.arange(offset, offset + len(needle.ids))[None]
        with torch.no_grad():
            logits = small(torch.tensor([needle.ids]), position_ids=positions).logits[0, -1]
        expected.append(logits.log_softmax(-1)[needle.answer])
    correct, log_probs = found(small, needles, border)
    assert torch.allclose(log_probs, torch.stack(expected), atol=1e-5)
    assert correct.shape == (3,)


def test_a_needle_in_another_chunk_is_invisible_without_layers_that_see_it(small, random_ids):
    """With all layers confined, a needle before the last border changes nothing; a needle behind it does."""
    ids = random_ids(20).tolist()
    other = [*ids[:11], ids[11] % 100 + 1, *ids[12:]]  # the needle is 8 tokens before the end
    with edited(small, bar="earlier"):
        for border, hidden in ((-1, True), (0, True), (2, True)):
            pair = [found(small, [Needle(each, 5, 8)], border)[1] for each in (ids, other)]
            assert bool(torch.equal(*pair)) == hidden
        near = [*ids[:16], ids[16] % 100 + 1, *ids[17:]]
        pair = [found(small, [Needle(each, 5, 3)], 0)[1] for each in (ids, near)]
        assert not torch.equal(*pair)


WRONG = [
    (lambda _: ([1, 2, 3], 4), 3, "nothing stands 3 before"),
    (lambda _: ([[1, 2], [3, 4]], 4), 1, "one row of text"),
    (lambda _: ([1, 2, 3], 4000), 1, "no token"),
    (lambda _: ("a b c d", ""), 1, "no token"),
    (lambda _: ([1, 2, 3], 4, [1, 2]), 1, "gave 3 tokens, and a control of 2"),
]


@pytest.mark.parametrize(("make", "distance", "message"), WRONG)
def test_what_does_not_fit_is_refused(tiny, make, distance, message):
    with pytest.raises(ValueError, match=message):
        made(tiny, make, distance, 1)


def test_words_need_a_tokenizer_and_borders_need_chunks(tiny, small, new_text_model):
    with pytest.raises(ValueError, match="no tokenizer"):
        owners(small)
    with pytest.raises(ValueError, match="takes 4"):
        owners(tiny)(3)
    whole = new_text_model(attention_chunk_size=None)
    assert chunk_of(whole, [None]) is None
    with pytest.raises(ValueError, match="no layer has chunks"):
        chunk_of(whole, [None, 0])
    assert isinstance(tiny, lab.HookedLlama4)
