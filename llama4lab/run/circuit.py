"""`Circuit`: some of the edges of the graph."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.run.graph.nodes import Graph


@dataclass(repr=False, eq=False)
class Circuit:
    """The edges that are kept. All others are swapped for those of the corrupted run when it is evaluated.

    Attributes:
        graph: The nodes.
        kept: Which edges are kept.
        scores: What the edges were chosen by.
    """

    graph: Graph
    kept: Bool[Tensor, "sender receiver"]
    scores: Float[Tensor, "sender receiver"]

    def __post_init__(self) -> None:
        if self.kept.shape != self.graph.edges.shape or bool((self.kept & ~self.graph.edges).any()):
            raise ValueError(
                f"A circuit keeps pairs of shape {list(self.kept.shape)}; the graph has edges of shape "
                f"{list(self.graph.edges.shape)}.\nKeep only pairs that are edges: kept & graph.edges."
            )

    def __len__(self) -> int:
        """The number of edges."""
        return int(self.kept.sum())

    def pruned(self) -> "Circuit":
        """The circuit without the edges that lie on no path from the embedding to the logits.

        That changes nothing of what the circuit does: a sender whose inputs are all corrupted writes what it wrote in
            the
        corrupted run, and what nobody reads has no effect. A path goes through a head by its query, key or value, and
        through an expert by its router or its input.
        """
        fed, last = self.graph.feeds, len(self.graph.receivers) - 1
        reached = torch.tensor([node.part == "embed" for node in self.graph.senders])
        useful = torch.arange(len(self.graph.receivers)) == last
        for stage in range(self.graph.receivers[last].stage + 1):
            here = torch.tensor([node.stage == stage for node in self.graph.receivers])
            read = (self.kept & reached[:, None]).any(0) & here
            reached = reached | fed[read].any(0)
        for stage in range(self.graph.receivers[last].stage, -1, -1):
            here = torch.tensor([node.stage == stage for node in self.graph.senders])
            wanted = (self.kept & useful).any(1) & here
            useful = useful | fed[:, wanted].any(1)
        return replace(self, kept=self.kept & reached[:, None] & useful)

    @property
    def table(self) -> pd.DataFrame:
        """One line for each edge, those with the largest scores first.

        Columns: `score`, and those that say what sender and receiver are, as in `EdgeAttribution.table`.
        """
        sender, receiver = self.kept.nonzero(as_tuple=True)
        table = edge_columns(self.graph, sender.tolist(), receiver.tolist())
        table["score"] = self.scores[sender, receiver].double().numpy()
        return table.iloc[np.argsort(-np.abs(table["score"].to_numpy()), kind="stable")].reset_index(drop=True)

    @property
    def senders(self) -> list[str]:
        """The senders with an edge in the circuit, in the order of the forward pass."""
        return [node.name for node, used in zip(self.graph.senders, self.kept.any(1).tolist(), strict=True) if used]

    def __repr__(self) -> str:
        parts = [f"{len(self)} of {int(self.graph.edges.sum())} edges", f"{len(self.senders)} senders"]
        return f"Circuit: {', '.join(parts)}"


def edge_columns(graph: Graph, senders: Sequence[int], receivers: Sequence[int]) -> pd.DataFrame:
    """The columns that say what the two ends of edges are; see `EdgeAttribution.table`."""
    columns: dict[str, list] = {}
    ends = {"sender": [graph.senders[i] for i in senders], "receiver": [graph.receivers[i] for i in receivers]}
    for role, nodes in ends.items():
        columns[role] = [node.name for node in nodes]
        columns[f"{role}_part"] = [node.part for node in nodes]
        columns[f"{role}_layer"] = [node.stage // 2 if node.layer is None else node.layer for node in nodes]
        columns[f"{role}_index"] = [node.index for node in nodes]
        if role == "receiver":
            columns["receiver_heads"] = [", ".join(map(str, node.heads)) for node in nodes]
    return pd.DataFrame(columns)
