"""Faithfulness: how much of the model's behaviour is left when only a circuit carries what is clean."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llama4lab.model.config_parts import text_part
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.circuit import Circuit
from llama4lab.run.graph.mixed_pass import Mixing
from llama4lab.run.graph.nodes import graph_of
from llama4lab.run.graph.recorded_pass import recorded_pass
from llama4lab.run.metrics import Metric, as_metric
from llama4lab.run.pairing import paired


def faithfulness(
    model: HookedPreTrainedModel,
    clean: Any,
    corrupted: Any,
    *,
    circuits: Sequence[Circuit],
    metric: Metric | Callable[[Tensor], Tensor],
) -> pd.DataFrame:
    """Runs the clean prompts with every edge outside a circuit carrying what its sender wrote in the corrupted run.

    Each receiver reads the sum of what its kept senders write in this very pass and of what the others wrote in the
    corrupted run, so nothing is approximated: the circuit of all edges is the clean run, and that of none the corrupted
    run. Many circuits go through the model together.

    Args:
        model: The model.
        clean: The prompts that the model answers as it should: a `Prompt`, or anything that `model.prompt` takes. They
            need not be those that the circuits were found on.
        corrupted: As many prompts, token by token the counterparts of the clean ones.
        circuits: Circuits of this model.
        metric: One of `lab.metrics`, or a function of the logits.

    Columns:
        edges: the number of edges of the circuit.
        share: as a share of all edges of the graph.
        value: the metric of the circuit, the mean over the pairs.
        value_std: its standard deviation over the pairs (0 for one pair).
        clean: the metric of the clean run.
        corrupted: the metric of the corrupted run.
        faithfulness: `(value - corrupted) / (clean - corrupted)`: 0 is the corrupted run, 1 the clean one.
        pairs: the number of pairs.

    Raises:
        ValueError: if the prompts cannot be compared position by position, a circuit is of another model, or the metric
            is the same in both runs.
    """
    graph, pair = graph_of(text_part(model.config)), paired(model, clean, corrupted)
    names = [node.name for node in (*graph.senders, *graph.receivers)]
    for circuit in circuits:
        if names != [node.name for node in (*circuit.graph.senders, *circuit.graph.receivers)]:
            raise ValueError(
                f"A circuit has {len(circuit.graph.senders)} senders and {len(circuit.graph.receivers)} receivers; "
                f"the model has {len(graph.senders)} and {len(graph.receivers)}.\nFind circuits with this model."
            )
    base, source = (recorded_pass(model, prompt, metric) for prompt in (pair.clean, pair.corrupted))
    start, end = float(source.values.mean()), float(base.values.mean())
    if start == end:
        raise ValueError(f"The {as_metric(metric).name} is {start:.3g} in both runs, so there is no share of the way.")
    values = torch.empty(len(circuits), len(base.prompt))
    for some, found in Mixing(model, graph, base, source).values([graph.edges & ~own.kept for own in circuits]):
        values[some] = found.cpu()
    sizes = np.array([len(circuit) for circuit in circuits], dtype=int)
    mean = values.double().mean(1).numpy()
    table = pd.DataFrame({"edges": sizes, "share": sizes / int(graph.edges.sum()), "value": mean})
    table["value_std"] = values.double().std(1).numpy() if values.shape[1] > 1 else 0.0
    table["clean"], table["corrupted"] = end, start
    table["faithfulness"] = (mean - start) / (end - start)
    table["pairs"] = len(base.prompt)
    table.attrs = {"metric": as_metric(metric).name}
    return table
