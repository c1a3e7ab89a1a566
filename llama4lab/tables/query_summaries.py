"""Where single queries look, from their rows of a pattern, or from their vectors where no pattern was kept."""

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

MEASURES = ("own_chunk", "earlier", "first_token", "itself", "distance", "entropy")


def looks(
    pattern: Float[Tensor, "token head key"],
    place: Int[Tensor, " token"],
    key_place: Int[Tensor, "token key"],
    chunk: int | None,
) -> dict[str, Float[Tensor, "token head"]]:
    """Gives where each token looks: attention to its own chunk, earlier ones, the first token and itself; the mean
    distance of what it looks at, in tokens; the entropy over keys, in nats.

    Args:
        pattern: Attention of the tokens.
        place: Number of each token in its row from 0, without padding.
        key_place: The same of the keys that it may look at; negative for padding.
        chunk: Chunk size; None for one chunk.
    """
    pattern = pattern.detach().float()
    place, key_place = place.to(pattern.device)[:, None], key_place.to(pattern.device)
    size = chunk or int(place.max()) + 1
    own = key_place // size == place // size
    distance = (place - key_place).clamp(min=0)
    counted = {
        "own_chunk": own,
        "earlier": (key_place >= 0) & (key_place // size < place // size),
        "first_token": key_place == 0,
        "itself": key_place == place,
        "distance": distance,
    }
    found = {name: _summed(pattern, weight.float()) for name, weight in counted.items()}
    return {**found, "entropy": torch.special.entr(pattern).sum(-1)}


def pattern_rows(
    q: Float[Tensor, "token head d_head"],
    k: Float[Tensor, "key kv_head d_head"],
    place: Int[Tensor, " token"],
    key_place: Int[Tensor, " key"],
    chunk: int | None,
) -> Float[Tensor, "token head key"]:
    """Gives the attention of some tokens of one row, from queries and keys as scores are made of them.

    Args:
        q: The queries (`q_rot`) of the tokens.
        k: The keys (`k_rot`) of the row.
        place: Number of each token in the row from 0, without padding.
        key_place: The same of the keys; negative for padding.
        chunk: Chunk size of the layer; None if it sees everything before.
    """
    q = rearrange(q.float(), "token (kv group) d -> token kv group d", kv=k.shape[1])
    scores = einsum(q, k.float(), "token kv group d, key kv d -> token kv group key") * q.shape[-1] ** -0.5
    place, key_place = place.to(q.device)[:, None], key_place.to(q.device)[None]
    seen = (key_place >= 0) & (key_place <= place)
    if chunk is not None:
        seen &= key_place // chunk == place // chunk
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return rearrange(scores.softmax(-1), "token kv group key -> token (kv group) key")


def _summed(
    pattern: Float[Tensor, "token head key"], weight: Float[Tensor, "token key"]
) -> Float[Tensor, "token head"]:
    return einsum(pattern, weight, "token head key, token key -> token head")
