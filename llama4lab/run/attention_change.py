"""What a patched query or key changes in its attention head: by the softmax itself, not by its slope.

Where attention is sharp, the slope of the softmax is nearly 0 and says nothing of a query that finds another token. The
new weights are known exactly: those of a query in all keys by one softmax, those of one key in closed form.
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from llama4lab.run.block_change import wide

ASKING = (".self_attn.q", ".self_attn.q_rot")
ASKED = (".self_attn.k", ".self_attn.k_rot")
START = ("q_rot", "k_rot", "v", "scores")  # what the softmax runs again from


def is_matching(name: str) -> bool:
    """Whether a hook point holds queries or keys."""
    return name.endswith(ASKING + ASKED)


def query_change(
    delta: Float[Tensor, "batch seq head d_head"],
    k: Float[Tensor, "batch seq kv_head d_head"],
    v: Float[Tensor, "batch seq kv_head d_head"],
    scores: Float[Tensor, "batch head seq seq"],
    slope: Float[Tensor, "batch seq head d_head"],
) -> Float[Tensor, "batch seq head"]:
    """The effect of changing each query alone, linear in `z` and exact up to there.

    Args:
        delta: Change of the queries, as they are when scores are made from them (`q_rot`).
        k: Keys of the base run (`k_rot`).
        v: Its values.
        scores: Its scores, masked.
        slope: Derivative of the metric with respect to `z`.
    """
    k, v = (_spread(t, delta.shape[2]) for t in (k, v))
    moved = einsum(wide(delta), k, "batch query head d, batch key head d -> batch head query key")
    new = (scores + moved * delta.shape[-1] ** -0.5).softmax(-1) - scores.softmax(-1)
    worth = einsum(wide(slope), v, "batch query head d, batch key head d -> batch head query key")
    return rearrange((new * worth).sum(-1), "batch head query -> batch query head")


def key_change(
    delta: Float[Tensor, "batch seq kv_head d_head"],
    q: Float[Tensor, "batch seq head d_head"],
    v: Float[Tensor, "batch seq kv_head d_head"],
    scores: Float[Tensor, "batch head seq seq"],
    slope: Float[Tensor, "batch seq head d_head"],
) -> Float[Tensor, "batch seq kv_head"]:
    """The effect of changing each key alone, for all queries that see it; linear in `z` and exact up to there.

    A key of weight w whose score rises by s gets the weight sigmoid(logit(w) + s); the others keep their proportions.

    Args:
        delta: Change of the keys, as they are when scores are made from them (`k_rot`).
        q: Queries of the base run (`q_rot`).
        v: Its values.
        scores: Its scores, masked.
        slope: Derivative of the metric with respect to `z`.
    """
    groups = delta.shape[2]
    delta, v = (_spread(t, q.shape[2]) for t in (delta, v))
    rise = einsum(wide(q), delta, "batch query head d, batch key head d -> batch head query key") * q.shape[-1] ** -0.5
    # In double precision, for what is left beside a key of weight nearly 1.
    rise, log_weight = rise.double(), scores.double().log_softmax(-1)
    weight = log_weight.exp()
    log_rest = torch.log1p(-weight.clamp(max=1.0))
    new = torch.sigmoid(log_weight - log_rest + rise)
    # What the value of this key is worth beyond what the others are worth together.
    worth = einsum(wide(slope), v, "batch query head d, batch key head d -> batch head query key").double()
    whole = (weight * worth).sum(-1, keepdim=True)
    rest = (whole - weight * worth) / (1 - weight)
    change = torch.where(weight < 1, (new - weight) * (worth - rest), 0.0)
    change = rearrange(change.sum(2), "batch (kv_head group) key -> batch key kv_head group", kv_head=groups).sum(-1)
    return change.to(scores.dtype)


def _spread(tensor: Float[Tensor, "batch seq kv_head d_head"], heads: int) -> Float[Tensor, "batch seq head d_head"]:
    """Keys and values once for each head that shares them."""
    return wide(tensor).repeat_interleave(heads // tensor.shape[2], dim=2)
