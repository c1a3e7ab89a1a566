"""The mixed pass against receivers that are computed by hand and patched one after the other."""

import pytest
import torch

import llama4lab as lab
from llama4lab.run.graph.mixed_pass import Mixing
from llama4lab.run.graph.nodes import Graph, graph_of
from llama4lab.run.graph.recorded_pass import recorded_pass
from llama4lab.run.metrics import loss


@pytest.fixture(scope="module")
def mixing(small, batch, difference) -> Mixing:
    base, source = (recorded_pass(small, prompt, difference) for prompt in batch)
    return Mixing(small, graph_of(small.text.config), base, source)


def values(mixing: Mixing, variants: list[torch.Tensor]) -> torch.Tensor:
    found = torch.full((len(variants), len(mixing.base.prompt)), torch.nan)
    for some, own in mixing.values(variants):
        found[some] = own
    return found


def by_receiver(graph: Graph, swapped: torch.Tensor) -> dict[str, list[str]]:
    """For the receivers with swapped edges the senders of these."""
    columns = zip(graph.receivers, swapped.T.tolist(), strict=True)
    names = {
        receiver.name: [sender.name for sender, own in zip(graph.senders, column, strict=True) if own]
        for receiver, column in columns
    }
    return {name: some for name, some in names.items() if some}


def test_each_receiver_reads_its_own_mixture(mixing, small, batch, difference, step_by_step):
    graph, generator = mixing.graph, torch.Generator().manual_seed(3)
    for share in (0.03, 0.5):
        swapped = graph.edges & (torch.rand(graph.edges.shape, generator=generator) < share)
        expected = step_by_step(small, *batch, by_receiver(graph, swapped), difference)
        torch.testing.assert_close(values(mixing, [swapped])[0], expected, atol=2e-5, rtol=0)


def test_single_edges_of_every_kind_equal_a_path_patched_by_hand(mixing, small, batch, difference, step_by_step):
    graph, kinds = mixing.graph, {}
    for edge in graph.edges.nonzero().tolist():  # the last edge of each kind
        sender, receiver = graph.senders[edge[0]], graph.receivers[edge[1]]
        kinds["to", receiver.part] = kinds["from", sender.part] = tuple(edge)
    variants = []
    for edge in set(kinds.values()):
        variants.append(torch.zeros_like(graph.edges))
        variants[-1][edge] = True
    found = values(mixing, variants)
    for swapped, own in zip(variants, found, strict=True):
        expected = step_by_step(small, *batch, by_receiver(graph, swapped), difference)
        torch.testing.assert_close(own, expected, atol=2e-5, rtol=0)


def test_no_swapped_edge_is_the_base_run_and_all_of_them_are_the_source_run(mixing):
    edges = mixing.graph.edges
    nothing, everything = values(mixing, [torch.zeros_like(edges), edges])
    assert torch.equal(nothing, mixing.base.values)
    torch.testing.assert_close(everything, mixing.source.values, atol=2e-5, rtol=0)


def test_variants_that_run_together_are_those_that_run_alone(mixing, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    shape = mixing.graph.edges.shape
    variants = [mixing.graph.edges & (torch.rand(shape, generator=generator) < 0.002) for _ in range(12)]
    together = values(mixing, variants)
    monkeypatch.setattr("llama4lab.run.graph.mixed_pass.MOST_TOKENS", 1)
    torch.testing.assert_close(values(mixing, variants), together, atol=2e-5, rtol=0)


def test_a_metric_of_all_rows_sees_whole_batches(mixing, small, batch):
    runs = [recorded_pass(small, prompt, lambda logits: logits[:, -1, 11].mean()) for prompt in batch]
    each = [recorded_pass(small, prompt, lab.metrics.Metric("one", -1, lambda _: _eleven)) for prompt in batch]
    variants = [mixing.graph.edges, torch.eye(*mixing.graph.edges.shape, dtype=torch.bool) & mixing.graph.edges]
    joint = values(Mixing(small, mixing.graph, runs[0], runs[1]), variants)
    alone = values(Mixing(small, mixing.graph, each[0], each[1]), variants)
    torch.testing.assert_close(joint, alone.mean(1, keepdim=True).expand_as(joint), atol=2e-5, rtol=0)


def _eleven(logits, _):
    return logits[:, 0, 11]


def test_a_metric_of_every_position_works_too(small, batch):
    base, source = (recorded_pass(small, prompt, loss()) for prompt in batch)
    mixing = Mixing(small, graph_of(small.text.config), base, source)
    # The loss is that of the base prompt's tokens, which the source run was not asked about.
    found = values(mixing, [mixing.graph.edges])[0]
    logits = lab.record(small, batch[1]).logits
    expected = base.metric(logits, torch.arange(len(batch[0])))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_frozen_routes_leave_edges_into_routers_without_effect(mixing):
    routers = torch.tensor([node.part == "router" for node in mixing.graph.receivers])
    swapped = mixing.graph.edges & routers
    free = values(mixing, [swapped])[0]
    frozen = values(Mixing(mixing.model, mixing.graph, mixing.base, mixing.source, frozen_routing=True), [swapped])[0]
    assert not torch.allclose(free, mixing.base.values, atol=1e-3)
    torch.testing.assert_close(frozen, mixing.base.values, atol=2e-5, rtol=0)


def test_images_reach_the_graph_through_the_merged_embedding(new_model, image_batch, difference):
    model = new_model(num_hidden_layers=3)
    inputs = [image_batch([[1], [1]], seed=seed) for seed in (0, 1)]
    inputs[1]["input_ids"] = inputs[0]["input_ids"]
    runs = []
    for own in inputs:
        ids, mask = own["input_ids"], own["attention_mask"]
        tokens = [["x"] * ids.shape[1]] * len(ids)
        kinds = [["image" if token == 127 else "text" for token in row] for row in ids.tolist()]
        prompt = lab.Prompt(ids, mask, own["pixel_values"], tokens, kinds)
        runs.append(recorded_pass(model, prompt, difference))
    mixing = Mixing(model, graph_of(model.text.config), *runs)
    everything = values(mixing, [mixing.graph.edges])[0]
    assert not torch.allclose(runs[0].values, runs[1].values, atol=1e-3)
    torch.testing.assert_close(everything, runs[1].values, atol=2e-5, rtol=0)


def test_an_interrupted_pass_leaves_no_hook(mixing, small, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small.modules())
    monkeypatch.setattr("llama4lab.run.graph.mixed_pass.values_of", broken)
    with pytest.raises(KeyboardInterrupt):
        values(mixing, [mixing.graph.edges])
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small.modules()) == count
