"""Attention where some keys are barred: only their own queries see them.

For all other queries such a key is as good as padding. The queries of barred keys themselves, few as a rule, are
computed again with a mask of their own, so that no mask over all pairs of positions is needed.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4lab.model.attention_kernels import fused
from llama4lab.model.token_layout import PADDING, TokenLayout

QUERIES = 256  # barred ones that are computed at once: the mask has so many lines
FIRST = "first_token"


def attended(
    q: Float[Tensor, "batch head seq d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    layout: TokenLayout,
    chunk: int | None,
    *,
    barred: frozenset[int | str],
    dropout: float = 0.0,
) -> Float[Tensor, "batch head seq d_head"]:
    """Attention by torch's fused kernel past barred keys.

    Args:
        q: The queries.
        k: The keys.
        v: The values.
        layout: Where the tokens stand.
        chunk: Chunk size of the layer, or None.
        barred: Places in the rows, padding counted, and "first_token" for the first one of each document.
        dropout: Of the pattern.
    """
    hidden = hidden_keys(layout, barred)
    documents = layout.documents.expand(q.shape[0], -1).masked_fill(hidden, PADDING)
    key_positions = layout.key_positions.expand(documents.shape)
    narrowed = replace(layout, documents=documents, key_positions=key_positions, start=None, _blocks={})
    z = fused(q, k, v, narrowed, chunk, dropout)
    own = hidden[:, layout.past :]
    for some in own.any(0).nonzero().squeeze(-1).split(QUERIES):
        mask = _visible(layout, chunk, hidden, some, k.shape[2])[:, None]
        again = F.scaled_dot_product_attention(
            q[:, :, some], k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
        kept = torch.where(own[:, None, some, None], again, z[:, :, some])
        z = z.index_copy(2, some, kept)
    return z


def narrowed_mask(layout: TokenLayout, barred: frozenset[int | str], key: int, mask: Tensor | None) -> Tensor:
    """A mask over all pairs, for kernels that have one anyway: it hides barred keys from all queries but their own.

    Args:
        layout: Where the tokens stand.
        barred: Places in the rows, padding counted, and "first_token" for the first one of each document.
        key: Number of keys that the cache gave.
        mask: A caller's own 4-D mask, which is narrowed.
    """
    total, seq = layout.key_positions.shape[1], layout.positions.shape[1]
    first = max(total - key, 0)
    hidden = F.pad(hidden_keys(layout, barred)[:, first:], (0, max(key - total, 0)))
    storage = torch.arange(first, first + key, device=hidden.device)
    itself = storage == torch.arange(layout.past, layout.past + seq, device=storage.device)[:, None]
    allowed = (~hidden[:, None, :] | itself).unsqueeze(1)
    if mask is None:
        return allowed
    mask = mask[..., -key:] if mask.shape[-1] == total else mask
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)


def hidden_keys(layout: TokenLayout, barred: frozenset[int | str]) -> Bool[Tensor, "#batch total"]:
    """Which of all tokens so far are barred as keys."""
    documents = layout.documents
    storage = torch.arange(documents.shape[1], device=documents.device)
    places = [place for place in barred if isinstance(place, int)]
    hidden = torch.isin(storage, storage.new_tensor(places)).unsqueeze(0)
    if FIRST in barred:
        before = F.pad(documents.cummax(1).values[:, :-1], (1, 0), value=PADDING)
        hidden = hidden | ((documents != PADDING) & (documents > before))
    return hidden


def _visible(
    layout: TokenLayout,
    chunk: int | None,
    hidden: Bool[Tensor, "#batch total"],
    queries: Int[Tensor, " query"],
    key: int,
) -> Bool[Tensor, "#batch query key"]:
    """Which of the `key` keys from the cache some queries see: themselves, and earlier ones that are not barred."""
    first, at = max(layout.key_positions.shape[1] - key, 0), layout.past + queries
    keys, documents = layout.key_positions[:, None, first:], layout.documents[:, None, first:]
    asking, own = layout.positions[:, queries, None], layout.documents[:, at, None]
    seen = (keys <= asking) & (documents == own) & (own != PADDING) & ~hidden[:, None, first:]
    if chunk is not None:
        seen = seen & (keys // chunk == asking // chunk)
    itself = torch.arange(first, first + keys.shape[-1], device=at.device) == at[:, None]
    return F.pad(seen | itself, (0, key - keys.shape[-1]))
