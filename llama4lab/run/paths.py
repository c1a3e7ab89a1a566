"""Path patching: what one part of the model tells another, and nothing else.

To patch the path from a sender to a receiver is to run the base prompt with one thing changed: when the receiver reads
the residual stream, it finds what the sender wrote in the source run in place of what it writes now. All other readers,
those between the two as well, find the sender as it is. What the receiver then does differently goes on freely to
everything behind it. For a single receiver this is the path patching of Wang et al. (2022, "Interpretability in the
Wild"): all other heads and MLPs are as in the base run until the receiver has its input, and free behind it.

Several receivers patched together read the change all at once, and a later one also sees what an earlier one made of
it. So a sender patched into all its receivers is the sender patched, as `sweep` would do it; and a sender patched into
the logits alone is its direct effect, with the final norm taken anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.config_parts import text_part
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.graph.mixed_pass import Mixing
from llama4lab.run.graph.nodes import Node, Nodes, graph_of
from llama4lab.run.graph.recorded_pass import recorded_pass
from llama4lab.run.metrics import Metric, as_metric
from llama4lab.run.pairing import Side, other_side, paired

COLUMNS = ("patched", "effect", "normalised")


def patch_paths(
    model: HookedPreTrainedModel,
    clean: Any,
    corrupted: Any,
    *,
    senders: Nodes,
    receivers: Nodes,
    metric: Metric | Callable[[Tensor], Tensor],
    into: Side = "corrupted",
    frozen_routing: bool = False,
) -> "PathEffects":
    """Patches the path from each sender to each receiver; many paths go through the model together.

    The names of all senders and receivers are in `graph_of(model.text.config)`: for example
    `layers.3.self_attn.head_out.1` (a head), `layers.3.feed_forward.experts.out.5` (what routed expert 5 writes, at the
    tokens that are sent to it), `layers.3.feed_forward.shared_expert.out`, `layers.2.feed_forward.out` (a dense MLP),
    `embed_merged`; and `layers.5.self_attn.q.1`, `layers.5.self_attn.k.0` (of KV head 0, so of all query heads that
    share it), `layers.5.feed_forward.router`, `layers.5.feed_forward.experts.2` (what routed expert 2 reads), `logits`.

    Args:
        model: The model.
        clean: The prompts that the model answers as it should: a `Prompt`, or anything that `model.prompt` takes.
        corrupted: As many prompts, token by token the counterparts of the clean ones.
        senders: Names or globs, each sender by itself; or a mapping of labels to names or globs that are patched
            together. `layers.3.resid_post` is all that has been written until there.
        receivers: The same for receivers. `layers.3.resid_post` is all that read from there on.
        metric: One of `lab.metrics`, or a function of the logits.
        into: Which run is the base: "corrupted" for what restores the answer, "clean" for what spoils it.
        frozen_routing: Whether all tokens keep the experts and gates of the base run, so that no effect comes from
            tokens that are sent elsewhere.

    Raises:
        ValueError: if the prompts cannot be compared position by position, a name matches nothing, or no sender comes
            before a receiver.
    """
    graph, pair = graph_of(text_part(model.config)), paired(model, clean, corrupted)
    other = other_side(into)
    base, source = (recorded_pass(model, pair.prompt(side), metric) for side in (into, other))
    cells, variants = [], []
    for sender, some in graph.sets("sender", senders).items():
        for receiver, own in graph.sets("receiver", receivers).items():
            swapped = torch.zeros_like(graph.edges)
            swapped[torch.tensor(some)[:, None], torch.tensor(own, dtype=torch.long)] = True
            swapped &= graph.edges
            if bool(swapped.any()):
                cells.append(
                    Path(sender, receiver, [graph.senders[i] for i in some], [graph.receivers[i] for i in own])
                )
                variants.append(swapped)
    if not cells:
        raise ValueError("None of the senders comes before one of the receivers, so there is no path to patch.")
    patched = torch.empty(len(cells), len(base.prompt))
    for some, values in Mixing(model, graph, base, source, frozen_routing).values(variants):
        patched[some] = values.cpu()
    values = {into: base.values.cpu(), other: source.values.cpu()}
    edges = [int(swapped.sum()) for swapped in variants]
    return PathEffects(
        cells, edges, patched, values["clean"], values["corrupted"], base.prompt, into, as_metric(metric).name
    )


@dataclass(frozen=True)
class Path:
    """What was patched together.

    Attributes:
        sender: The name or label of the senders.
        receiver: The name or label of the receivers.
        senders: The nodes.
        receivers: The nodes.
    """

    sender: str
    receiver: str
    senders: list[Node]
    receivers: list[Node]


@dataclass(repr=False, eq=False)
class PathEffects:
    """The effect of each path.

    Attributes:
        paths: What was patched, path by path. Pairs of a sender and an earlier receiver are not among them.
        edges: How many edges each path has: 1 for a single sender and receiver.
        patched: The metric of each path for each pair of prompts.
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run.
        prompt: The base prompt.
        into: Whether that is the clean or the corrupted one.
        metric: The name of the metric.
    """

    paths: list[Path]
    edges: list[int]
    patched: Float[Tensor, "path row"]
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]
    prompt: Prompt
    into: Side
    metric: str

    @property
    def table(self) -> pd.DataFrame:
        """One line for each path: means over the pairs.

        Columns:
            sender, receiver: name or label.
            sender_layer, receiver_layer: the layer; missing where there are several or none.
            receiver_heads: the query heads that the path goes through; "" if to none. Those that share a KV head cannot
                be told apart at its key and value.
            edges: the number of edges that were patched together.
            patched, clean, corrupted: the metric of the patched run and of the two runs.
            effect: `patched` less the metric of the run that was patched.
            normalised: the effect as a share of the way to the other run; 1 is all of it. NaN if there is no way to go.
            effect_std: standard deviation of the effect over the pairs (0 for one pair).
            pairs: the number of pairs.
        """
        base, source = (self.clean, self.corrupted) if self.into == "clean" else (self.corrupted, self.clean)
        effect = (self.patched - base).double()
        way = float((source - base).double().mean())
        table = pd.DataFrame({"sender": [p.sender for p in self.paths], "receiver": [p.receiver for p in self.paths]})
        table["sender_layer"] = _layers([path.senders for path in self.paths])
        table["receiver_layer"] = _layers([path.receivers for path in self.paths])
        table["receiver_heads"] = [_heads(path.receivers) for path in self.paths]
        table["edges"] = self.edges
        table["patched"] = self.patched.double().mean(1).numpy()
        table["clean"], table["corrupted"] = float(self.clean.mean()), float(self.corrupted.mean())
        table["effect"] = effect.mean(1).numpy()
        table["normalised"] = table["effect"] / way if way else float("nan")
        table["effect_std"] = effect.std(1).numpy() if effect.shape[1] > 1 else 0.0
        table["pairs"] = effect.shape[1]
        table.attrs = {"metric": self.metric, "into": self.into}
        return table

    def grid(self, column: str = "normalised") -> pd.DataFrame:
        """A line for each sender and a column for each receiver; NaN where there is no path.

        Args:
            column: "patched", "effect" or "normalised".

        Raises:
            ValueError: if it is another.
        """
        if column not in COLUMNS:
            raise ValueError(f"A grid of {column!r} was asked for; choose from {', '.join(COLUMNS)}.")
        grid = self.table.pivot(index="sender", columns="receiver", values=column)
        order = (dict.fromkeys(path.sender for path in self.paths), dict.fromkeys(path.receiver for path in self.paths))
        return grid.loc[list(order[0]), list(order[1])]

    def __repr__(self) -> str:
        return (
            f"PathEffects: {len(self.paths)} paths, {len(self.prompt)} pairs, into the {self.into} run\n"
            f"  {self.metric}: {float(self.clean.mean()):.3g} clean, {float(self.corrupted.mean()):.3g} corrupted"
        )


def _layers(nodes: list[list[Node]]) -> pd.Series:
    each = [{node.layer for node in own} for own in nodes]
    return pd.Series([own.pop() if len(own) == 1 else None for own in each], dtype="Int64")


def _heads(receivers: list[Node]) -> str:
    """The query heads, if the receivers are of one layer."""
    if len({node.layer for node in receivers}) != 1:
        return ""
    return ", ".join(map(str, sorted({head for node in receivers for head in node.heads})))
