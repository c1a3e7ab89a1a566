"""`EdgeAttribution`: the estimated effect of swapping each edge of the graph, and the circuits that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.prompt.prompt import Prompt
from llama4lab.run.circuit import Circuit, edge_columns
from llama4lab.run.graph.nodes import Graph
from llama4lab.run.pairing import Side


@dataclass(repr=False, eq=False)
class EdgeAttribution:
    """Estimates of what swapping each edge would do to a metric: patched less base, as in a sweep.

    Attributes:
        graph: The nodes that the last two axes count.
        first_order: What slopes tell, 0 where there is no edge. The axis of positions has length 1 if they were summed.
        jump: What changes of route add, at edges into routers.
        prompt: The prompt whose edges would be swapped, the *base*.
        into: Whether that is the clean or the corrupted one.
        metric: The name of the metric.
        steps: At how many points derivatives were taken; 1 is EAP, more is EAP-IG.
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run.
    """

    graph: Graph
    first_order: Float[Tensor, "row seq sender receiver"]
    jump: Float[Tensor, "row seq sender receiver"]
    prompt: Prompt
    into: Side
    metric: str
    steps: int
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]

    @property
    def by_row(self) -> Float[Tensor, "row sender receiver"]:
        """The estimate of every edge for each pair of prompts."""
        return (self.first_order + self.jump).sum(1)

    @property
    def by_position(self) -> Float[Tensor, "seq sender receiver"]:
        """The estimate of every edge at each position, the mean over the pairs.

        Raises:
            ValueError: if positions were not kept.
        """
        if self.first_order.shape[1] != self.prompt.input_ids.shape[1]:
            raise ValueError("Positions were asked for, but they were summed.\nAttribute with by_position=True.")
        return (self.first_order + self.jump).mean(0)

    @property
    def scores(self) -> Float[Tensor, "sender receiver"]:
        """The estimate of every edge, the mean over the pairs."""
        return self.by_row.mean(0)

    @property
    def table(self) -> pd.DataFrame:
        """One line for each edge, those with the largest estimates first.

        Columns:
            sender, receiver: names of the nodes.
            sender_part, sender_layer, sender_index: what the sender is; see `Node`. Layer -1 is the embedding.
            receiver_part, receiver_layer, receiver_index: what the receiver is. The layer of the logits is the number
                of layers.
            receiver_heads: the query heads that read through the receiver, "0, 1" where they share a KV head.
            score: the estimated effect, `first_order + jump`, the mean over the pairs.
            first_order: what slopes tell.
            jump: what changes of route add.
            score_std: standard deviation of the score over the pairs (0 for one pair).
            pairs: the number of pairs.
        """
        sender, receiver = self.graph.edges.nonzero(as_tuple=True)
        each = self.by_row[:, sender, receiver].double()
        parts = {
            "score": each.mean(0),
            "first_order": self.first_order.sum(1)[:, sender, receiver].double().mean(0),
            "jump": self.jump.sum(1)[:, sender, receiver].double().mean(0),
            "score_std": each.std(0) if len(each) > 1 else torch.zeros(len(sender)),
        }
        table = edge_columns(self.graph, sender.tolist(), receiver.tolist())
        table = table.assign(**{name: part.numpy() for name, part in parts.items()}, pairs=len(each))
        table.attrs = {"metric": self.metric, "into": self.into, "steps": self.steps}
        return table.iloc[np.argsort(-np.abs(table["score"].to_numpy()), kind="stable")].reset_index(drop=True)

    def top(self, count: int) -> Circuit:
        """The circuit of the edges with the largest estimates, either sign.

        Edges that lie on no path from the embedding to the logits carry nothing, and are left out; so a circuit may
        have fewer edges than asked for.

        Args:
            count: How many edges to take.

        Raises:
            ValueError: if there are not so many, or less than 0 are asked for.
        """
        edges = self.graph.edges
        if not 0 <= count <= int(edges.sum()):
            raise ValueError(f"{count} edges were asked for; the graph has {int(edges.sum())}.")
        size = self.scores.abs().masked_fill(~edges, -1.0).flatten()
        kept = torch.zeros_like(edges).flatten()
        kept[size.argsort(descending=True, stable=True)[:count]] = True
        return Circuit(self.graph, kept.view_as(edges), self.scores).pruned()

    def above(self, threshold: float | int) -> Circuit:
        """The circuit of the edges whose estimate is at least so large, either sign; pruned like `top`."""
        return Circuit(self.graph, self.graph.edges & (self.scores.abs() >= threshold), self.scores).pruned()

    def circuits(self, counts: Sequence[int] | None = None) -> list[Circuit]:
        """Circuits of several sizes, for a faithfulness curve.

        Args:
            counts: As in `top`; by default about doubling from 0 edges to all of them.
        """
        if counts is None:
            number = int(self.graph.edges.sum())
            counts = [0, *dict.fromkeys(int(size) for size in np.geomspace(8, number, 16).round())]
        return [self.top(count) for count in counts]

    def __repr__(self) -> str:
        name = "EAP" if self.steps == 1 else f"EAP-IG with {self.steps} steps"
        return (
            f"EdgeAttribution: {int(self.graph.edges.sum())} edges, {len(self.prompt)} pairs, {name}\n"
            f"  {self.metric}: {float(self.clean.mean()):.3g} clean, {float(self.corrupted.mean()):.3g} corrupted; "
            f"edges of the {self.into} run are swapped"
        )
