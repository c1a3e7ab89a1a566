"""The cache keeps what later tokens can see: one chunk in chunked layers, everything in NoPE layers."""

import pytest
import torch
from transformers import StaticCache

from llama4lab.model.cache import ChunkedLayerCache, new_cache


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@torch.no_grad()
def decode(model, ids, cache, cut: int) -> torch.Tensor:
    """The logits after feeding the first `cut` tokens, then one at a time."""
    pieces = [model(ids[:, :cut], cache=cache).logits]
    pieces += [model(ids[:, at : at + 1], cache=cache).logits for at in range(cut, ids.shape[1])]
    return torch.cat(pieces, dim=1)


def kept(cache) -> list[int]:
    """How many tokens each layer holds."""
    return [layer.keys.shape[-2] for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_chunked_layers_keep_less_than_a_chunk_and_nope_layers_everything(length, model, random_ids):
    cache = model(random_ids(2, length), use_cache=True).cache
    assert kept(cache) == [min(length, 7)] * 3 + [length, min(length, 7)]
    assert cache.get_seq_length() == length


@torch.no_grad()
def test_what_a_chunk_forgets_gives_its_memory_back_at_once(model, random_ids):
    cache = model(random_ids(2, 200), use_cache=True).cache
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() <= 2 * layer.keys.nbytes
        assert layer.values.untyped_storage().nbytes() <= 2 * layer.values.nbytes


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 3, 8, None])
def test_decoding_equals_the_full_pass_for_every_chunk_size(chunk, new_text_model, random_ids):
    """N13: with a chunk of 1, transformers keeps the slice from -0, which is everything."""
    model, ids = new_text_model(attention_chunk_size=chunk), random_ids(2, 20)
    expected = model(ids).logits
    for cut in (1, 5, 8):
        cache = new_cache(model.config)
        torch.testing.assert_close(decode(model, ids, cache, cut), expected, atol=1e-5, rtol=0)
        if chunk is not None:
            assert all(kept(cache)[layer] <= chunk - 1 for layer in (0, 1, 2, 4))


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
def test_a_static_cache_gives_the_logits_of_the_full_pass(kernel, new_text_model, random_ids):
    model, ids = new_text_model(), random_ids(2, 20)
    model.attn = kernel
    cache = StaticCache(config=model.config, max_cache_len=32)
    torch.testing.assert_close(decode(model, ids, cache, 5), model(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("fed", "removed"), [(6, 2), (12, 3), (15, 7), (16, 1), (20, 4)])
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been(fed, removed, model, random_ids):
    ids, other = random_ids(1, fed), random_ids(1, 12, seed=1)
    left = fed - removed
    expected = model(torch.cat([ids[:, :left], other], 1)).logits[:, left:]
    cache = new_cache(model.config)
    cache.activate_past_recording()
    model(ids, cache=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == left
    logits = torch.cat([model(other[:, :5], cache=cache).logits, model(other[:, 5:], cache=cache).logits], 1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fed", range(9, 26))
@pytest.mark.parametrize("removed", [1, 3, 8])
def test_a_crop_without_recording_goes_on_rightly_or_is_refused(fed, removed, model, random_ids):
    """N15. Never a third thing: it is possible exactly if the chunk of the next token is still held."""
    ids, other = random_ids(1, fed), random_ids(1, 12, seed=1)
    left = fed - removed
    cache = new_cache(model.config)
    model(ids, cache=cache)
    if fed - 7 > left // 8 * 8:  # the last 7 tokens are held; the chunk of token `left` begins before them
        with pytest.raises(ValueError, match=f"{removed} of {fed} tokens"):
            cache.crop(-removed)
        assert cache.get_seq_length() == fed
        return
    cache.crop(-removed)
    expected = model(torch.cat([ids[:, :left], other], 1)).logits[:, left:]
    torch.testing.assert_close(model(other, cache=cache).logits, expected, atol=1e-5, rtol=0)


def test_a_refused_crop_leaves_every_layer_as_it_was(model, random_ids):
    cache = model(random_ids(1, 20), use_cache=True).cache
    before = [(layer.get_seq_length(), layer.keys.clone()) for layer in cache.layers]
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(-13)
    for layer, (length, keys) in zip(cache.layers, before, strict=True):
        assert layer.get_seq_length() == length
        assert torch.equal(layer.keys, keys)


@torch.no_grad()
def test_reordered_rows_of_a_cache_decode_as_those_rows(model, random_ids):
    ids, after = random_ids(3, 13), random_ids(3, 6, seed=1)
    order = torch.tensor([2, 0, 0])
    cache = model(ids, use_cache=True).cache
    cache.reorder_cache(order)
    logits = model(after, cache=cache).logits
    expected = model(torch.cat([ids[order], after], 1)).logits[:, 13:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_repeated_rows_of_a_padded_cache_decode_as_those_rows(model, random_ids):
    ids, after = random_ids(2, 13), random_ids(4, 6, seed=1)
    ids[1, :5] = 0
    mask = (ids != 0).long()
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    cache.batch_repeat_interleave(2)
    mask = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, 6, dtype=torch.long)], 1)
    logits = model(after, attention_mask=mask, cache=cache).logits
    whole = torch.cat([ids.repeat_interleave(2, 0), after], 1)
    expected = model(whole, attention_mask=mask).logits[:, 13:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padded_rows_that_beam_search_reorders_keep_their_own_padding(model, random_ids):
    """A reordered cache whose rows have unlike padding: the mask, which is reordered too, decides."""
    ids, after = random_ids(2, 13), random_ids(2, 6, seed=1)
    ids[1, :5] = 0
    mask, order = (ids != 0).long(), torch.tensor([1, 0])
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    cache.reorder_cache(order)
    mask = torch.cat([mask[order], torch.ones(2, 6, dtype=torch.long)], 1)
    logits = model(after, attention_mask=mask, cache=cache).logits
    expected = model(torch.cat([ids[order], after], 1), attention_mask=mask).logits[:, 13:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_decoding_after_padding_behind_the_tokens_is_right_or_refused(model, random_ids):
    """The padding pushes tokens of the chunk out of the window of a chunked layer."""
    ids, after = random_ids(1, 3), random_ids(1, 1, seed=1)
    padded = torch.cat([ids, torch.zeros(1, 10, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    cache = model(padded, attention_mask=mask, use_cache=True).cache
    mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
    with pytest.raises(ValueError, match=r"(?i)padding"):
        model(after, attention_mask=mask, cache=cache)


@torch.no_grad()
def test_positions_that_start_later_go_on_in_the_cache(model, random_ids):
    ids, positions = random_ids(2, 20), torch.arange(5, 25)[None]
    expected = model(ids, position_ids=positions).logits
    cache = new_cache(model.config)
    pieces = [model(ids[:, :6], position_ids=positions[:, :6], cache=cache).logits]
    pieces += [model(ids[:, at : at + 1], cache=cache).logits for at in range(6, 20)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=0)


def test_a_model_without_chunks_keeps_everything(new_text_model, random_ids):
    cache = new_cache(new_text_model(attention_chunk_size=None).config)
    assert not any(isinstance(layer, ChunkedLayerCache) for layer in cache.layers)


@torch.no_grad()
def test_a_pass_without_cache_returns_none(model, random_ids):
    assert model(random_ids(1, 5), use_cache=False).cache is None
    assert model(random_ids(1, 5)).cache is not None  # as the config says


@torch.no_grad()
@pytest.mark.parametrize("room", [5, 8, 12, 19])
def test_a_static_cache_that_is_too_short_is_refused_in_words(room, model, random_ids):
    """At once, or at the first token that has no place; a chunk may be longer than the cache."""
    ids = random_ids(1, 20)
    message = rf"room for {room} tokens; with this pass there are {{}}(?s:.*)max_cache_len={{}}"
    with pytest.raises(ValueError, match=message.format(20, 20)):
        model(ids, cache=StaticCache(config=model.config, max_cache_len=room))
    with pytest.raises(ValueError, match=message.format(room + 1, room + 1)):
        decode(model, ids, StaticCache(config=model.config, max_cache_len=room), 3)
    fitting = StaticCache(config=model.config, max_cache_len=room)
    expected = model(ids[:, :room]).logits
    torch.testing.assert_close(decode(model, ids[:, :room], fitting, 3), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_static_cache_of_smaller_chunks_is_refused_in_words(new_text_model, random_ids):
    model, ids = new_text_model(), random_ids(1, 20)
    cache = StaticCache(config=model.config, max_cache_len=32)
    for layer in model.text.layers:
        layer.self_attn.chunk_size = layer.self_attn.chunk_size and 16
    with pytest.raises(ValueError, match="made for fewer tokens or smaller chunks"):
        decode(model, ids, cache, 3)
