"""Edge attribution against exact path patching, in the limit of small changes and on the packaged checkpoint."""

from collections import Counter

import accelerate
import pytest
import torch

import llama4lab as lab
from llama4lab.run.edges import attribute_edges
from llama4lab.run.metrics import logit_diff, rank
from llama4lab.run.paths import patch_paths
from llama4lab.tables import circuits
from llama4lab.tiny.domains.facts import COUNTRIES, fact

CLEAN = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
CORRUPTED = [[5, 12, 17, 3, 80, 44, 22], [71, 7, 2], [90, 14, 33, 61, 60]]
METRIC = logit_diff(11, 50)


@pytest.fixture(scope="module")
def capitals(tiny):
    """Pairs of a question for one country's capital and for another's, all of one length."""
    texts, answers = [], []
    for wording in (0, 2):
        for a, b in (("France", "Germany"), ("Spain", "Italy"), ("Japan", "China"), ("Egypt", "Kenya")):
            texts.append([fact(country, "capital", wording).segments[0][0] for country in (a, b)])
            answers.append([f" {COUNTRIES[country]['capital']}" for country in (a, b)])
    sizes = [tuple(len(tiny.prompt(text).tokens[0]) for text in pair) for pair in texts]
    best = Counter(size for size in sizes if size[0] == size[1]).most_common(1)[0][0]
    kept = [i for i, size in enumerate(sizes) if size == best]
    prompts = [tiny.prompt([texts[i][side] for i in kept]) for side in (0, 1)]
    return *prompts, logit_diff([answers[i][0] for i in kept], [answers[i][1] for i in kept])


def test_the_first_order_is_the_effect_of_small_changes(small):
    """Prompts that are nearly the same: two tokens whose embeddings differ by little."""
    near = {"embed_tokens.weight": small.model.embed_tokens.weight.detach().clone()}
    weight = near["embed_tokens.weight"]
    weight[101] = weight[9] + 2e-3 * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(5))
    old = small.model.embed_tokens.weight.data
    small.model.embed_tokens.weight.data = weight
    try:
        clean, corrupted = [[5, 101, 17, 3, 8]], [[5, 9, 17, 3, 8]]
        estimate = attribute_edges(small, clean, corrupted, metric=METRIC)
        paths = patch_paths(small, clean, corrupted, senders="**", receivers="**", metric=METRIC)
    finally:
        small.model.embed_tokens.weight.data = old
    assert estimate.jump.abs().max() == 0
    table = circuits.compare(estimate, paths)
    assert len(table) == int(estimate.graph.edges.sum())
    agreed = circuits.agreement(table).set_index("receiver_part")
    assert (agreed.loc[["q", "v", "mlp", "shared_expert", "logits", "all"], "pearson"] > 0.995).all()
    largest = max(table["effect"].abs().tolist())
    assert max(abs(table["estimate"] - table["effect"]).tolist()) < 0.03 * largest


def test_edges_into_the_logits_of_a_linear_end_are_exact(small):
    """Where the norm does not move, the metric is linear in what the logits read: slopes times differences add up."""
    attribution = attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC)
    clean, corrupted = (
        lab.record(small, p, at="layers.3.resid_post", grad=side) for p, side in ((CLEAN, False), (CORRUPTED, True))
    )
    values = corrupted.logits[:, -1, 11] - corrupted.logits[:, -1, 50]
    stream = corrupted["layers.3.resid_post"]
    (slope,) = torch.autograd.grad(values.sum(), stream)
    expected = ((clean["layers.3.resid_post"] - stream) * slope).sum((1, 2))
    torch.testing.assert_close(attribution.by_row[:, :, -1].sum(1), expected.detach(), atol=1e-4, rtol=1e-4)


def test_slopes_of_all_receivers_of_a_layer_add_up_to_the_slope_of_the_stream(small):
    """A change of the stream reaches the receivers behind it and nothing else."""
    attribution = attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC, by_position=True)
    runs = [lab.record(small, p, at="embed_merged", grad=True) for p in (CLEAN, CORRUPTED)]
    values = runs[1].logits[:, -1, 11] - runs[1].logits[:, -1, 50]
    (slope,) = torch.autograd.grad(values.sum(), runs[1]["embed_merged"])
    expected = ((runs[0]["embed_merged"] - runs[1]["embed_merged"]) * slope).sum(-1).detach()
    torch.testing.assert_close(attribution.first_order[:, :, 0].sum(-1), expected, atol=1e-4, rtol=1e-4)


