"""Where the experts and the ribbons of a flow between layers are."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

OTHER = -1  # the experts of a layer that are too small to draw
SPACE = 0.16  # of the height of a layer, for the gaps between its experts
SWEEPS = 8


@dataclass(frozen=True)
class Flow:
    """A flow through layers; tokens are shares of those of a layer.

    Attributes:
        layers: The layers in order.
        nodes: For each layer, from the top: columns expert, tokens, height, top, of a layer that reaches from 0 to 1.
        links: Columns step, from_expert, to_expert, tokens, height, from_top, to_top.
        left_out: Share of the tokens in links that are too weak to draw.
    """

    layers: list[int]
    nodes: list[pd.DataFrame]
    links: pd.DataFrame
    left_out: float


def lay_out(table: pd.DataFrame, most: int, least: float) -> Flow:
    """Lays a flow out: the larger experts of each layer, ordered so that ribbons cross little, and the rest as one.

    Args:
        table: As `tables.routing.transitions` gives it.
        most: The most experts of a layer.
        least: The least share of tokens of a ribbon.

    Raises:
        ValueError: if the pairs of layers of the table are no chain, or have no tokens.
    """
    layers = _chain(table)
    links = _merged(table, layers, most)
    orders = _ordered(links, len(layers))
    gaps = SPACE / max(max(len(order) for order in orders) - 1, 1)
    nodes = [_placed(links, step, order, gaps) for step, order in enumerate(orders)]
    links = _stacked(links, nodes)
    weak = links["tokens"].to_numpy() < least
    left_out = float(links.loc[weak, "tokens"].sum()) / (len(layers) - 1)
    return Flow(layers, nodes, links.loc[~weak, :], left_out)


def _chain(table: pd.DataFrame) -> list[int]:
    """The layers, if each pair of the table starts where the one before ends."""
    pairs = sorted(set(zip(table["from_layer"].tolist(), table["to_layer"].tolist(), strict=True)))
    layers = [pairs[0][0], *(after for _, after in pairs)]
    if layers[:-1] != [before for before, _ in pairs]:
        found = ", ".join(f"{before} to {after}" for before, after in pairs[:6])
        raise ValueError(
            f"A flow runs from layer to layer in a chain; the table has {found}.\n"
            "Choose the layers when the table is made: tables.routing.transitions(source, layers=[1, 3, 5])."
        )
    return layers


def _merged(table: pd.DataFrame, layers: list[int], most: int) -> pd.DataFrame:
    """Links with shares of the tokens of their pair of layers, small experts merged."""
    step = np.searchsorted(np.array(layers), table["from_layer"].to_numpy())
    links = pd.DataFrame({"step": step, "from_expert": table["from_expert"], "to_expert": table["to_expert"]})
    whole = table.groupby("from_layer")["tokens"].transform("sum").to_numpy(dtype=float)
    if not whole.all():
        raise ValueError("There is nothing to draw: between some of the layers no token went anywhere.")
    links["tokens"] = table["tokens"].to_numpy(dtype=float) / whole
    for place in range(len(layers)):
        loads = _loads(links, place)
        kept = sorted(loads, key=lambda expert, of=loads: -of[expert])[:most]
        for side, other in (("from_expert", place), ("to_expert", place - 1)):
            small = (links["step"] == other) & ~links[side].isin(kept)
            links.loc[small, side] = OTHER
    links = links.loc[links["tokens"] > 0, :]
    keys = ["step", "from_expert", "to_expert"]
    return links.pivot_table(index=keys, values="tokens", aggfunc="sum").reset_index()


def _loads(links: pd.DataFrame, place: int) -> dict[int, float]:
    """Tokens of each expert of a layer: the larger of what comes in and what goes on."""
    sums: list[dict[int, float]] = [{}, {}]
    for found, side, step in zip(sums, ("from_expert", "to_expert"), (place, place - 1), strict=True):
        own = links.loc[links["step"] == step, :]
        for expert, tokens in zip(own[side].tolist(), own["tokens"].tolist(), strict=True):
            found[expert] = found.get(expert, 0.0) + tokens
    loads = {
        expert: max(found.get(expert, 0.0) for found in sums) for expert in sorted(sums[0].keys() | sums[1].keys())
    }
    return {expert: tokens for expert, tokens in loads.items() if tokens > 0}


def _ordered(links: pd.DataFrame, count: int) -> list[list[int]]:
    """The experts of each layer from the top: each near the middle of those that it exchanges tokens with."""
    orders = [sorted(_loads(links, place), key=lambda expert: (expert == OTHER, expert)) for place in range(count)]
    for sweep in range(SWEEPS):
        places = range(1, count) if sweep % 2 == 0 else range(count - 2, -1, -1)
        for place in places:
            neighbour = place - 1 if sweep % 2 == 0 else place + 1
            own, far = ("to_expert", "from_expert") if sweep % 2 == 0 else ("from_expert", "to_expert")
            near = links.loc[links["step"] == min(place, neighbour), :]
            rank = {expert: index for index, expert in enumerate(orders[neighbour])}
            names, number = np.unique(near[own], return_inverse=True)
            weight = near["tokens"].to_numpy(dtype=float)
            height = np.bincount(number, weight * [rank[expert] for expert in near[far]]) / np.bincount(number, weight)
            middle = dict(zip(names.tolist(), height.tolist(), strict=True))
            orders[place].sort(key=lambda expert, at=middle: (expert == OTHER, at.get(expert, 0.0)))
    return orders


def _placed(links: pd.DataFrame, place: int, order: list[int], gaps: float) -> pd.DataFrame:
    loads = _loads(links, place)
    tokens = np.array([loads[expert] for expert in order])
    heights = tokens * (1 - SPACE)
    free = 1 - heights.sum() - gaps * (len(order) - 1)
    top = free / 2 + np.cumsum([0.0, *(heights[:-1] + gaps)])
    return pd.DataFrame({"expert": order, "tokens": tokens, "height": heights, "top": top})


def _stacked(links: pd.DataFrame, nodes: list[pd.DataFrame]) -> pd.DataFrame:
    """Adds where ribbons start and end: at each expert in the order of the experts on the other side."""
    rank = [{expert: index for index, expert in enumerate(own["expert"])} for own in nodes]
    top = [dict(zip(own["expert"], own["top"], strict=True)) for own in nodes]
    links = links.assign(
        here=[rank[step][expert] for step, expert in zip(links["step"], links["from_expert"], strict=True)],
        there=[rank[step + 1][expert] for step, expert in zip(links["step"], links["to_expert"], strict=True)],
    )
    links["height"] = links["tokens"] * (1 - SPACE)
    for side, keys, shift in (("from", ["step", "here", "there"], 0), ("to", ["step", "there", "here"], 1)):
        links = links.sort_values(keys)
        before = links.groupby(keys[:2])["height"].cumsum() - links["height"]
        start = [top[step + shift][e] for step, e in zip(links["step"], links[f"{side}_expert"], strict=True)]
        links[f"{side}_top"] = before + np.array(start)
    return links.drop(columns=["here", "there"])
