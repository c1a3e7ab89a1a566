"""What a head reads and writes by its weights alone, in words of the vocabulary.

A head has two circuits (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits). OV: what it writes if
it looks at a token. QK: which token it looks at. Both are read here straight from the embeddings through the input norm
of the layer, as if nothing came before the layer: exact for what layer 0 reads, a first look at the others.

Query heads that share keys and values read through the same ones. No matrix of vocabulary x vocabulary is kept.
"""

# torch declares submodules as tensors or modules.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.attention import SelfAttention
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.tokenizer import token_id, token_strings
from llama4lab.run.metrics import Tokens
from llama4lab.run.unembedding import CHUNK_NBYTES
from llama4lab.tables.attention.head_weights import bias_of, kv_head_of, projected, raised_logits, turned


@torch.no_grad()
def ov(
    model: HookedPreTrainedModel, layer: int, head: int, tokens: Tokens | None = None, *, k: int = 10
) -> pd.DataFrame:
    """Gives what a head writes for a token that it looks at: the tokens whose logits it raises most.

    Args:
        model: The model.
        layer: The layer.
        head: The query head.
        tokens: The tokens that are looked at, texts or ids; by default all of the vocabulary.
        k: How many tokens are given for each.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        kv_head: the head whose keys and values it reads.
        in_id: id of the token that is looked at.
        token_in: its text.
        rank: 0 for the token that is raised most.
        out_id: id of the token that is raised.
        token_out: its text.
        score: what the head adds to that logit if it gives the token all of its attention, the final norm dividing by 1
            (its weight is in). The mean over the vocabulary, which changes no probability, is taken off.
        own_rank: rank of `token_in` itself, the same in all its lines; 0 for a head that copies.

    Raises:
        IndexError: if there is no such layer, head or token.
        ValueError: if `k` is less than 1.
    """
    attention, ids = _asked(model, layer, head, tokens, k)
    values = projected(model, layer, ids, attention.v_proj)[:, kv_head_of(attention, head)]
    out = raised_logits(model, attention, head)
    parts = []
    for own, scores in _scored(values, out.mT):
        best, found = scores.topk(min(k, scores.shape[1]), dim=1)
        lines = _lines(model, ids[own], found, best, ("in_id", "token_in", "out_id", "token_out"))
        parts.append({**lines, **_own_rank(scores, ids[own], found)})
    return _table(attention, head, parts)


@torch.no_grad()
def qk(
    model: HookedPreTrainedModel,
    layer: int,
    head: int,
    tokens: Tokens | None = None,
    *,
    distances: Sequence[int] = (0,),
    k: int = 10,
) -> pd.DataFrame:
    """Gives which tokens of the vocabulary a head looks at from a token: the keys of the highest score.

    Args:
        model: The model.
        layer: The layer.
        head: The query head.
        tokens: The tokens that look, texts or ids; by default all of the vocabulary.
        distances: How many tokens back the keys stand. A NoPE layer has the same scores at every distance; its
            attention temperature is taken as 1.
        k: How many keys are given for each token and distance.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        kv_head: the head whose keys and values it reads.
        distance: how many tokens back the key stands.
        query_id: id of the token that looks.
        query_token: its text.
        rank: 0 for the key of the highest score.
        key_id: id of the token that is looked at.
        key_token: its text.
        score: the attention score before the softmax.
        own_rank: rank of `query_token` itself among all keys, the same in all its lines of a distance.

    Raises:
        IndexError: if there is no such layer, head or token.
        ValueError: if `k` is less than 1 or a distance negative.
    """
    attention, ids = _asked(model, layer, head, tokens, k)
    if wrong := [distance for distance in distances if distance < 0]:
        raise ValueError(f"distance {wrong[0]} was asked for; a key stands 0 or more tokens before the query.")
    everything = torch.arange(model.text.config.vocab_size)
    queries = projected(model, layer, ids, attention.q_proj)[:, head]
    keys = projected(model, layer, everything, attention.k_proj)[:, kv_head_of(attention, head)]
    keys = turned(model, attention, keys, 0)
    parts = []
    for distance in distances:
        asking = turned(model, attention, queries, distance) * attention.d_head**-0.5
        for own, scores in _scored(asking, keys.mT):
            best, found = scores.topk(min(k, scores.shape[1]), dim=1)
            lines = _lines(model, ids[own], found, best, ("query_id", "query_token", "key_id", "key_token"))
            parts.append({"distance": distance, **lines, **_own_rank(scores, ids[own], found)})
    return _table(attention, head, parts)


