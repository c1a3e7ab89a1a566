"""Circuits: their nodes, how large one has to be, and how far estimated edges can be trusted."""

import pandas as pd

from llama4lab.run.circuit import Circuit
from llama4lab.run.edge_attribution import EdgeAttribution
from llama4lab.run.paths import PathEffects
from llama4lab.tables.comparison import check_comparable, correlation


def nodes(circuit: Circuit) -> pd.DataFrame:
    """Gives one line for each sender with an edge in a circuit, in the order of the forward pass.

    Columns:
        sender: its name.
        part, layer, index: what it is; see `Node`. The layer of the embedding is -1.
        edges_in: how many edges end in the receivers that it computes what it writes from. Edges into a shared KV head
            or into a router count for each head or expert behind it.
        edges_out: how many edges it has to receivers.
        score: the sum of the scores of these.
    """
    graph, kept = circuit.graph, circuit.kept
    inward = (kept.double().sum(0) @ graph.feeds.double()).long()
    lines = [
        {
            "sender": node.name,
            "part": node.part,
            "layer": -1 if node.layer is None else node.layer,
            "index": node.index,
            "edges_in": int(inward[i]),
            "edges_out": int(kept[i].sum()),
            "score": float(circuit.scores[i][kept[i]].double().sum()),
        }
        for i, node in enumerate(graph.senders)
        if bool(kept[i].any())
    ]
    columns = ["sender", "part", "layer", "index", "edges_in", "edges_out", "score"]
    return pd.DataFrame(lines, columns=columns)


def edges_needed(curve: pd.DataFrame, share: float = 0.8) -> int:
    """Gives the number of edges of the smallest circuit of a curve that is at least so faithful.

    Args:
        curve: As `faithfulness` gives it.
        share: The faithfulness that is asked for.

    Raises:
        ValueError: if no circuit of the curve is.
    """
    enough = curve.loc[curve["faithfulness"] >= share, "edges"]
    if enough.empty:
        raise ValueError(
            f"A faithfulness of {share:g} was asked for; the best circuit of the curve has "
            f"{curve['faithfulness'].max():.3g}.\nEvaluate larger circuits too."
        )
    return int(enough.min())


def compare(attribution: EdgeAttribution, paths: PathEffects) -> pd.DataFrame:
    """Puts the estimates of edges beside the effects that path patching measured; one line for each path.

    A path of several edges has the sum of their estimates.

    Args:
        attribution: Of the same prompts, metric and direction.
        paths: What was patched.

    Columns:
        sender, receiver: the name or label of the path.
        receiver_part: what the receiver is; "several" where the path has several kinds of them.
        estimate: the estimated effect.
        effect: the true effect.

    Raises:
        ValueError: if the two are not about the same thing.
    """
    check_comparable(attribution, paths, "the paths")
    scores = attribution.scores.double()
    senders = {node.name: i for i, node in enumerate(attribution.graph.senders)}
    receivers = {node.name: i for i, node in enumerate(attribution.graph.receivers)}
    estimates, parts = [], []
    for path in paths.paths:
        rows, columns = [senders[node.name] for node in path.senders], [receivers[node.name] for node in path.receivers]
        estimates.append(float(scores[rows][:, columns].sum()))
        kinds = {node.part for node in path.receivers}
        parts.append(kinds.pop() if len(kinds) == 1 else "several")
    measured = paths.table
    table = measured[["sender", "receiver"]].assign(receiver_part=parts, estimate=estimates, effect=measured["effect"])
    table.attrs = {"metric": paths.metric, "into": paths.into}
    return table


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Gives how well estimates follow the effects, for each kind of receiver and, last, for all.

    Args:
        table: As `compare` gives it.

    Columns:
        receiver_part: the kind; "all" in the last line.
        edges: number of paths.
        pearson: correlation of `estimate` and `effect`; NaN where one of them does not vary.
        spearman: correlation of their ranks.
    """
    groups = [*table.groupby("receiver_part", sort=False), ("all", table)]
    lines = []
    for part, own in groups:
        numbers, ranks = (t[["estimate", "effect"]].to_numpy(dtype=float).T for t in (own, own.rank(numeric_only=True)))
        line = {"receiver_part": part, "edges": len(own), "pearson": correlation(*numbers)}
        lines.append(line | {"spearman": correlation(*ranks)})
    return pd.DataFrame(lines)
