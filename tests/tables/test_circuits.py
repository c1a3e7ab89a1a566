import pandas as pd
import pytest
import torch

from llama4lab.run.edges import attribute_edges
from llama4lab.run.metrics import logit_diff
from llama4lab.run.paths import patch_paths
from llama4lab.tables import circuits

CLEAN, CORRUPTED, METRIC = [[5, 9, 17, 3, 8]], [[5, 12, 17, 3, 80]], logit_diff(11, 50)


@pytest.fixture(scope="module")
def small(new_text_model):
    return new_text_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def found(small):
    return attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC)


def test_nodes_count_every_edge_that_leaves_them(found):
    circuit = found.top(60)
    table = circuits.nodes(circuit)
    assert sum(table["edges_out"].tolist()) == len(circuit)
    assert table["sender"].tolist() == circuit.senders
    assert sum(table["score"].tolist()) == pytest.approx(float(circuit.scores[circuit.kept].double().sum()))
    assert (table.loc[table["part"] != "embed", "edges_in"] > 0).all()
    assert circuits.nodes(found.top(0)).empty


def test_edges_needed_is_the_smallest_circuit_that_is_faithful_enough():
    curve = pd.DataFrame({"edges": [0, 90, 30, 400], "faithfulness": [0.0, 0.85, 0.5, 0.99]})
    assert circuits.edges_needed(curve) == 90
    assert circuits.edges_needed(curve, 0.4) == 30
    with pytest.raises(ValueError, match=r"best circuit of the curve has 0\.99"):
        circuits.edges_needed(curve, 1.0)


def test_a_path_of_several_edges_has_the_sum_of_their_estimates(small, found):
    paths = patch_paths(
        small, CLEAN, CORRUPTED, senders="embed_merged", receivers={"all": "**", "out": "logits"}, metric=METRIC
    )
    table = circuits.compare(found, paths)
    assert table["receiver_part"].tolist() == ["several", "logits"]
    assert table["estimate"].tolist()[0] == pytest.approx(float(found.scores[0].sum()), abs=1e-5)
    assert table["effect"].tolist() == paths.table["effect"].tolist()


def test_agreement_is_one_where_estimates_are_the_effects(found):
    edges = found.table.assign(estimate=found.table["score"], effect=found.table["score"])
    agreed = circuits.agreement(edges)
    assert agreed["receiver_part"].iloc[-1] == "all"
    assert agreed["edges"].iloc[:-1].sum() == agreed["edges"].iloc[-1] == len(edges)
    assert agreed["pearson"].iloc[-1] == pytest.approx(1)


def test_what_is_about_something_else_is_not_compared(small, found):
    paths = patch_paths(
        small, CLEAN, CORRUPTED, senders="embed_merged", receivers="logits", metric=METRIC, into="clean"
    )
    with pytest.raises(ValueError, match="patches into corrupted, the paths clean"):
        circuits.compare(found, paths)
    assert torch.isfinite(paths.patched).all()
