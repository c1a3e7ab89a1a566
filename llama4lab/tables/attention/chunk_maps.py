"""How much attention goes from each chunk of the text to each: what NoPE layers bring over the borders of chunks."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from llama4lab.model.facts import rotary_kind
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.attention.reductions import Wanted
from llama4lab.run.attention.streaming import AttentionStream, attention_stream, recorded_stream
from llama4lab.run.run import Run

ONLY_MAP = Wanted(scores=False)


def chunk_map(run: Run | AttentionStream) -> pd.DataFrame:
    """Gives the attention of each head from chunk to chunk, as means over the queries of a chunk in all rows.

    Chunks are those of the chunked layers in every layer, and one chunk in a model without them. The pattern is never
    built: this works for long prompts, where patterns do not fit anywhere.

    Args:
        run: A run with `layers.*.self_attn.q_rot` and `layers.*.self_attn.k_rot`, or what `attention_stream` gives.

    Columns:
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        query_chunk: chunk of the queries.
        key_chunk: chunk of the keys, up to that of the queries.
        mass: attention; sums to 1 over the chunks of keys.

    Raises:
        KeyError: if queries and keys were not recorded.
        ValueError: if the stream has no sums from chunk to chunk, or the run lost the keys of early positions.
    """
    stream = run if isinstance(run, AttentionStream) else recorded_stream(run, wanted=ONLY_MAP)
    parts = []
    for layer, found in stream.layers.items():
        if found.chunk_mass is None:
            raise ValueError("The sums from chunk to chunk were not asked for. Stream with Wanted(chunk_mass=True).")
        mass, chunks = found.chunk_mass.cpu().numpy(), np.array(found.chunks)
        query, key = np.tril_indices(len(chunks))
        part = {
            "layer": layer,
            "kind": rotary_kind(stream.meta, layer),
            "head": np.arange(len(mass)).repeat(len(query)),
            "query_chunk": np.tile(chunks[query], len(mass)),
            "key_chunk": np.tile(chunks[key], len(mass)),
            "mass": mass[:, query, key].reshape(-1),
        }
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def streamed_chunk_map(model: HookedPreTrainedModel, prompt: Any, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """Runs a prompt and gives what `chunk_map` gives; nothing is recorded on the way.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes.
        layers: The layers; all by default.
    """
    return chunk_map(attention_stream(model, prompt, layers, wanted=ONLY_MAP))
