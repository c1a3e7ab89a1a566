"""What an attention score is made of: an angle under a bound, and parts from content and from position.

In a RoPE layer with q/k norm queries and keys have the length `sqrt(d_head)`, so a score is `sqrt(d_head)` times the
cosine of an angle and cannot leave that range: there is a limit to how much a head can prefer one key to another. NoPE
layers have no such bound.

RoPE turns each pair of neighbouring features by its own angle for each token of distance. A score is a sum over these
pairs, each a band of one wavelength. What it would be at distance 0 is its content; the rest is position.
"""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.model.attention import SelfAttention
from llama4lab.model.facts import chunk_sizes, rotary_kind
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.rope import rotated
from llama4lab.run.run import Run
from llama4lab.tables.token_index import places

LIKE = 0.99  # cosine of two vectors that are alike but for the rounding of bfloat16
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def score_bound(model: HookedPreTrainedModel) -> pd.DataFrame:
    """Gives how large a score of each head can be, and how much one key can be preferred to another.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        bound: no score is larger, and none smaller than minus this: `sqrt(d_head)` with q/k norm, which RoPE layers
            have; infinite without. A temperature that such a layer was given multiplies it, by its factor at the last
            position.
        ratio: the most times that a query can attend more to one key than to another: `exp(2 * bound)`.
    """
    lines = []
    for layer, block in enumerate(model.text.layers):
        attention = block.self_attn
        bound = math.sqrt(attention.d_head) * _temperature(attention) if attention.qk_norm else math.inf
        kind, ratio = "rope" if attention.rope else "nope", float(np.exp(2 * bound))
        lines += [(layer, kind, head, bound, ratio) for head in range(attention.config.num_attention_heads)]
    return pd.DataFrame(lines, columns=["layer", "kind", "head", "bound", "ratio"])


