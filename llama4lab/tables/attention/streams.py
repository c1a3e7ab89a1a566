"""What attention comes to in each head, without its pattern: where it goes, how far back, and to which keys."""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.model.facts import rotary_kind
from llama4lab.run.attention.reductions import Reductions, Wanted
from llama4lab.run.attention.streaming import K_ROT, Q_ROT, AttentionStream, recorded_stream
from llama4lab.run.run import Run

SUMS = ("own_chunk", "earlier", "first_token", "itself", "entropy")


def reductions(run: Run | AttentionStream) -> pd.DataFrame:
    """Gives what `mass` gives, from queries and keys instead of patterns: it works for prompts of any length.

    Args:
        run: A run with `layers.*.self_attn.q_rot` and `layers.*.self_attn.k_rot`, or what `attention_stream` gives.

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
        KeyError: if queries and keys were not recorded.
        ValueError: if the run lost the keys of early positions.
    """
    stream = _stream(run)
    parts = []
    for layer, found in stream.layers.items():
        means = {name: _mean(getattr(found, name), found.valid) for name in SUMS}
        parts.append(_by_head(stream, layer, means))
    return pd.concat(parts, ignore_index=True)


def mass_at_distance(run: Run | AttentionStream) -> pd.DataFrame:
    """Gives how much attention each head spends at which distance, as means over all tokens as queries.

    Distances are counted in tokens, without padding; each bin is twice as wide as the one before.

    Args:
        run: A run with `layers.*.self_attn.q_rot` and `layers.*.self_attn.k_rot`, or what `attention_stream` gives.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        nearest: the smallest distance of the bin; 0 is the query's own position.
        farthest: the largest distance of the bin.
        mass: attention; sums to 1 over the bins.

    Raises:
        KeyError: if queries and keys were not recorded.
        ValueError: if the run lost the keys of early positions.
    """
    stream = _stream(run)
    parts = []
    for layer, found in stream.layers.items():
        mass, edges = found.distance_mass.cpu().numpy(), np.array(found.edges)
        heads, bins = mass.shape
        columns = {
            "head": np.arange(heads).repeat(bins),
            "nearest": np.tile(edges[:-1], heads),
            "farthest": np.tile(edges[1:] - 1, heads),
            "mass": mass.reshape(-1),
        }
        parts.append(_by_head(stream, layer, columns))
    return pd.concat(parts, ignore_index=True)


def top_keys(run: Run, layer: int, head: int, k: int = 5) -> pd.DataFrame:
    """Gives the keys that each query looks at most.

    Args:
        run: A run with the layer's `self_attn.q_rot` and `self_attn.k_rot`.
        layer: The layer.
        head: The query head.
        k: How many keys for each query; a query that sees fewer has fewer.

    Columns:
        row: row of the prompt.
        query: position of the query in the prompt.
        rank: 0 for the largest weight.
        key: position of the key.
        query_token: text of the query's token.
        key_token: text of the key's token.
        weight: attention of the query to the key.

    Raises:
        KeyError: if queries or keys of the layer were not recorded.
        IndexError: if there is no such head.
        ValueError: if `k` is not at least 1, or the run lost the keys of early positions.
    """
    found = _of_head(run, layer, head, k)
    batch, _, seq, ranks = np.nonzero(found.top_keys.cpu().numpy() >= 0)
    key, weight = (tensor.cpu().numpy()[batch, 0, seq, ranks] for tensor in (found.top_keys, found.top_weights))
    rows = np.array(run.rows)[batch]
    tokens = np.array(run.prompt.tokens, dtype=object)
    return pd.DataFrame(
        {
            "row": rows,
            "query": seq,
            "rank": ranks,
            "key": key,
            "query_token": tokens[rows, seq],
            "key_token": tokens[rows, key],
            "weight": weight,
        }
    )


def _stream(run: Run | AttentionStream) -> AttentionStream:
    return (
        run if isinstance(run, AttentionStream) else recorded_stream(run, wanted=Wanted(chunk_mass=False, scores=False))
    )


def _of_head(run: Run, layer: int, head: int, k: int) -> Reductions:
    """The sums of one head: only its own queries and keys are looked at."""
    names = f"layers.{layer}.{Q_ROT}", f"layers.{layer}.{K_ROT}"
    q, keys = run[names[0]], run[names[1]]
    if not 0 <= head < q.shape[2]:
        raise IndexError(f"Head {head} was asked for; layer {layer} has heads 0 to {q.shape[2] - 1}.")
    if k < 1:
        raise ValueError(f"k={k} keys for each query were asked for; ask for 1 or more.")
    kv_head = head // (q.shape[2] // keys.shape[2])
    own = {names[0]: q[:, :, head : head + 1], names[1]: keys[:, :, kv_head : kv_head + 1]}
    alone = Run(own, {}, run.logits, run.prompt, run.meta, run.rows, run.positions, run.logit_positions)
    return recorded_stream(alone, wanted=Wanted(chunk_mass=False, scores=False, top=k)).layers[layer]


def _by_head(stream: AttentionStream, layer: int, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    head = columns.get("head", np.arange(len(next(iter(columns.values())))))
    return pd.DataFrame({"layer": layer, "kind": rotary_kind(stream.meta, layer), "head": head} | columns)


def _mean(values: Float[Tensor, "batch head seq"], valid: Bool[Tensor, "batch seq"]) -> np.ndarray:
    """The mean over tokens, for each head; values of padding are 0."""
    return (values.cpu().double().sum((0, 2)) / valid.cpu().sum()).numpy().astype("float32")
