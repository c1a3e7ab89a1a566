"""Which tokens a patch can change, layer by layer, and which of them the metric can see.

A patch changes its own token and later ones; through a chunked layer only those of the same chunk, through a NoPE layer
all of the document. Read backwards, the same rule says which tokens can still reach the positions that a metric reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from llama4lab.model.token_layout import PADDING, TokenLayout


@dataclass(frozen=True, eq=False)
class Reach:
    """For every unit (a cell in one row) the columns to compute at each layer: first, and one past the last.

    The last line, behind the last layer, has the columns whose logits change. Nothing is to do where `first >= end`.
    """

    first: Int[np.ndarray, "line unit"]
    end: Int[np.ndarray, "line unit"]

    def idle(self, entry: Int[np.ndarray, " unit"]) -> np.ndarray:
        """Which units never reach the metric."""
        line = np.arange(self.first.shape[0])[:, None]
        return ((self.first >= self.end) & (line >= entry)).any(0)


def blocks(layout: TokenLayout, chunk: int | None) -> tuple[Int[np.ndarray, "row seq"], Int[np.ndarray, "row seq"]]:
    """For every token the first and the last column of the tokens that can attend to each other in a layer.

    Args:
        layout: Of rows without cached tokens.
        chunk: Chunk size of the layer, or None.
    """
    positions, documents = layout.positions.cpu().numpy(), layout.documents.cpu().numpy()
    rows = max(len(positions), len(documents))
    positions, documents = (np.broadcast_to(t, (rows, t.shape[1])) for t in (positions, documents))
    column = np.arange(positions.shape[1])
    first, last = (np.tile(column, (rows, 1)) for _ in range(2))
    for row in range(rows):
        keys = np.stack([documents[row], positions[row] // chunk if chunk else np.zeros_like(positions[row])])
        _, group = np.unique(keys, axis=1, return_inverse=True)
        group = group.reshape(-1)
        low, high = np.full(group.max() + 1, len(column)), np.full(group.max() + 1, -1)
        np.minimum.at(low, group, column)
        np.maximum.at(high, group, column)
        real = documents[row] != PADDING
        first[row, real], last[row, real] = low[group][real], high[group][real]
    return first, last


def reach(
    layout: TokenLayout,
    chunks: Sequence[int | None],
    row: Int[np.ndarray, " unit"],
    entry: Int[np.ndarray, " unit"],
    patched: tuple[Int[np.ndarray, " unit"], Int[np.ndarray, " unit"]],
    read: tuple[int, int],
) -> Reach:
    """Follows every unit from its first patch to the metric.

    Args:
        layout: Of the rows.
        chunks: The chunk size of every layer.
        row: The row of each unit.
        entry: The layer in which its first patch is; the number of layers for one behind them.
        patched: Its first and last patched column.
        read: The first and last column that the metric reads.
    """
    num_layers = len(chunks)
    found = {chunk: blocks(layout, chunk) for chunk in set(chunks)}
    line = row if len(next(iter(found.values()))[0]) > 1 else np.zeros_like(row) if found else row
    first = np.empty((num_layers + 1, len(row)), dtype=np.int64)
    end = np.empty_like(first)
    needed = np.full(len(row), read[0])
    for layer in range(num_layers, -1, -1):
        if layer < num_layers:
            needed = found[chunks[layer]][0][line, needed]
        first[layer] = np.maximum(patched[0], needed)
    changed = patched[1].copy()
    for layer in range(num_layers + 1):
        if layer < num_layers:
            begun = layer >= entry
            changed[begun] = found[chunks[layer]][1][line[begun], changed[begun]]
        end[layer] = np.minimum(changed, read[1]) + 1
    return Reach(first, end)
