"""A model whose routing is known in closed form: every number of the statistics against it.

The embeddings of the tokens of class c point along axis c, attention and dense layers and shared experts add nothing.
The first router sends class c to expert c, the second to expert c + 1; the second best expert of each is the next one.
Expert e writes along an axis of its own, which no router looks at, so that the second router sees the same direction, a
little shorter.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch

import llama4lab as lab
from llama4lab.run.corpus.arrays import RESOLUTION

CLASSES, D, STEP = 4, 64, 0.1  # STEP: of the logits from the best expert to the second best
ROWS = [[1, 2, 3, 4, 5], [6, 2, 2], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3]]
GROUPS = ["short", "short", "long", "short"]


def class_of(token: int) -> int:
    return token % CLASSES


@pytest.fixture(scope="module", params=[1, 2], ids=["top-1", "top-2"])
def planted(request, new_text_model):
    model = new_text_model(num_experts_per_tok=request.param, num_hidden_layers=4, rms_norm_eps=1e-12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
            if "embed_tokens" in name:
                for token in range(len(parameter)):
                    parameter[token, class_of(token)] = 1.0
            if name.endswith("lm_head.weight"):  # the prediction after class c is token 100 + c
                for c in range(CLASSES):
                    parameter[100 + c, c] = 1.0
        for place, layer in enumerate((1, 3)):
            block = model.text.layers[layer].feed_forward
            for c in range(CLASSES):
                block.router.weight[(c + place) % CLASSES, c] = 2 * STEP
                block.router.weight[(c + place + 1) % CLASSES, c] = STEP
            for expert in range(CLASSES):
                d_ff = block.experts.down_proj.shape[1]
                block.experts.gate_up_proj[expert, :CLASSES, 0] = 1.0  # whatever the class
                block.experts.gate_up_proj[expert, :CLASSES, d_ff] = 1.0
                block.experts.down_proj[expert, 0, CLASSES + CLASSES * place + expert] = 0.1
    return model


def truth(top_k: int) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """For each router the length of its input along the class axis, the gates of its slots, and the norms of writes."""
    length, inputs, gates, norms = 1.0, [], [], []
    squares = 1.0
    for _ in range(2):
        along = math.sqrt(D) * length / math.sqrt(squares)
        own = [1 / (1 + math.exp(-step * STEP * along)) for step in (2, 1)][:top_k]
        fed = [gate * along for gate in own]
        written = [0.1 * x * x / (1 + math.exp(-x)) for x in fed]
        inputs.append(along)
        gates.append(own)
        norms.append(written)
        squares += sum(norm**2 for norm in written)
    return inputs, gates, norms


def experts_of(token: int, place: int, top_k: int) -> list[int]:
    return [(class_of(token) + place + slot) % CLASSES for slot in range(top_k)]


@pytest.fixture(scope="module")
def stats(planted) -> lab.RoutingStats:
    items = [{"text": row, "group": group} for row, group in zip(ROWS, GROUPS, strict=True)]
    return lab.routing_stats(planted, items, by="group", vocabulary=True, progress=False)


def test_choices(stats):
    expected: Counter = Counter()
    for row, group in zip(ROWS, GROUPS, strict=True):
        for token in row:
            for place, layer in enumerate((1, 3)):
                for slot, expert in enumerate(experts_of(token, place, stats.top_k)):
                    expected[group, "text", layer, slot, expert] += 1
    table = stats.choices()
    found = {tuple(line[:5]): line[5] for line in table.itertuples(index=False)}
    assert len(found) == 2 * 2 * stats.top_k * CLASSES
    assert {key: count for key, count in found.items() if count} == dict(expected)
    assert (stats.tokens, stats.items, stats.groups) == (18, 4, ["long", "short"])
    assert table.attrs == {"num_experts": CLASSES, "top_k": stats.top_k}


def test_means(stats):
    inputs, gates, norms = truth(stats.top_k)
    for line in stats.expert_means().to_dict("records"):
        place, group = (1, 3).index(line["layer"]), line["group"]
        tokens = [token for row, own in zip(ROWS, GROUPS, strict=True) if own == group for token in row]
        slots = [
            experts_of(token, place, stats.top_k).index(line["expert"])
            for token in tokens
            if line["expert"] in experts_of(token, place, stats.top_k)
        ]
        assert line["tokens"] == len(slots)
        logits = np.array([2, 1, 0, 0]) * STEP * inputs[place]
        p = np.exp(logits) / np.exp(logits).sum()
        expected = {
            "gate": np.mean([gates[place][slot] for slot in slots]),
            "write_norm": np.mean([norms[place][slot] for slot in slots]),
            "margin": STEP * inputs[place],  # from the best to the second, or from the second to the rest
            "entropy": -(p * np.log(p)).sum(),
        }
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_norm_is_not_that_without_the_gate_times_the_gate(stats):
    inputs, _, _ = truth(stats.top_k)
    for line in stats.expert_means().to_dict("records"):
        fed = inputs[(1, 3).index(line["layer"])]
        ungated = 0.1 * fed**2 / (1 + math.exp(-fed))
        assert line["write_norm"] < 0.95 * line["gate"] * ungated


def test_positions(stats):
    expected: Counter = Counter()
    for row in ROWS:
        for position, token in enumerate(row):
            first = {0: 0, 1: 1, 2: 1, 3: 3, 4: 3, 5: 3, 6: 3}.get(position, 7)
            for place, layer in enumerate((1, 3)):
                for expert in experts_of(token, place, stats.top_k):
                    expected[layer, first, 2 * first, expert] += 1
    table = stats.by_position()
    assert {tuple(line[:4]): line[4] for line in table.itertuples(index=False) if line[4]} == dict(expected)
    assert len(table) == 2 * 4 * CLASSES


def test_flow_pairs_and_repeats(stats):
    flow, pairs, same, followers = Counter(), Counter(), Counter(), 0
    for row in ROWS:
        for before, token in zip([None, *row[:-1]], row, strict=True):
            one, two = (experts_of(token, place, stats.top_k) for place in (0, 1))
            flow.update((1, 3, a, b) for a in one for b in two)
            pairs.update((layer, a, b) for layer, own in ((1, one), (3, two)) for a in own for b in own if a != b)
            followers += before is not None
            same["all"] += before is not None and class_of(before) == class_of(token)
    assert {tuple(line[:4]): line[4] for line in stats.flow().itertuples(index=False)} == dict(flow)
    assert {tuple(line[:3]): line[3] for line in stats.pairs().itertuples(index=False)} == dict(pairs)
    assert stats.repeats().to_dict("list") == {"layer": [1, 3], "tokens": [followers] * 2, "same": [same["all"]] * 2}


def test_vocabulary(stats):
    expected: dict[str, Counter] = {kind: Counter() for kind in ("input", "next", "predicted")}
    for row in ROWS:
        for token, after in zip(row, [*row[1:], None], strict=True):
            for place, layer in enumerate((1, 3)):
                for expert in experts_of(token, place, stats.top_k):
                    expected["input"][layer, token, expert] += 1
                    expected["predicted"][layer, 100 + class_of(token), expert] += 1
                    if after is not None:
                        expected["next"][layer, after, expert] += 1
    for kind, counts in expected.items():
        assert {tuple(line[:3]): line[3] for line in stats.vocabulary(kind).itertuples(index=False)} == dict(counts)


def test_writes(stats):
    _, _, norms = truth(stats.top_k)
    expected = np.zeros((2, CLASSES, D))
    for token in (token for row in ROWS for token in row):
        for place in (0, 1):
            for slot, expert in enumerate(experts_of(token, place, stats.top_k)):
                expected[place, expert, CLASSES + CLASSES * place + expert] += norms[place][slot]
    np.testing.assert_allclose(stats.writes.numpy(), expected, rtol=1e-5, atol=RESOLUTION)


def test_specialization_is_the_share_of_a_class_in_a_group(stats):
    table = lab.tables.routing.specialization(stats)
    for line in table.to_dict("records"):
        own = [token for row, group in zip(ROWS, GROUPS, strict=True) if group == line["group"] for token in row]
        every = [token for row in ROWS for token in row]
        place = (1, 3).index(line["layer"])
        rates = [
            sum(line["expert"] in experts_of(token, place, stats.top_k) for token in tokens) / len(tokens)
            for tokens in (own, every)
        ]
        assert line["share"] == pytest.approx(rates[0])
        assert line["lift"] == pytest.approx(rates[0] / rates[1])
        assert line["uniform"] == stats.top_k / CLASSES
        assert line["group_tokens"] == len(own)
