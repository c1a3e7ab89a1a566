"""Where the nodes of a circuit stand in a drawing: layers upwards, the parts of a layer side by side."""

from dataclasses import dataclass

import pandas as pd

# Heights inside a layer: keys and values below the heads that read them, router below its experts.
HEIGHTS = {"k": 0.0, "v": 0.0, "q": 0.27, "head": 0.27, "router": 0.55, "expert": 0.79}
HEIGHTS |= {"shared_expert": 0.79, "mlp": 0.67, "embed": 0.6, "logits": 0.2}
SKIPPED = 0.3  # of the height of a layer, for all layers in a row that have no node
ENDS = ("sender", "receiver")


@dataclass(frozen=True)
class Spot:
    """A node of the drawing.

    Attributes:
        part: "embed", "head", "k", "v", "router", "expert", "shared_expert", "mlp" or "logits".
        layer: The layer; -1 for the embedding, the number of layers for the logits.
        index: The number of the head, KV head or expert.
        x: Place from left to right.
        y: Height.
    """

    part: str
    layer: int
    index: int
    x: float
    y: float


Key = tuple[str, int, int]


def spots(table: pd.DataFrame) -> dict[Key, Spot]:
    """Places every node of a table of edges.

    Args:
        table: As `Circuit.table` gives it.
    """
    keys = {key_of(edge, end) for edge in table.to_dict("records") for end in ENDS}
    heads = _heads_of_kv(table, keys)
    placed: dict[Key, Spot] = {}
    foot, last = -1.0, -2
    for layer in sorted({layer for _, layer, _ in keys}):
        foot += 1 + SKIPPED * (layer > last + 1)
        last = layer
        own = sorted(key for key in keys if key[1] == layer)
        columns = _columns([key[2] for key in own if key[0] == "head"])
        for key in own:
            part, _, index = key
            if part == "head":
                x = columns[index]
            elif part in ("k", "v"):
                # Of a table that is no whole circuit, no head may be drawn.
                over = [columns[head] for head in heads[key]] or [1.15 * index]
                x = sum(over) / len(over) + (-0.24 if part == "k" else 0.24)
            else:
                x = _feed_forward(key, own)
            placed[key] = Spot(part, layer, index, x, foot + HEIGHTS[part])
    return placed


def key_of(edge: dict, end: str) -> Key:
    """The node at one end of an edge. What goes into a query goes into its head."""
    part = edge[f"{end}_part"]
    return ("head" if part == "q" else part, edge[f"{end}_layer"], edge[f"{end}_index"])


def ties(table: pd.DataFrame, placed: dict[Key, Spot]) -> list[tuple[Spot, Spot]]:
    """The pairs inside a layer that belong together: a KV head and its heads, a router and its experts."""
    pairs = []
    for key, heads in _heads_of_kv(table, set(placed)).items():
        pairs += [(placed[key], placed["head", key[1], head]) for head in heads]
    for spot in placed.values():
        if spot.part == "router":
            pairs += [(spot, other) for other in placed.values() if (other.part, other.layer) == ("expert", spot.layer)]
    return pairs


def _heads_of_kv(table: pd.DataFrame, keys: set[Key]) -> dict[Key, list[int]]:
    """For each key and value the heads that read it, as far as they are drawn."""
    found: dict[Key, list[int]] = {}
    for edge in table.to_dict("records"):
        key = key_of(edge, "receiver")
        if key[0] in ("k", "v"):
            heads = [int(head) for head in edge["receiver_heads"].split(", ")]
            found[key] = [head for head in heads if ("head", key[1], head) in keys]
    return found


def _columns(indices: list[int]) -> dict[int, float]:
    """Evenly spread, in order, around 0."""
    return {index: 1.15 * (i - (len(indices) - 1) / 2) for i, index in enumerate(indices)}


def _feed_forward(key: Key, own: list[Key]) -> float:
    """Experts beside each other, the shared one last; all else in the middle."""
    row = [other for other in own if other[0] in ("expert", "shared_expert")]
    if key not in row:
        return 0.0
    return _columns(list(range(len(row))))[row.index(key)]
