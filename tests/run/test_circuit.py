"""Circuits and their faithfulness: laws, and the circuit of the packaged checkpoint for indirect objects."""

import pandas as pd
import pytest
import torch

from llama4lab.run.circuit import Circuit
from llama4lab.run.circuit_evaluation import faithfulness
from llama4lab.run.edges import attribute_edges
from llama4lab.run.metrics import logit_diff
from llama4lab.tables.circuits import edges_needed
from llama4lab.tiny.domains.indirect_objects import NAMES, TEMPLATES, sentence

CLEAN = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
CORRUPTED = [[5, 12, 17, 3, 80, 44, 22], [71, 7, 2], [90, 14, 33, 61, 60]]
METRIC = logit_diff(11, 50)


@pytest.fixture(scope="module")
def found(small):
    return attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC)


def random_circuits(found, shares) -> list[Circuit]:
    edges, generator = found.graph.edges, torch.Generator().manual_seed(0)
    kept = [edges & (torch.rand(edges.shape, generator=generator) < share) for share in shares]
    return [Circuit(found.graph, own, found.scores) for own in kept]


def on_a_path(circuit: Circuit) -> torch.Tensor:
    """The edges that a walk from the embedding to the logits can use, found by walking edge by edge."""
    graph, kept = circuit.graph, circuit.kept.nonzero().tolist()
    ways = {edge: [other for other in kept if graph.feeds[edge[1], other[0]]] for edge in map(tuple, kept)}

    def reach(starts, step):
        seen, todo = set(), list(starts)
        while todo:
            edge = tuple(todo.pop())
            if edge not in seen:
                seen.add(edge)
                todo += step(edge)
        return seen

    forward = reach([edge for edge in kept if graph.senders[edge[0]].part == "embed"], lambda edge: ways[edge])
    ends = [edge for edge in kept if graph.receivers[edge[1]].part == "logits"]
    backward = reach(ends, lambda edge: [before for before, after in ways.items() if list(edge) in after])
    result = torch.zeros_like(circuit.kept)
    for edge in forward & backward:
        result[edge] = True
    return result


def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(small, found):
    number = int(found.graph.edges.sum())
    curve = faithfulness(small, CLEAN, CORRUPTED, circuits=found.circuits([0, number]), metric=METRIC)
    assert curve["edges"].tolist()[0] == 0
    assert curve["value"].tolist() == pytest.approx([curve["corrupted"][0], curve["clean"][0]], abs=2e-5)
    assert curve["faithfulness"].tolist() == pytest.approx([0, 1], abs=2e-5)
    assert curve["clean"].tolist()[0] == pytest.approx(float(found.clean.mean()), abs=2e-5)


def test_pruning_changes_nothing_that_a_circuit_does(small, found):
    whole = random_circuits(found, (0.01, 0.02, 0.05, 0.2))
    pruned = [circuit.pruned() for circuit in whole]
    assert [len(own) for own in pruned] < [len(own) for own in whole]
    values = [faithfulness(small, CLEAN, CORRUPTED, circuits=own, metric=METRIC)["value"] for own in (whole, pruned)]
    assert values[0].tolist() == pytest.approx(values[1].tolist(), abs=2e-5)


def test_pruning_keeps_the_edges_on_paths_from_the_embedding_to_the_logits(found):
    for circuit in random_circuits(found, (0.01, 0.03)):
        assert torch.equal(circuit.pruned().kept, on_a_path(circuit))


def test_a_circuit_of_the_best_edges_takes_them_in_order(found):
    circuit = found.top(200)
    assert len(circuit) <= 200
    best = found.table.head(200)[["sender", "receiver"]].apply(tuple, axis=1)
    assert set(circuit.table[["sender", "receiver"]].apply(tuple, axis=1)) <= set(best)
    assert bool(circuit.table["score"].abs().is_monotonic_decreasing)
    threshold = float(found.table["score"].abs()[199])
    assert torch.equal(found.above(threshold).kept, circuit.kept)


def test_the_order_of_circuits_is_that_of_the_caller(small, found):
    circuits = random_circuits(found, (0.9, 0.0, 0.5, 1.0))
    together = faithfulness(small, CLEAN, CORRUPTED, circuits=circuits, metric=METRIC)
    alone = [faithfulness(small, CLEAN, CORRUPTED, circuits=[own], metric=METRIC) for own in circuits]
    assert together["edges"].tolist() == [len(own) for own in circuits]
    assert together["value"].tolist() == pytest.approx(pd.concat(alone)["value"].tolist(), abs=2e-5)


def test_what_is_no_edge_or_another_models_is_refused(small, found, new_text_model):
    with pytest.raises(ValueError, match="Keep only pairs that are edges"):
        Circuit(found.graph, torch.ones_like(found.graph.edges), found.scores)
    with pytest.raises(ValueError, match="edges were asked for; the graph has"):
        found.top(10**6)
    other = new_text_model(num_hidden_layers=2)
    with pytest.raises(ValueError, match="Find circuits with this model"):
        faithfulness(other, CLEAN, CORRUPTED, circuits=[found.top(5)], metric=METRIC)
    with pytest.raises(ValueError, match="no share of the way"):
        faithfulness(small, CLEAN, CLEAN, circuits=[found.top(5)], metric=METRIC)


def test_few_edges_hold_the_indirect_object(tiny, no_hooks_left):
    """Truth: layer 4 finds who gives, and heads of layers 6 and 7 copy the other name; others are heard of, too."""

    def pairs(names):
        texts = [
            [sentence(TEMPLATES[0], a, b, giver, "store", "drink").segments[0][0] for giver in (b, a)] for a, b in names
        ]
        prompts = [tiny.prompt([text[side] for text in texts]) for side in (0, 1)]
        return *prompts, logit_diff([f" {a}" for a, _ in names], [f" {b}" for _, b in names])

    clean, corrupted, metric = pairs(list(zip(NAMES[:8], NAMES[8:16], strict=True)))
    found = attribute_edges(tiny, clean, corrupted, metric=metric, steps=5)
    circuits = found.circuits([25, 50, 100, 200])
    curve = faithfulness(tiny, clean, corrupted, circuits=circuits, metric=metric)
    assert edges_needed(curve, 0.8) <= 100
    heads = {"layers.4.self_attn.head_out.2", "layers.4.self_attn.head_out.3", "layers.7.self_attn.head_out.0"}
    assert heads <= set(circuits[2].senders)
    others = pairs(list(zip(NAMES[16:20], NAMES[20:24], strict=True)))
    elsewhere = faithfulness(tiny, *others[:2], circuits=circuits[2:], metric=others[2])
    assert min(elsewhere["faithfulness"].tolist()) > 0.75
