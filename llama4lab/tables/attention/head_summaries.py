"""All heads in one table, to sort them by what they do; and patterns that count what is brought, not only what is seen.

A head may look at a key whose value is nearly zero: attention that brings nothing, as at the first token of many heads.
Weighted by the norm of what each key's value brings, the pattern shows where the output comes from (Kobayashi et al.
2020, arXiv 2004.10102).
"""

# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportOperatorIssue=false

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.run import Run
from llama4lab.tables.attention.head_weights import output_directions
from llama4lab.tables.attention.patterns import PATTERN, mass, pattern
from llama4lab.tables.heads import scores
from llama4lab.tables.token_index import places

VALUES = "self_attn.v"
NEEDED = (f"layers.*.{PATTERN}", f"layers.*.{VALUES}")


def heads(run: Run, model: HookedPreTrainedModel | None = None) -> pd.DataFrame:
    """Gives one line for each head: what it looks at, and how spread out its attention is.

    Args:
        run: A run with patterns and values: `at=["layers.*.self_attn.pattern", "layers.*.self_attn.v"]`.
        model: For `value_first_token` by what values are in the residual stream, as in `value_weighted`; without it, by
            the values themselves.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        kv_head: the head whose keys and values it reads.
        entropy, first_token, itself, earlier: of its attention, as in `mass`.
        previous_token, duplicate_token, induction: its scores, as in `tables.heads.scores`; missing where no query has
            anything of that kind to look at.
        value_first_token: share of the first token in the value-weighted attention, as a mean over all tokens for which
            the head's values are not all zero. Far below `first_token` in a head that rests on that token.

    Raises:
        KeyError: if patterns were not recorded, or not the values of a layer with a pattern.
        ValueError: if values of keys are missing, as in a run that was cut.
    """
    seen = mass(run)[["layer", "kind", "head", "entropy", "first_token", "itself", "earlier"]]
    kinds = scores(run)[["layer", "head", "previous_token", "duplicate_token", "induction"]]
    table = seen.merge(kinds, on=["layer", "head"], validate="one_to_one")
    parts, groups = [], []
    first = torch.tensor(places(run)[run.rows] == 0)
    valid = torch.tensor(places(run)[np.ix_(run.rows, run.positions)] >= 0)
    for layer, weights in run.layers(PATTERN).items():
        weights, norms = weights.detach().float(), _value_norms(run, layer, model)
        brought = weights * norms[:, :, None]
        on_first = (brought * first[:, None, None, : brought.shape[-1]].to(brought.device)).sum(-1)
        total = brought.sum(-1)
        counted = (total > 0) & valid[:, None].to(total.device)
        share = torch.where(counted, on_first / total, 0.0).sum((0, 2)) / counted.sum((0, 2))
        parts.append(share.cpu().numpy())
        group = weights.shape[1] // run[f"layers.{layer}.{VALUES}"].shape[2]
        groups.append(np.arange(weights.shape[1]) // group)
    table.insert(3, "kv_head", np.concatenate(groups))
    table["value_first_token"] = np.concatenate(parts)
    return table


def value_weighted(
    run: Run, layer: int, head: int, row: int = 0, *, model: HookedPreTrainedModel | None = None
) -> pd.DataFrame:
    """Gives the attention of one head, also weighted by how much each key's value brings.

    Args:
        run: A run with the pattern and the values of the layer: `at=["layers.*.self_attn.pattern",
            "layers.*.self_attn.v"]`.
        layer: The layer.
        head: The query head.
        row: Row of the prompt.
        model: If given, a value counts by the norm of what it is in the residual stream, through the head's part of the
            output projection; without it, by its own norm.

    Columns:
        row, layer, kind, head, query, key, query_token, key_token, query_chunk, key_chunk, weight: as in `pattern`.
        value_norm: norm of what the key's value brings.
        value_weighted: `weight * value_norm` as a share of the sum over the keys of the query; missing where that is 0.

    Raises:
        KeyError: if the pattern or the values of the layer were not recorded.
        IndexError: if there is no such head, or the run does not have the row.
        ValueError: if values of keys are missing, as in a run that was cut.
    """
    table = pattern(run, layer, head, row)
    norms = _value_norms(run, layer, model)[run.rows.index(row), head].cpu().numpy()
    table["value_norm"] = norms[table["key"].to_numpy()]
    brought = table["weight"] * table["value_norm"]
    total = brought.groupby(table["query"]).transform("sum")
    table["value_weighted"] = (brought / total).where(total > 0)
    return table


@torch.no_grad()
def _value_norms(run: Run, layer: int, model: HookedPreTrainedModel | None) -> Float[Tensor, "batch head key"]:
    """How much the value of each key is, for each query head."""
    weights = run[f"layers.{layer}.{PATTERN}"]
    values = run[f"layers.{layer}.{VALUES}"].detach().float().to(weights.device)
    if values.shape[1] != weights.shape[-1]:
        raise ValueError(
            f"The pattern of layer {layer} has {weights.shape[-1]} keys, but there are values of {values.shape[1]}.\n"
            "Read the whole run, and cut the table."
        )
    heads = weights.shape[1]
    values = values.repeat_interleave(heads // values.shape[2], dim=2)
    if model is None:
        return values.norm(dim=-1).mT
    attention = model.text.layers[layer].self_attn
    norms = []
    for head in range(heads):
        # The triangle of a QR decomposition keeps norms, and is small.
        triangle = torch.linalg.qr(output_directions(model, attention, head).mT, mode="r").R
        norms.append((values[:, :, head] @ triangle.mT.to(values.device)).norm(dim=-1))
    return torch.stack(norms, dim=1)
