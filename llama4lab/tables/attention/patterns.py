"""What each layer lets a token see, and what its heads look at.

In most layers a token attends only to its own *chunk* of the sequence; in the NoPE layers, to everything before it.
Chunks are counted without padding.
"""

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.facts import chunk_sizes, rotary_kind
from llama4lab.run.run import Run
from llama4lab.tables.token_index import places, tokens_of

PATTERN = "self_attn.pattern"


def chunks(run: Run) -> pd.DataFrame:
    """Gives the chunks of every layer: inside one, attention is causal; across chunks there is none.

    Columns:
        row: row of the prompt.
        layer: the layer.
        kind: "rope" if it rotates queries and keys by their positions, else "nope".
        chunk_size: size of its chunks in tokens; missing for a layer that sees everything, which is one chunk.
        chunk: number of the chunk, from 0.
        start: position of its first token in the prompt, where padding counts.
        stop: position after its last token.
    """
    place, sizes = places(run), chunk_sizes(run.meta)
    lines = []
    for row in run.rows:
        positions = np.flatnonzero(place[row] >= 0)
        for layer in range(run.meta["num_layers"]):
            size = sizes[layer]
            borders = range(size, len(positions), size) if size else []
            for chunk, own in enumerate(np.split(positions, borders)):
                lines.append((row, layer, rotary_kind(run.meta, layer), size, chunk, own[0], own[-1] + 1))
    columns = ["row", "layer", "kind", "chunk_size", "chunk", "start", "stop"]
    return pd.DataFrame(lines, columns=columns).astype({"chunk_size": "Int64"})


def mass(run: Run) -> pd.DataFrame:
    """Gives where the attention of each head goes, as means over all tokens as queries. Padding is left out.

    Chunks are those of the chunked layers in every layer, so a NoPE layer shows how much it brings in from before the
    chunk. `own_chunk + earlier` is 1; the others are parts of it. Queries of the first chunk have no earlier one and
    count as 0 there.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        own_chunk: attention to keys of the query's own chunk (everything, in a model without chunks).
        earlier: attention to keys of earlier chunks.
        first_token: attention to the first token of the row.
        itself: attention of the query to its own position.
        entropy: of the attention over keys, in nats.

    Raises:
        KeyError: if no pattern was recorded.
    """
    recorded = run.layers(PATTERN)
    queries = _query_places(run)
    weights: dict[str, Tensor] = {}
    parts = []
    for layer, pattern in recorded.items():
        if not weights:
            weights = _weights(run, queries, num_keys=pattern.shape[-1])
        parts.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "kind": rotary_kind(run.meta, layer),
                    "head": np.arange(pattern.shape[1]),
                    **{name: _weighted(pattern, weight).numpy() for name, weight in weights.items()},
                    "entropy": _weighted(torch.special.entr(pattern.float()), queries["valid"]).numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def pattern(run: Run, layer: int, head: int, row: int = 0) -> pd.DataFrame:
    """Gives the attention of one head, one line for each query and key, also the keys a query does not see.

    Columns:
        row: row of the prompt.
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        query: position of the query in the prompt.
        key: position of the key.
        query_token: text of the query's token.
        key_token: text of the key's token.
        query_chunk: chunk that the query is in, by the chunk size of the model; 0 in a model without chunks.
        key_chunk: chunk that the key is in.
        weight: attention of the query to the key; sums to 1 over the keys of a query.

    Raises:
        KeyError: if the pattern of the layer was not recorded.
        IndexError: if there is no such head, or the run does not have the row.
    """
    tensor = run[f"layers.{layer}.{PATTERN}"]
    if not 0 <= head < tensor.shape[1]:
        raise IndexError(f"Head {head} was asked for; layer {layer} has heads 0 to {tensor.shape[1] - 1}.")
    if row not in run.rows:
        raise IndexError(f"Row {row} was asked for; the run has rows {', '.join(map(str, run.rows))}.")
    tokens = tokens_of(run)
    queries = tokens.loc[tokens["row"] == row, :]
    place = places(run)[row]
    keys = np.flatnonzero(place[: tensor.shape[-1]] >= 0)
    weight = tensor[run.rows.index(row), head].detach().float().cpu().numpy()
    weight = weight[np.ix_(queries["seq_index"].to_numpy(), keys)]
    size = run.meta["chunk_size"] or len(place)
    return pd.DataFrame(
        {
            "row": row,
            "layer": layer,
            "kind": rotary_kind(run.meta, layer),
            "head": head,
            "query": queries["position"].to_numpy().repeat(len(keys)),
            "key": np.tile(keys, len(queries)),
            "query_token": queries["token"].to_numpy().repeat(len(keys)),
            "key_token": np.tile(np.array(run.prompt.tokens[row], dtype=object)[keys], len(queries)),
            "query_chunk": (queries["place"].to_numpy() // size).repeat(len(keys)),
            "key_chunk": np.tile(place[keys] // size, len(queries)),
            "weight": weight.reshape(-1),
        }
    )


def _query_places(run: Run) -> dict[str, Tensor]:
    """For each batch row and query: the token's number in its row, and a weight that makes sums means over tokens."""
    place = torch.tensor(places(run)[np.ix_(run.rows, run.positions)])
    valid = place >= 0
    return {"place": place, "valid": (valid / valid.sum())[:, :, None]}


def _weights(run: Run, queries: dict[str, Tensor], num_keys: int) -> dict[str, Tensor]:
    """For each sum that `mass` gives: which keys count for which query."""
    size = run.meta["chunk_size"] or run.prompt.input_ids.shape[1]
    query = queries["place"][:, :, None]
    key = torch.tensor(places(run)[run.rows, :num_keys])[:, None, :]
    own = key // size == query // size
    counted = {
        "own_chunk": own,
        "earlier": (key >= 0) & (key // size < query // size),
        "first_token": key == 0,
        "itself": key == query,
    }
    return {name: keys * queries["valid"] for name, keys in counted.items()}


def _weighted(
    pattern: Float[Tensor, "batch head query key"], weight: Float[Tensor, "batch query #key"]
) -> Float[Tensor, " head"]:
    weight = weight.to(pattern.device).expand(-1, -1, pattern.shape[-1])
    return einsum(pattern.detach().float(), weight.float(), "batch head query key, batch query key -> head").cpu()