@torch.no_grad()
def copying(
    model: HookedPreTrainedModel, layers: int | Sequence[int] | None = None, tokens: Tokens | None = None
) -> pd.DataFrame:
    """Gives how far each head copies: raises the logit of the token that it looks at.

    The cost is that of every token's logits once for each head, through `d_head` dimensions: choose layers or tokens
    in a large model.

    Args:
        model: The model.
        layers: A layer or several; all by default.
        tokens: The tokens that are looked at, texts or ids; by default all of the vocabulary.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        kv_head: the head whose keys and values it reads.
        own_first: share of the tokens whose own logit is raised most of the whole vocabulary.
        own_rank: mean rank of the own logit; 0 is the best, `(vocabulary - 1) / 2` is chance.
        eigenvalues: sum of the eigenvalues of the OV circuit from tokens to the same tokens, divided by the sum of
            their absolute values: 1 for a head that only copies, -1 for one that only takes down what it looks at. A
            bias of the values is left out. Missing for a head that writes nothing.

    Raises:
        IndexError: if there is no such layer or token.
    """
    every = range(model.text.config.num_hidden_layers)
    parts = []
    for layer in [layers] if isinstance(layers, int) else every if layers is None else layers:
        attention, ids = _asked(model, layer, 0, tokens, 1)
        values = projected(model, layer, ids, attention.v_proj)
        bias = bias_of(attention.v_proj, attention.d_head)
        for head in range(attention.config.num_attention_heads):
            kv_head, out = kv_head_of(attention, head), raised_logits(model, attention, head)
            own = values[:, kv_head]
            ranks = torch.cat([_rank_of(scores, ids[rows]) for rows, scores in _scored(own, out.mT)]).double()
            found = {"own_first": float((ranks == 0).double().mean()), "own_rank": float(ranks.mean())}
            found["eigenvalues"] = _eigenvalue_score(own - bias[kv_head], out[ids.to(out.device)])
            parts.append(pd.DataFrame([_name(attention, head) | found]))
    return pd.concat(parts, ignore_index=True)


def _asked(
    model: HookedPreTrainedModel, layer: int, head: int, tokens: Tokens | None, k: int
) -> tuple[SelfAttention, Int[Tensor, " token"]]:
    """The attention of a layer and the ids of the tokens, all checked."""
    config = model.text.config
    if not 0 <= layer < config.num_hidden_layers or not 0 <= head < config.num_attention_heads:
        raise IndexError(
            f"Layer {layer}, head {head} was asked for; layers are 0 to {config.num_hidden_layers - 1}, "
            f"heads 0 to {config.num_attention_heads - 1}."
        )
    if k < 1:
        raise ValueError(f"k={k} tokens were asked for; k is at least 1.")
    attention = model.text.layers[layer].self_attn
    if tokens is None:
        return attention, torch.arange(config.vocab_size)
    listed = [tokens] if isinstance(tokens, str | int) else list(tokens)
    if any(isinstance(token, str) for token in listed) and model.tokenizer is None:
        raise ValueError("Tokens were given as text, but this model has no tokenizer. Give ids.")
    ids = [token_id(model.tokenizer, token) if isinstance(token, str) else token for token in listed]
    if not ids or not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise IndexError(f"Tokens {ids[:4]} were asked for; ids are 0 to {config.vocab_size - 1}, at least one.")
    return attention, torch.tensor(ids)


def _scored(
    x: Float[Tensor, "token d_head"], matrix: Float[Tensor, "d_head vocab"]
) -> Iterator[tuple[slice, Float[Tensor, "some vocab"]]]:
    """Scores of every token of the vocabulary, for so many rows at a time as may be in memory."""
    size = max(1, CHUNK_NBYTES // (4 * matrix.shape[1]))
    matrix = matrix.to(x.device)
    for first in range(0, len(x), size):
        own = slice(first, min(first + size, len(x)))
        yield own, x[own] @ matrix


def _rank_of(scores: Float[Tensor, "some vocab"], ids: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
    own = scores.gather(1, ids[:, None].to(scores.device))
    return (scores > own).sum(1).cpu()


def _eigenvalue_score(read: Float[Tensor, "token d_head"], out: Float[Tensor, "token d_head"]) -> float:
    """Sum of the eigenvalues of `out @ read.T`, by the sum of their absolute values.

    They are those of the small matrix `read.T @ out`, and zeros.
    """
    small = einsum(read.double(), out.to(read.device).double(), "token i, token j -> i j").cpu()
    values = torch.linalg.eigvals(small)
    whole = float(values.abs().sum())
    return float(values.real.sum()) / whole if whole > 0 else float("nan")


def _own_rank(
    scores: Float[Tensor, "some vocab"], ids: Int[Tensor, " some"], found: Int[Tensor, "some k"]
) -> dict[str, Any]:
    return {"own_rank": _rank_of(scores, ids).numpy().repeat(found.shape[1])}


def _lines(
    model: HookedPreTrainedModel,
    ids: Int[Tensor, " some"],
    found: Int[Tensor, "some k"],
    scores: Float[Tensor, "some k"],
    names: tuple[str, str, str, str],
) -> dict[str, Any]:
    """Columns of one line for each token and each of the tokens found for it."""
    asked, others = ids.repeat_interleave(found.shape[1]), found.flatten().cpu()
    texts = (token_strings(model.tokenizer, some.tolist()) for some in (asked, others))
    first, first_text, second, second_text = names
    return {
        first: asked.numpy(),
        first_text: next(texts),
        "rank": np.tile(np.arange(found.shape[1]), len(ids)),
        second: others.numpy(),
        second_text: next(texts),
        "score": scores.flatten().cpu().numpy(),
    }


def _name(attention: SelfAttention, head: int) -> dict[str, Any]:
    kind = "rope" if attention.rope else "nope"
    return {"layer": attention.layer, "kind": kind, "head": head, "kv_head": kv_head_of(attention, head)}


def _table(attention: SelfAttention, head: int, parts: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.concat([pd.DataFrame({**_name(attention, head), **part}) for part in parts], ignore_index=True)
