"""What kind each attention head is: how much it looks at the token before, at the same token, or at what followed it.

The kinds are those of Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits), Olsson et al. 2022
(arXiv 2209.11895) and Wang et al. 2022 (arXiv 2211.00593). A score is the share of attention on the keys that the kind
asks for: 1 for a head that does nothing else.

The scores come from recorded patterns; or, for texts whose patterns do not fit anywhere, from queries and keys, a block
of the pattern after the other.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4lab.model.facts import chunk_sizes, rotary_kind
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.token_layout import PADDING
from llama4lab.run.attention.reductions import Reductions, Wanted
from llama4lab.run.attention.streaming import AttentionStream, attention_stream, recorded_stream
from llama4lab.run.attention.targets import KINDS, looked_for, numbers_before, token_numbers
from llama4lab.run.run import Run
from llama4lab.tables.token_index import places

PATTERN = "self_attn.pattern"
ONLY_SCORES = Wanted(chunk_mass=False)


def scores(run: Run | AttentionStream) -> pd.DataFrame:
    """Gives the scores of every head, as means over the tokens of all rows that have something to look at.

    A key is a target of a query if it is earlier and

    - previous token: it stands right before the query;
    - duplicate token: it is the same token as the query;
    - induction: it follows an earlier token that is the same as the query.

    A score is the attention to all targets of a query, as a mean over the queries with at least one target that the
    layer can see: a target in an earlier chunk is none in a layer with chunks. The other queries are left out, and so
    is padding. Image tokens, which all have one id, are never the same as another. Induction shows only in text that
    repeats itself; see `llama4lab.repeated_tokens`.

    Args:
        run: A run with `layers.*.self_attn.pattern`; or, for prompts of any length, one with `layers.*.self_attn.q_rot`
            and `layers.*.self_attn.k_rot`, or what `attention_stream` gives. Recorded patterns go before.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        previous_token, duplicate_token, induction: the scores; missing where no query has a target.
        previous_token_queries, duplicate_token_queries, induction_queries: how many queries each is a mean of.

    Raises:
        KeyError: if neither patterns nor queries and keys were recorded.
        ValueError: if the stream has no scores, or a run without patterns lost the keys of early positions.
    """
    if isinstance(run, AttentionStream):
        return _of_stream(run)
    recorded = {name.partition("self_attn.")[2] for name in run.names}
    if "pattern" not in recorded and {"q_rot", "k_rot"} <= recorded:
        return _of_stream(recorded_stream(run, wanted=ONLY_SCORES))
    parts = []
    valid = torch.tensor(places(run) >= 0)[run.rows]
    documents = torch.where(valid, 0, PADDING)
    numbers = token_numbers(run.prompt, run.rows, valid.shape[1])
    same = looked_for(numbers)[:, :, None] == numbers[:, None, :]
    followed = looked_for(numbers)[:, :, None] == numbers_before(numbers, documents)[:, None, :]
    place = torch.tensor(places(run))[run.rows]
    for layer, pattern in run.layers(PATTERN).items():
        targets = _targets(same, followed, place, chunk_sizes(run.meta)[layer])
        found = [_score(pattern, kind[:, run.positions, : pattern.shape[-1]]) for kind in targets]
        parts.append(_lines(run.meta, layer, pattern.shape[1], found))
    return pd.concat(parts, ignore_index=True)


def streamed_scores(model: HookedPreTrainedModel, prompt: Any, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """Runs a prompt and gives what `scores` gives; nothing is recorded on the way, whatever the length of the prompt.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes.
        layers: The layers; all by default.
    """
    return _of_stream(attention_stream(model, prompt, layers, wanted=ONLY_SCORES))


def _of_stream(stream: AttentionStream) -> pd.DataFrame:
    parts = []
    for layer, found in stream.layers.items():
        parts.append(_lines(stream.meta, layer, found.itself.shape[1], _summed(found)))
    return pd.concat(parts, ignore_index=True)


def _summed(found: Reductions) -> list[tuple[Float[Tensor, " head"], int]]:
    """For each kind the scores of the heads, and how many queries they are means of."""
    if found.on_targets is None or found.has_target is None:
        raise ValueError("The scores of heads were not asked for. Stream with Wanted(scores=True).")
    counts = found.has_target.flatten(1).sum(1).tolist()
    totals = found.on_targets.cpu().double().sum((1, 3)).float()
    return [(_mean(total, count), count) for total, count in zip(totals, counts, strict=True)]


def _lines(
    meta: dict[str, Any], layer: int, num_heads: int, found: list[tuple[Float[Tensor, " head"], int]]
) -> pd.DataFrame:
    columns: dict[str, Any] = {"layer": layer, "kind": rotary_kind(meta, layer), "head": np.arange(num_heads)}
    columns |= {kind: score.numpy() for kind, (score, _) in zip(KINDS, found, strict=True)}
    columns |= {f"{kind}_queries": count for kind, (_, count) in zip(KINDS, found, strict=True)}
    return pd.DataFrame(columns)


def _targets(
    same: Bool[Tensor, "batch seq seq"],
    followed: Bool[Tensor, "batch seq seq"],
    place: Int[Tensor, "batch seq"],
    chunk: int | None,
) -> list[Bool[Tensor, "batch seq seq"]]:
    """For each kind of head which keys (last axis) a query (middle axis) should look at."""
    size = chunk or place.shape[1]
    valid = place >= 0
    seen = valid[:, :, None] & valid[:, None, :] & (place[:, :, None] // size == place[:, None, :] // size)
    seen &= torch.ones_like(seen).tril(-1)
    return [keys & seen for keys in (place[:, :, None] == place[:, None, :] + 1, same, followed)]


def _score(
    pattern: Float[Tensor, "batch head query key"], targets: Bool[Tensor, "batch query key"]
) -> tuple[Float[Tensor, " head"], int]:
    """The mean attention to targets over queries that have one, and how many these are."""
    count = int(targets.any(-1).sum())
    weight = targets.to(pattern.device, torch.float32)
    attended = einsum(pattern.detach().float(), weight, "batch head query key, batch query key -> head").cpu()
    return _mean(attended, count), count


def _mean(total: Float[Tensor, " head"], count: int) -> Float[Tensor, " head"]:
    return total / count if count else torch.full_like(total, torch.nan)
