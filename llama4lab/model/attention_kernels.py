"""Causal attention inside documents and chunks, without a dense mask wherever that is possible.

All functions take `[batch, head, seq, d_head]` queries and `[batch, kv_head, key, d_head]` keys and values and give
`[batch, head, seq, d_head]`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.model.packed_layout import PackedLayout
from llama4lab.model.token_layout import TokenLayout

Queries = Float[Tensor, "batch head seq d_head"]
Keys = Float[Tensor, "batch kv_head key d_head"]


def fused(q: Queries, k: Keys, v: Keys, layout: TokenLayout, chunk: int | None, dropout: float) -> Queries:
    """Attention by torch's fused kernel: chunk by chunk, document by document, with a mask only where a cache is read
    by rows of unlike layout.
    """
    seq, total = q.shape[2], layout.key_positions.shape[1]
    if k.shape[2] > total and not torch.compiler.is_compiling():
        k, v = k[:, :, :total], v[:, :, :total]  # a static cache gives its empty places too
    key = k.shape[2]
    whole = key == layout.past + seq or (layout.past > 0 and _window_holds_chunk(layout, chunk, key, seq))
    if layout.start is not None and whole:
        if seq == 1:
            return _sdpa(q, *_last(k, v, _reach(layout.start, chunk, key)), dropout=dropout)
        if chunk is not None:
            return _by_chunk(q, k, v, layout.start, chunk, dropout)
        if key == seq:
            return _sdpa(q, k, v, causal=True, dropout=dropout)
    if layout.start is None and layout.past == 0 and key == seq and not torch.compiler.is_compiling():
        return _by_block(q, k, v, layout, chunk, dropout)
    return _sdpa(q, k, v, mask=visible_keys(layout, chunk, key).unsqueeze(1), dropout=dropout)


def dense(q: Queries, k: Keys, v: Keys, layout: TokenLayout, chunk: int | None, dropout: float) -> Queries:
    """Attention by one call of torch's fused kernel over all keys, the way transformers makes it."""
    seq, key, total = q.shape[2], k.shape[2], layout.key_positions.shape[1]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    offset = layout.offset
    one_chunk = offset is not None and (chunk is None or offset % chunk + total < chunk)
    if one_chunk and key == total and seq in (1, total):
        return _sdpa(q, k, v, causal=seq > 1, dropout=dropout)
    mask = visible_keys(layout, chunk, key).unsqueeze(1)
    return _sdpa(q, k, v, mask=mask.expand(q.shape[0], 1, seq, key), dropout=dropout)


def masked(
    q: Queries, k: Keys, v: Keys, layout: TokenLayout, chunk: int | None, mask: Tensor, dropout: float
) -> Queries:
    """Attention by one call of torch's fused kernel under a caller's own 4-D mask."""
    bias = additive_mask(layout, chunk, k.shape[2], mask).to(q.dtype)
    return _sdpa(q, k, v, mask=bias, dropout=dropout)


def visible_keys(layout: TokenLayout, chunk: int | None, key: int) -> Bool[Tensor, "#batch query key"]:
    """Which of the `key` keys that the cache gave each query may see.

    A growing cache gives the last `key` tokens; a static one gives places from the first token on, empty ones included.

    Raises:
        ValueError: if a query should see keys that the cache of a chunked layer has dropped already.
    """
    first = max(layout.key_positions.shape[1] - key, 0)
    if first and layout.start is None and not torch.compiler.is_compiling():
        lost = int(layout.visible(chunk, 0, first).any(0).any(0).sum())
        if lost:
            raise ValueError(
                f"Padding between tokens has pushed {lost} tokens of a chunk out of the cache, which keeps the last "
                f"{key}.\nPad on the left, or pass the whole rows again."
            )
    return layout.visible(chunk, first, key)


def check_kept(layout: TokenLayout | PackedLayout, chunk: int | None, key: int) -> None:
    """Refuses a cache that has dropped keys which a layer sees, as one made for smaller chunks has.

    Rows with padding are checked by `visible_keys`.

    Raises:
        ValueError: if it has.
    """
    if torch.compiler.is_compiling() or isinstance(layout, PackedLayout) or layout.start is None:
        return
    past = layout.past if chunk is None else min(layout.past, layout.start % chunk)
    if key < past + layout.positions.shape[1]:
        raise ValueError(
            f"The cache keeps {key - layout.positions.shape[1]} earlier tokens of a layer that sees {past}: it was "
            "made for fewer tokens or smaller chunks.\nRun the whole rows again, with a new cache."
        )


