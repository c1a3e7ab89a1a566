"""Every path of the kernels gives what softmax under the dense mask gives: padding, packing, offsets, caches, GQA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4lab.model import attention_kernels
from llama4lab.model.token_layout import TokenLayout, token_layout

CPU = torch.device("cpu")
CHUNKS = st.sampled_from([None, 1, 2, 3, 5, 8])
HEADS = st.sampled_from([(4, 2), (3, 1), (2, 2)])
KERNELS = st.sampled_from([attention_kernels.fused, attention_kernels.dense])


def random_tensors(batch: int, heads: tuple[int, int], seq: int, key: int):
    generator = torch.Generator().manual_seed(batch * 100 + seq * 10 + key)
    q = torch.randn(batch, heads[0], seq, 4, generator=generator)
    k, v = (torch.randn(batch, heads[1], key, 4, generator=generator) for _ in range(2))
    return q, k, v


def by_definition(q, k, v, visible) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / 2
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)


def assert_kernel_right(kernel, layout: TokenLayout, tensors, chunk: int | None, key: int):
    """Compares at the tokens that are not padding, for a cache that gives the last `key` keys."""
    q, k, v = tensors
    visible = layout.visible(chunk, 0, layout.key_positions.shape[1])
    expected = by_definition(q, k, v, visible)
    z = kernel(q, k[:, :, -key:], v[:, :, -key:], layout, chunk, 0.0)
    kept = layout.query_valid.expand(q.shape[0], -1)
    torch.testing.assert_close(z.transpose(1, 2)[kept], expected.transpose(1, 2)[kept], atol=1e-5, rtol=1e-5)


def keys_kept(chunk: int | None, past: int, seq: int, trimmed: bool) -> int:
    """How many keys a growing cache gives: all, or what a chunked layer's cache has kept and the new ones."""
    return past + seq if chunk is None or not trimmed else min(past, chunk - 1) + seq


@settings(max_examples=300)
@given(
    kernel=KERNELS,
    heads=HEADS,
    chunk=CHUNKS,
    offset=st.integers(0, 20),
    past=st.integers(0, 20),
    seq=st.integers(1, 25),
    trimmed=st.booleans(),
)
def test_plain_rows_at_any_offset_after_any_cache(kernel, heads, chunk, offset, past, seq, trimmed):
    history = None
    if past:
        history = token_layout((2, past), CPU, position_ids=torch.arange(offset, offset + past)[None])
    positions = torch.arange(offset + past, offset + past + seq)[None]
    layout = token_layout((2, seq), CPU, past=past, history=history, position_ids=positions)
    assert layout.start == offset + past
    tensors = random_tensors(2, heads, seq, past + seq)
    assert_kernel_right(kernel, layout, tensors, chunk, keys_kept(chunk, past, seq, trimmed))


row = st.tuples(st.integers(0, 6), st.lists(st.integers(1, 9), min_size=1, max_size=3))


@settings(max_examples=300)
@given(
    kernel=KERNELS,
    heads=HEADS,
    chunk=CHUNKS,
    rows=st.lists(row, min_size=1, max_size=3),
    cut=st.integers(0, 20),
    trimmed=st.booleans(),
)
def test_padded_and_packed_rows_with_and_without_a_cache(kernel, heads, chunk, rows, cut, trimmed):
    total = max(left + sum(documents) for left, documents in rows)
    mask, positions = torch.zeros(2, len(rows), total, dtype=torch.long)
    for index, (_, documents) in enumerate(rows):
        counted = torch.cat([torch.arange(length) for length in documents])
        # Rows end together: what is left over is padding on the left.
        mask[index, total - len(counted) :] = 1
        positions[index, total - len(counted) :] = counted
    cut = min(cut, total - 1)
    history = None
    if cut:
        history = token_layout((len(rows), cut), CPU, attention_mask=mask[:, :cut], position_ids=positions[:, :cut])
    layout = token_layout(
        (len(rows), total - cut), CPU, attention_mask=mask, position_ids=positions[:, cut:], past=cut, history=history
    )
    tensors = random_tensors(len(rows), heads, total - cut, total)
    assert_kernel_right(kernel, layout, tensors, chunk, keys_kept(chunk, cut, total - cut, trimmed))


@settings(max_examples=60)
@given(chunk=CHUNKS, past=st.integers(0, 9), seq=st.integers(1, 9), empty=st.integers(1, 5), padded=st.booleans())
def test_the_empty_places_of_a_static_cache_are_never_read(chunk, past, seq, empty, padded):
    mask = torch.ones(2, past + seq, dtype=torch.long)
    mask[1, 0] = 0 if padded and past + seq > 1 else 1
    layout = token_layout((2, seq), CPU, attention_mask=mask, past=past)
    q, k, v = random_tensors(2, (4, 2), seq, past + seq)
    expected = by_definition(q, k, v, layout.visible(chunk, 0, past + seq))
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, empty), value=1e4) for x in (k, v))  # reading them would show
    kept = layout.query_valid.expand(2, -1)
    for kernel in (attention_kernels.fused, attention_kernels.dense):
        z = kernel(q, k, v, layout, chunk, 0.0)
        torch.testing.assert_close(z.transpose(1, 2)[kept], expected.transpose(1, 2)[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_pass_of_nothing_but_padding_gives_finite_numbers(chunk):
    layout = token_layout((2, 4), CPU, attention_mask=torch.zeros(2, 4, dtype=torch.long))
    z = attention_kernels.fused(*random_tensors(2, (4, 2), 4, 4), layout, chunk, 0.0)
    assert z.isfinite().all()


@settings(max_examples=40)
@given(chunk=st.sampled_from([None, 3, 8]), rows=st.lists(row, min_size=2, max_size=2))
def test_gradients_of_runs_equal_those_of_the_dense_mask(chunk, rows):
    total = max(left + sum(documents) for left, documents in rows) + 1
    mask = torch.stack([(torch.arange(total) >= total - sum(documents)).long() for _, documents in rows])
    layout = token_layout((2, total), CPU, attention_mask=mask)
    grads = []
    for by in ("runs", "definition"):
        q, k, v = (x.requires_grad_() for x in random_tensors(2, (4, 2), total, total))
        if by == "runs":
            z = attention_kernels.fused(q, k, v, layout, chunk, 0.0)
        else:
            z = by_definition(q, k, v, layout.visible(chunk, 0, total))
        (z * layout.query_valid[:, None, :, None] * torch.arange(total)[:, None]).sum().backward()
        grads.append([q.grad, k.grad, v.grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_keys_that_a_chunked_cache_has_dropped_are_not_silently_missing():
    """Padding after a row's tokens pushes them out of the window although later tokens belong to their chunk."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0]])
    history = token_layout((1, 9), CPU, attention_mask=mask)
    after = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0, 1]])
    layout = token_layout((1, 1), CPU, attention_mask=after, past=9, history=history)
    q, k, v = random_tensors(1, (4, 2), 1, 10)
    kept = keys_kept(5, 9, 1, trimmed=True)  # position 3 is of the chunk of positions 0 to 2, which are gone
    with pytest.raises(ValueError, match=r"(?i)padding"):
        attention_kernels.fused(q, k[:, :, -kept:], v[:, :, -kept:], layout, 5, 0.0)
