"""Prefill and decoding cut around the borders of chunks, at the positions where long texts are."""

import pytest
import torch

# One token before a multiple of 8,192; the chunks of the small model, 8 tokens, have their borders there too.
STARTS = [8_191, 65_535, 1_048_575, 10_485_759]
# The borders of 24 tokens from there on are before the tokens 1, 9 and 17.
CUTS = [1, 2, 7, 8, 9, 10, 11, 16, 17, 18]
LENGTH = 24


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request, new_text_model):
    return new_text_model(dtype=request.param)


@torch.no_grad()
def decoded(model, ids: torch.Tensor, start: int, cut: int) -> torch.Tensor:
    """Logits of the first `cut` tokens in one pass, then of one token at a time; only the first pass says where."""
    output = model(ids[:, :cut], position_ids=torch.arange(start, start + cut)[None], use_cache=True)
    pieces, cache = [output.logits], output.cache
    pieces += [model(ids[:, at : at + 1], cache=cache).logits for at in range(cut, ids.shape[1])]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("start", STARTS)
def test_cuts_around_borders_give_the_logits_of_the_full_pass(start, model, random_ids):
    """In bfloat16 other kernels round otherwise: single logits by up to a few steps of 2^-8 of the largest one."""
    ids = random_ids(2, LENGTH)
    expected = model(ids, position_ids=torch.arange(start, start + LENGTH)[None]).logits.float()
    tolerance = 2e-5 if model.dtype == torch.float32 else 2**-6 * expected.abs().max().item()
    for cut in CUTS:
        torch.testing.assert_close(decoded(model, ids, start, cut).float(), expected, atol=tolerance, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("start", STARTS)
def test_the_cache_holds_the_chunk_of_the_far_position(start, model, random_ids):
    """What a chunked layer still sees does not depend on the tokens before the border."""
    ids = random_ids(1, LENGTH)
    other = torch.cat([random_ids(1, 1, seed=1), ids[:, 1:]], dim=1)
    assert ids[0, 0] != other[0, 0]
    seen = []
    with model.hook_points().module("layers.0.self_attn.z").register_forward_hook(lambda m, i, z: seen.append(z)):
        for tokens in (ids, other):
            decoded(model, tokens, start, 5)
    steps = len(seen) // 2
    first, second = torch.cat(seen[:steps], 1), torch.cat(seen[steps:], 1)
    assert torch.equal(first[:, 1:], second[:, 1:])
    assert not torch.equal(first[:, 0], second[:, 0])