def additive_mask(
    layout: TokenLayout, chunk: int | None, key: int, mask: Tensor | None
) -> Float[Tensor, "#batch #head query key"]:
    """0 where a query may look, -inf elsewhere.

    Args:
        layout: Where the tokens stand.
        chunk: Chunk size of the layer, or None.
        key: Number of keys that the cache gave.
        mask: A caller's own 4-D mask, boolean or additive, over all keys so far; it narrows what the layer allows.

    Raises:
        ValueError: if the mask has another number of queries or keys.
    """
    visible = visible_keys(layout, chunk, key).unsqueeze(1)
    bias = torch.zeros((1, 1, 1, 1), device=visible.device)
    if mask is not None:
        mask = mask[..., -key:] if mask.shape[-1] == layout.key_positions.shape[1] else mask
        if mask.shape[-2:] != visible.shape[-2:]:
            raise ValueError(
                f"A 4-D attention_mask has the shape {list(mask.shape)}; here are {visible.shape[-2]} queries and "
                f"{key} keys.\nPass [batch, 1 or heads, {visible.shape[-2]}, {layout.key_positions.shape[1]}]."
            )
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        bias = bias if mask.dtype == torch.bool else mask.float().masked_fill(~allowed, 0.0)
        visible = visible & allowed
        # A row that sees nothing would divide by zero; it is left to look at itself.
        past = visible.shape[-1] - visible.shape[-2]
        itself = torch.ones(visible.shape[-2:], dtype=torch.bool, device=visible.device).triu(past).tril(past)
        visible = visible | (itself & ~visible.any(-1, keepdim=True))
    return bias.expand(torch.broadcast_shapes(bias.shape, visible.shape)).masked_fill(~visible, -torch.inf)


def _window_holds_chunk(layout: TokenLayout, chunk: int | None, key: int, seq: int) -> bool:
    # A cache that keeps one chunk gives fewer keys than there are tokens, yet all that the first query may see.
    if chunk is None or layout.start is None:
        return False
    return seq + min(layout.past, layout.start % chunk) <= key <= layout.past + seq


def _reach(position: int, chunk: int | None, key: int) -> int:
    """How many of the last keys a query at `position`, which is the last token, may see."""
    return key if chunk is None else min(position % chunk + 1, key)


def _last(k: Keys, v: Keys, count: int) -> tuple[Tensor, Tensor]:
    return k[:, :, k.shape[2] - count :], v[:, :, v.shape[2] - count :]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
    )


def _by_chunk(q: Queries, k: Keys, v: Keys, start: int, chunk: int, dropout: float) -> Queries:
    """Plain rows: the rest of a chunk that was begun, then whole chunks folded into the batch, then the last piece."""
    seq = q.shape[2]
    begun = start % chunk
    first = min(seq, chunk - begun) if begun else 0
    pieces = []
    if first:
        end = k.shape[2] - (seq - first)
        reach = min(begun, k.shape[2] - seq) + first
        keys, values = k[:, :, end - reach : end], v[:, :, end - reach : end]
        if reach == first:
            pieces.append(_sdpa(q[:, :, :first], keys, values, causal=True, dropout=dropout))
        else:
            mask = torch.ones(first, reach, dtype=torch.bool, device=q.device).tril(reach - first)
            pieces.append(_sdpa(q[:, :, :first], keys, values, mask=mask, dropout=dropout))
    q, (k, v) = q[:, :, first:], _last(k, v, seq - first)
    body = (seq - first) // chunk * chunk
    if body:
        fold = "batch head (chunk length) d -> (batch chunk) head length d"
        folded = [rearrange(x[:, :, :body], fold, length=chunk) for x in (q, k, v)]
        z = _sdpa(*folded, causal=True, dropout=dropout)
        unfold = "(batch chunk) head length d -> batch head (chunk length) d"
        pieces.append(rearrange(z, unfold, chunk=body // chunk))
    if body < seq - first:
        pieces.append(_sdpa(q[:, :, body:], k[:, :, body:], v[:, :, body:], causal=True, dropout=dropout))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _by_block(q: Queries, k: Keys, v: Keys, layout: TokenLayout, chunk: int | None, dropout: float) -> Queries:
    """Padded or packed rows without a cache: gather each run of tokens, fill it up at its end, attend causally.

    Filling needs no mask, because it comes after every token of its run. Padding gets zeros.
    """
    batch, _, seq, _ = q.shape
    tokens = [rearrange(x, "batch head seq d -> (batch seq) head d") for x in (q, k, v)]
    places, results = [], []
    for block in layout.blocks(chunk):
        gathered = [x[block.clamp(min=0)].transpose(1, 2) for x in tokens]
        z = _sdpa(*gathered, causal=True, dropout=dropout)
        places.append(block[block >= 0])
        results.append(z.transpose(1, 2)[block >= 0])
    if not results:
        return torch.zeros_like(q)  # nothing but padding
    z = torch.zeros_like(tokens[0]).index_copy(0, torch.cat(places), torch.cat(results))
    return rearrange(z, "(batch seq) head d -> batch head seq d", batch=batch, seq=seq)
