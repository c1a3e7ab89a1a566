"""Which places of a run's tensors are tokens, and which tokens. Padding is left out here, once for all tables."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Shaped
from torch import Tensor

from llama4lab.run.run import Run


def tokens_of(run: Run) -> pd.DataFrame:
    """Gives one line for each token of a run, row by row.

    Columns:
        batch_index: index on the "batch" axis of the run's tensors.
        seq_index: index on their "seq" or "query" axis.
        row: row of the prompt.
        position: position in that row, padding counted.
        place: the token's number in its row from 0, padding not counted; what RoPE and chunks go by.
        token: its text.
        modality: "text", "image" or "special".
    """
    place = places(run)
    parts = []
    for batch_index, row in enumerate(run.rows):
        positions = np.array(run.positions, dtype=np.int64)
        kept = place[row][positions] >= 0
        own = positions[kept]
        parts.append(
            pd.DataFrame(
                {
                    "batch_index": batch_index,
                    "seq_index": np.flatnonzero(kept),
                    "row": row,
                    "position": own,
                    "place": place[row][own],
                    "token": [run.prompt.tokens[row][position] for position in own],
                    "modality": [run.prompt.modality[row][position] for position in own],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def places(run: Run) -> np.ndarray:
    """Gives for every row and position of the prompt the token's number from 0; -1 for padding."""
    mask = run.prompt.attention_mask.cpu().numpy().astype(bool)
    return np.where(mask, mask.cumsum(axis=1) - 1, -1)


def at_tokens(tensor: Shaped[Tensor, "batch seq ..."], tokens: pd.DataFrame) -> Shaped[Tensor, "token ..."]:
    """Picks the tokens of `tokens_of` from a recorded tensor, and brings them to the CPU."""
    batch, seq = (
        torch.tensor(tokens[column].to_numpy(), device=tensor.device) for column in ("batch_index", "seq_index")
    )
    return tensor.detach()[batch, seq].cpu()
