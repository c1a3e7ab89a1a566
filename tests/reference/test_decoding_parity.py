"""Decoding with a cache beside the full pass and beside transformers, in random cuts over chunk borders."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4lab.model.output import CACHE

LENGTH = 40
CHUNK = 8


@pytest.fixture(scope="module")
def text(text_twins):
    return text_twins()


@pytest.fixture(scope="module")
def pair(text_twins):
    """Twins whose cached decoding transformers can do right: it counts temperature along the cache, as it should."""
    return text_twins(num_experts_per_tok=2)


@torch.no_grad()
def decoded(model, ids: torch.Tensor, cuts: list[int], **options) -> torch.Tensor:
    """Logits of a prompt that is fed in pieces, each after the cache of the pieces before."""
    pieces, cache = [], None
    for start, stop in pairwise([0, *cuts, ids.shape[1]]):
        step = {name: value[:, :stop] for name, value in options.items()} | {CACHE: cache}
        output = model(ids[:, start:stop], use_cache=True, **step)
        cache = output[CACHE]
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


cuts = st.lists(st.integers(1, LENGTH - 1), unique=True, max_size=4).map(sorted)


@settings(max_examples=30)
@given(cuts=cuts, kernel=st.sampled_from(["auto", "eager", "sdpa"]))
def test_decoding_in_random_cuts_equals_the_full_pass_and_transformers(cuts, kernel, text, random_ids):
    ours, theirs = text
    ours.attn = kernel
    ids = random_ids(2, LENGTH)
    logits = decoded(ours, ids, cuts)
    with torch.no_grad():
        torch.testing.assert_close(logits, ours(ids).logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits, decoded(theirs, ids, cuts), atol=2e-5, rtol=0)


@settings(max_examples=25)
@given(cuts=cuts, padding=st.tuples(st.integers(0, 20), st.integers(0, 20)), side=st.sampled_from(["left", "right"]))
def test_decoding_padded_rows_in_random_cuts_equals_the_row_alone(cuts, padding, side, text, random_ids):
    ours, theirs = text
    ours.attn = "auto"
    ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    for row, count in enumerate(padding):
        hidden = slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)
        ids[row, hidden] = mask[row, hidden] = 0
    logits = decoded(ours, ids, cuts, attention_mask=mask)
    assert logits.isfinite().all()
    for row in range(2):
        kept = mask[row].bool()
        with torch.no_grad():
            alone = theirs(ids[row : row + 1, kept]).logits[0]
        torch.testing.assert_close(logits[row, kept], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("first", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 20])
def test_decoding_token_by_token_over_chunk_borders_equals_transformers(first, pair, random_ids):
    ours, theirs = pair
    ids = random_ids(2, LENGTH)
    cuts = list(range(first, LENGTH))
    logits = decoded(ours, ids, cuts)
    torch.testing.assert_close(logits, decoded(theirs, ids, cuts), atol=2e-5, rtol=0)
    assert torch.equal(logits.argmax(-1), decoded(theirs, ids, cuts).argmax(-1))


@pytest.mark.parametrize("first", [1, CHUNK - 1, CHUNK, CHUNK + 1, 20])
def test_bfloat16_decoding_equals_transformers_to_the_bit(first, text_twins, random_ids):
    ours, theirs = text_twins(dtype=torch.bfloat16)
    ours.attn = "sdpa"
    ids, cuts = random_ids(2, LENGTH), list(range(first, LENGTH))
    assert torch.equal(decoded(ours, ids, cuts), decoded(theirs, ids, cuts))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 20])
@pytest.mark.parametrize("kernel", ["auto", "eager", "sdpa"])
def test_greedy_generation_gives_the_tokens_of_transformers(kernel, length, pair, random_ids):
    ours, theirs = pair
    ours.attn = kernel
    ids, asked = random_ids(2, length), {"max_new_tokens": 24, "do_sample": False}
    mask = torch.ones_like(ids)
    expected = theirs.generate(ids, attention_mask=mask, **asked)
    assert expected.shape == (2, length + 24)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **asked), expected)


@torch.no_grad()
def test_greedy_generation_of_padded_rows_gives_each_the_tokens_it_gets_alone(pair, random_ids):
    ours, theirs = pair
    ours.attn = "auto"
    ids, asked = random_ids(3, 20), {"max_new_tokens": 24, "do_sample": False}
    ids[1, :3] = ids[2, :11] = 0
    together = ours.generate(ids, attention_mask=(ids != 0).long(), **asked)[:, 20:]
    for row in range(3):
        alone = ids[row : row + 1, ids[row] != 0]
        expected = theirs.generate(alone, attention_mask=torch.ones_like(alone), **asked)[0, -24:]
        assert torch.equal(together[row], expected)


@torch.no_grad()
@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_gives_the_sequences_of_transformers(beams, pair, random_ids):
    ours, theirs = pair
    ids, asked = random_ids(2, 13), {"max_new_tokens": 16, "do_sample": False, "num_beams": beams}
    mask = torch.ones_like(ids)
    expected = theirs.generate(ids, attention_mask=mask, **asked)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **asked), expected)
