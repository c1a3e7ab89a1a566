"""What kind each attention head is: how much it looks at the token before, at the same token, or at what followed it.

The kinds are those of Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits), Olsson et al. 2022
(arXiv 2209.11895) and Wang et al. 2022 (arXiv 2211.00593). A score is the share of attention on the keys that the kind
asks for: 1 for a head that does nothing else.
"""

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4lab.model.facts import chunk_sizes, rotary_kind
from llama4lab.run.run import Run
from llama4lab.tables.token_index import places

PATTERN = "self_attn.pattern"
KINDS = ("previous_token", "duplicate_token", "induction")


def scores(run: Run) -> pd.DataFrame:
    """Gives the scores of every head, as means over the tokens of all rows that have something to look at.

    A key is a target of a query if it is earlier and

    - previous token: it stands right before the query;
    - duplicate token: it is the same token as the query;
    - induction: it follows an earlier token that is the same as the query.

    A score is the attention to all targets of a query, as a mean over the queries with at least one target that the
    layer can see: a target in an earlier chunk is none in a layer with chunks. The other queries are left out, and so
    is padding. Image tokens, which all have one id, are never the same as another. Induction shows only in text that
    repeats itself; see `llama4lab.repeated_tokens`.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        previous_token, duplicate_token, induction: the scores; missing where no query has a target.
        previous_token_queries, duplicate_token_queries, induction_queries: how many queries each is a mean of.

    Raises:
        KeyError: if no pattern was recorded.
    """
    parts = []
    same, place = _same_token(run), torch.tensor(places(run))[run.rows]
    for layer, pattern in run.layers(PATTERN).items():
        targets = _targets(same, place, run.positions, chunk_sizes(run.meta)[layer], pattern.shape[-1])
        columns: dict[str, object] = {
            "layer": layer,
            "kind": rotary_kind(run.meta, layer),
            "head": np.arange(pattern.shape[1]),
        }
        found = {kind: _score(pattern, targets[kind]) for kind in KINDS}
        columns |= {kind: score.numpy() for kind, (score, _) in found.items()}
        columns |= {f"{kind}_queries": count for kind, (_, count) in found.items()}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _same_token(run: Run) -> Bool[Tensor, "batch seq seq"]:
    """For each position (middle axis) and each earlier one (last axis) whether both hold the same token."""
    ids = run.prompt.input_ids.cpu()[run.rows]
    compared = torch.tensor([[kind in ("text", "special") for kind in run.prompt.modality[row]] for row in run.rows])
    same = (ids[:, :, None] == ids[:, None, :]) & compared[:, :, None] & compared[:, None, :]
    return same.tril(-1)


def _targets(
    same: Bool[Tensor, "batch seq seq"],
    place: Int[Tensor, "batch seq"],
    queries: list[int],
    chunk: int | None,
    num_keys: int,
) -> dict[str, Bool[Tensor, "batch query key"]]:
    """For each kind of head which keys a query should look at."""
    size = chunk or place.shape[1]
    valid = place >= 0
    seen = valid[:, :, None] & valid[:, None, :] & (place[:, :, None] // size == place[:, None, :] // size)
    seen &= torch.ones_like(seen).tril(-1)
    followed = torch.nn.functional.pad(same, (1, 0))[:, :, :-1]
    kinds = {
        "previous_token": place[:, :, None] == place[:, None, :] + 1,
        "duplicate_token": same,
        "induction": followed,
    }
    return {kind: (keys & seen)[:, queries, :num_keys] for kind, keys in kinds.items()}


def _score(
    pattern: Float[Tensor, "batch head query key"], targets: Bool[Tensor, "batch query key"]
) -> tuple[Float[Tensor, " head"], int]:
    """The mean attention to targets over queries that have one, and how many these are."""
    count = int(targets.any(-1).sum())
    weight = targets.to(pattern.device, torch.float32)
    attended = einsum(pattern.detach().float(), weight, "batch head query key, batch query key -> head").cpu()
    return (attended / count if count else torch.full_like(attended, torch.nan)), count