def angles(
    run: Run, layers: int | Sequence[int] | None = None, *, quantiles: Sequence[float] = QUANTILES
) -> pd.DataFrame:
    """Gives which angles between queries and keys occur, over all keys that a query sees. Padding is left out.

    Everything about one head is in memory at a time: some numbers for each query and key. Of a run that was cut, keys
    are those at the positions that are left.

    Args:
        run: A run with `q_rot` and `k_rot`: `at="layers.*.self_attn.[qk]_rot"`.
        layers: A layer or several; by default all that were recorded.
        quantiles: Shares from 0 to 1; 0 is the least, 1 the largest that occurs.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        pairs: how many pairs of a query and a key it sees there are.
        quantile: the share of pairs with a cosine (and, by itself, a score) that is not larger.
        cosine: of the angle.
        angle: the angle in degrees: the larger the cosine, the smaller.
        score: the score before the softmax.

    Raises:
        KeyError: if `q_rot` or `k_rot` of a layer was not recorded.
        ValueError: if a quantile is not from 0 to 1.
    """
    if not quantiles or not all(0 <= share <= 1 for share in quantiles):
        raise ValueError(f"quantiles={list(quantiles)} was asked for; at least one is given, each from 0 to 1.")
    recorded = sorted(run.layers("self_attn.q_rot")) if layers is None else layers
    shares, parts = np.array(quantiles, dtype=float), []
    for layer in [recorded] if isinstance(recorded, int) else recorded:
        q, k = _rotated(run, layer)
        seen = _seen(run, layer)
        for head in range(q.shape[2]):
            asking, asked = q[:, :, head], k[:, :, head * k.shape[2] // q.shape[2]]
            scores = einsum(asking, asked, "batch query d, batch key d -> batch query key")
            lengths = asking.norm(dim=-1)[:, :, None] * asked.norm(dim=-1)[:, None, :]
            # Of a vector of length 0 there is no angle: it counts as a right one.
            cosines = (scores / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).clamp(-1, 1)[seen]
            columns = {"layer": layer, "kind": rotary_kind(run.meta, layer), "head": head, "pairs": len(cosines)}
            columns |= {"quantile": shares, "cosine": np.quantile(cosines.double().numpy(), shares)}
            columns["angle"] = np.degrees(np.arccos(columns["cosine"]))
            scaled = scores[seen].double().numpy() * q.shape[-1] ** -0.5
            parts.append(pd.DataFrame({**columns, "score": np.quantile(scaled, shares)}))
    return pd.concat(parts, ignore_index=True)


def score_split(run: Run, layer: int, head: int, row: int = 0) -> pd.DataFrame:
    """Splits the scores of one head into content and position, one line for each query and key that it sees.

    Args:
        run: A run with `at="layers.*.self_attn.[qk]*"`: queries and keys before and after RoPE.
        layer: The layer.
        head: The query head.
        row: Row of the prompt.

    Columns:
        row: row of the prompt.
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        query: position of the query in the prompt.
        key: position of the key.
        query_token: text of the query's token.
        key_token: text of the key's token.
        distance: how many tokens back the key stands.
        score: the score before the softmax.
        content: what the score would be at distance 0, with the same norms; all of it in a NoPE layer.
        positional: `score - content`: what the distance adds.

    Raises:
        KeyError: if one of the hook points was not recorded.
        IndexError: if there is no such head, or the run does not have the row.
    """
    own = _head(run, layer, head, row)
    whole, content = own.products.sum(-1), own.unturned.sum(-1)
    return own.lines.assign(score=whole, content=content, positional=whole - content)


def score_bands(
    model: HookedPreTrainedModel, run: Run, layer: int, head: int, row: int = 0, *, query: int | None = None
) -> pd.DataFrame:
    """Splits the scores of one head by the bands of RoPE: the pairs of features that turn at one speed.

    Args:
        model: The model, which knows the speeds.
        run: A run as for `score_split`.
        layer: The layer.
        head: The query head.
        row: Row of the prompt.
        query: Position of one query, negative ones counting from the end of the prompt; by default all queries.

    Columns:
        row, layer, kind, head, query, key, query_token, key_token, distance: as in `score_split`.
        band: number of the pair, from 0 for the fastest.
        frequency: by how much it turns for each token, in radians; 0 in a NoPE layer.
        wavelength: tokens of a whole turn.
        contribution: its part of the score: these sum to the score over the bands.
        content: what the part would be at distance 0.
        positional: `contribution - content`.

    Raises:
        KeyError: if one of the hook points was not recorded.
        IndexError: if there is no such head or query, or the run does not have the row.
        ValueError: if the model now turns queries and keys otherwise than when the run was recorded.
    """
    own = _head(run, layer, head, row)
    if query is not None:
        length = run.prompt.input_ids.shape[1]
        kept = (own.lines["query"] == (query + length if query < 0 else query)).to_numpy()
        if not kept.any():
            known = np.unique(own.lines["query"])
            raise IndexError(f"Query {query} was asked for; row {row} has queries {known[0]} to {known[-1]}.")
        own = _Head(own.lines.loc[kept, :], own.products[kept], own.unturned[kept])
    bands = own.products.shape[1]
    speeds = _speeds(model, run, layer)
    table = own.lines.loc[own.lines.index.repeat(bands), :].reset_index(drop=True)
    with np.errstate(divide="ignore"):
        lengths = 2 * np.pi / speeds
    return table.assign(
        band=np.tile(np.arange(bands), len(own.lines)),
        frequency=np.tile(speeds, len(own.lines)),
        wavelength=np.tile(lengths, len(own.lines)),
        contribution=own.products.ravel(),
        content=own.unturned.ravel(),
        positional=(own.products - own.unturned).ravel(),
    )


@dataclass(frozen=True, eq=False)
class _Head:
    """The queries and keys of one head in one row, and for each the parts of the score, with and without RoPE."""

    lines: pd.DataFrame
    products: Float[np.ndarray, "line band"]
    unturned: Float[np.ndarray, "line band"]


def _head(run: Run, layer: int, head: int, row: int) -> _Head:
    turned = _rotated(run, layer)
    bare = [run[f"layers.{layer}.self_attn.{name}"].detach().double().cpu() for name in "qk"]
    if not 0 <= head < turned[0].shape[2]:
        raise IndexError(f"Head {head} was asked for; layer {layer} has heads 0 to {turned[0].shape[2] - 1}.")
    if row not in run.rows:
        raise IndexError(f"Row {row} was asked for; the run has rows {', '.join(map(str, run.rows))}.")
    batch, kv_head = run.rows.index(row), head * turned[1].shape[2] // turned[0].shape[2]
    query, key = np.nonzero(_seen(run, layer)[batch].numpy())
    vectors = []
    for after, before, own, chosen in zip(turned, bare, (head, kv_head), (query, key), strict=True):
        after, before = after[batch, :, own].double(), before[batch, :, own]
        # RoPE keeps norms: what is between the two but for it (norm, temperature, a factor of yarn) is one factor.
        length = before.norm(dim=-1, keepdim=True)
        scaled = before * torch.where(length > 0, after.norm(dim=-1, keepdim=True) / length, 0.0)
        scaled = scaled if layer in run.meta["rope_layers"] else after
        vectors.append([x[chosen].unflatten(-1, (-1, 2)) for x in (after, scaled)])
    products, unturned = ((q * k).sum(-1).numpy() * (2 * q.shape[1]) ** -0.5 for q, k in zip(*vectors, strict=True))
    position = np.array(run.positions)
    place = places(run)[row]
    text = np.array(run.prompt.tokens[row], dtype=object)
    columns = {"row": row, "layer": layer, "kind": rotary_kind(run.meta, layer), "head": head}
    columns |= {"query": position[query], "key": position[key]}
    columns |= {"query_token": text[position[query]], "key_token": text[position[key]]}
    columns["distance"] = place[position[query]] - place[position[key]]
    return _Head(pd.DataFrame(columns), products, unturned)


@torch.no_grad()
def _speeds(model: HookedPreTrainedModel, run: Run, layer: int) -> Float[np.ndarray, " band"]:
    """By how much each pair turns for a token, after a check that the run turned so."""
    attention = model.text.layers[layer].self_attn
    rotate = model.text.rotary_emb if attention.rotate is None else attention.rotate
    place = torch.tensor(places(run)[np.ix_(run.rows, run.positions)])
    (after, _), before = _rotated(run, layer), run[f"layers.{layer}.self_attn.q"].detach().float().cpu()
    turned = rotated(before, rotate(place.clamp(min=0))) if attention.rope else before
    likeness = torch.nn.functional.cosine_similarity(turned, after, dim=-1)[place >= 0]
    if bool((likeness < LIKE).any()):
        raise ValueError(
            f"The queries of layer {layer} were not turned as this model turns them.\n"
            "Pass the model of the run, edited as it was when the run was recorded."
        )
    if not attention.rope:
        return np.zeros(attention.d_head // 2)
    cos, sin = rotate(torch.tensor([[1]]))[0, 0].double().unbind(-1)
    return torch.atan2(sin, cos).numpy()


def _temperature(attention: SelfAttention) -> float:
    """The largest factor that a layer multiplies its scores with, up to the last position."""
    if attention.tuning is False:
        return 1.0
    if callable(attention.tuning):
        return math.inf  # any function of the position
    last = torch.tensor([[attention.config.max_position_embeddings - 1]])
    return abs(float(attention.temperature(last)))


def _rotated(run: Run, layer: int) -> tuple[Float[Tensor, "batch seq head d"], Float[Tensor, "batch seq kv_head d"]]:
    q, k = (run[f"layers.{layer}.self_attn.{name}"].detach().float().cpu() for name in ("q_rot", "k_rot"))
    return q, k


def _seen(run: Run, layer: int) -> Bool[Tensor, "batch query key"]:
    """Which of the recorded positions each of them sees."""
    if layer in run.meta.get("barred_layers", []):
        raise ValueError(f"Layer {layer} barred single keys in this run, and which is not known.\nRecord its pattern.")
    place = torch.tensor(places(run)[np.ix_(run.rows, run.positions)])
    query, key = place[:, :, None], place[:, None, :]
    seen = (key >= 0) & (key <= query)
    size = chunk_sizes(run.meta)[layer]
    return seen if size is None else seen & (key // size == query // size)