def test_positions_add_up_and_padding_has_none(small):
    by_position = attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC, by_position=True)
    summed = attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC)
    torch.testing.assert_close(by_position.by_row, summed.by_row, atol=1e-5, rtol=0)
    assert by_position.by_position.shape[0] == 7
    padding = by_position.prompt.attention_mask == 0
    assert (by_position.first_order[padding] == 0).all()
    with pytest.raises(ValueError, match="by_position=True"):
        _ = summed.by_position


def test_each_row_is_attributed_as_if_it_were_alone(small):
    together = attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC, steps=3)
    for row in range(3):
        alone = attribute_edges(small, [CLEAN[row]], [CORRUPTED[row]], metric=METRIC, steps=3)
        torch.testing.assert_close(together.by_row[row], alone.by_row[0], atol=2e-5, rtol=0)


def test_the_direction_is_source_less_base(small):
    attribution = attribute_edges(small, CLEAN, CLEAN, metric=METRIC)
    assert attribution.scores.abs().max() == 0
    into = attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC, into="clean")
    swapped = attribute_edges(small, CORRUPTED, CLEAN, metric=METRIC, into="corrupted")
    torch.testing.assert_close(into.scores, swapped.scores)
    assert torch.equal(into.clean, swapped.corrupted)


def test_estimates_follow_the_true_effects_of_edges(tiny, capitals, no_hooks_left):
    clean, corrupted, metric = capitals
    paths = patch_paths(
        tiny,
        clean,
        corrupted,
        senders=["embed_merged", "layers.*.feed_forward.out", "layers.*.feed_forward.shared_expert.out"],
        receivers=["logits", "layers.*.feed_forward", "layers.*.self_attn.v.*", "layers.*.feed_forward.router"],
        metric=metric,
    )
    one = circuits.agreement(circuits.compare(attribute_edges(tiny, clean, corrupted, metric=metric), paths))
    five = circuits.agreement(circuits.compare(attribute_edges(tiny, clean, corrupted, metric=metric, steps=5), paths))
    assert five["pearson"].iloc[-1] > 0.95
    assert five["pearson"].iloc[-1] > one["pearson"].iloc[-1]


def test_what_routers_send_elsewhere_is_part_of_the_estimate(tiny, capitals):
    clean, corrupted, metric = capitals
    attribution = attribute_edges(tiny, clean, corrupted, metric=metric)
    routers = torch.tensor([node.part == "router" for node in attribution.graph.receivers])
    assert attribution.jump[..., routers].abs().max() > 0.01
    assert attribution.jump[..., ~routers].abs().max() == 0
    paths = patch_paths(tiny, clean, corrupted, senders="**", receivers="layers.*.feed_forward.router", metric=metric)
    with_jump = circuits.agreement(circuits.compare(attribution, paths))["pearson"].iloc[-1]
    attribution.jump = torch.zeros_like(attribution.jump)
    assert with_jump > 0.8
    assert with_jump > circuits.agreement(circuits.compare(attribution, paths))["pearson"].iloc[-1]


def test_a_metric_without_a_derivative_is_refused(small):
    with pytest.raises(ValueError, match="no derivative"):
        attribute_edges(small, CLEAN, CORRUPTED, metric=rank(11))
    with pytest.raises(ValueError, match="steps=0"):
        attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC, steps=0)


def test_parameters_and_hooks_are_left_as_they_were(small):
    wanted = [parameter.requires_grad for parameter in small.parameters()]
    attribute_edges(small, CLEAN, CORRUPTED, metric=METRIC)
    assert [parameter.requires_grad for parameter in small.parameters()] == wanted
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


def test_an_offloaded_model_gives_the_same_estimates(tiny):
    offloaded = lab.load()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    clean, corrupted = ("Mary and John met. John gave a drink to", "Mary and John met. Mary gave a drink to")
    metric = logit_diff(" Mary", " John")
    scores = [attribute_edges(model, clean, corrupted, metric=metric).scores for model in (tiny, offloaded)]
    torch.testing.assert_close(*scores, atol=2e-5, rtol=0)
