"""How much NoPE layers sharpen attention at far positions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from llama4lab.model.pretrained import HookedPreTrainedModel


@torch.no_grad()
def temperature(model: HookedPreTrainedModel, positions: int | Sequence[int] | None = None) -> pd.DataFrame:
    """Gives the factor on the scores of every NoPE layer by the position of the query.

    It is `1 + attn_scale * log(1 + floor((position + 1) / floor_scale))`, and 1 in a model without temperature tuning.
    RoPE layers have none, and are left out. What `llama4lab.edited` has changed is seen.

    Args:
        model: The model.
        positions: Positions from 0; a number means so many from 0. By default position 0, every position at which the
            factor changes up to the longest that the model is made for, and that last one.

    Columns:
        layer: the layer.
        kind: "nope"; "rope" only for a layer that was given a temperature.
        position: position of the query in its document, padding not counted.
        temperature: what its scores are multiplied with.

    Raises:
        ValueError: if a position is negative.
    """
    if positions is None:
        places = _changes(model)
    else:
        places = np.arange(positions) if isinstance(positions, int) else np.array(positions, dtype=np.int64)
    if (places < 0).any() or (isinstance(positions, int) and positions < 0):
        raise ValueError(f"positions={positions} was asked for; positions count from 0.")
    parts = []
    for layer, block in enumerate(model.text.layers):
        attention = block.self_attn
        if attention.rope and attention.tuning is False:
            continue
        factor = np.ones(len(places))
        if attention.tuning is not False:
            factor = attention.temperature(torch.tensor(places)[None]).flatten().double().cpu().numpy()
        kind = "rope" if attention.rope else "nope"
        parts.append(pd.DataFrame({"layer": layer, "kind": kind, "position": places, "temperature": factor}))
    columns = ["layer", "kind", "position", "temperature"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _changes(model: HookedPreTrainedModel) -> np.ndarray:
    """Position 0, the last one, and between them where the factor changes."""
    config = model.text.config
    last = int(config.max_position_embeddings) - 1
    steps = np.arange(1, (last + 1) // config.floor_scale + 1)
    return np.unique([0, *(np.ceil(steps * config.floor_scale).astype(np.int64) - 1), last])
