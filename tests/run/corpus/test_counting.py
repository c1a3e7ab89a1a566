import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import llama4lab as lab
from llama4lab.model.facts import facts
from llama4lab.run.corpus import batches, counting
from llama4lab.run.corpus.arrays import KINDS, MODALITIES, RESOLUTION
from llama4lab.tiny.domains.catalogue import examples

SUMS = ("gate", "margin", "entropy", "write_norm")


@pytest.fixture(scope="module")
def mixed() -> list:
    """Items with and without images, of several domains and lengths."""
    return [example for name in ("facts", "shapes", "code", "induction") for example in examples(name, 3)]


@pytest.fixture(scope="module")
def random_items(random_ids) -> list[dict]:
    """Rows of 2 to 30 random tokens, in three groups."""
    return [{"text": random_ids(2 + 7 * n % 29, seed=n).tolist(), "kind": "abc"[n % 3]} for n in range(30)]


def reference(model, items, by) -> dict[str, np.ndarray]:
    """The same arrays, item by item and token by token from recorded runs, in 64-bit floats."""
    names = ["layers.*.feed_forward.router.*", "layers.*.feed_forward.experts.out"]
    arrays: dict = {}
    moe = facts(model.config)["moe_layers"]
    vocab, experts = model.text.config.vocab_size, model.text.config.num_local_experts
    groups = sorted({by(item) for item in items})
    for item in items:
        prompt = model.prompt(item["text"]) if isinstance(item, dict) else model.prompt(item.text, images=item.image)
        run = lab.record(model, prompt, names)
        length, slots = prompt.input_ids.shape[1], run.layers("feed_forward.router.indices")[moe[0]].shape[-1]
        if not arrays:
            shape = (len(groups), len(moe), experts)
            arrays = {name: np.zeros(shape) for name in SUMS}
            arrays["choices"] = np.zeros((len(groups), 3, len(moe), slots, experts))
            arrays["positions"] = np.zeros((32, len(moe), experts))
            arrays["flow"] = np.zeros((len(moe) - 1, experts, experts))
            arrays["pairs"] = np.zeros((len(moe), experts, experts))
            arrays["repeats"] = np.zeros((len(moe), 2))
            arrays["writes"] = np.zeros((len(moe), experts, model.text.config.hidden_size))
            arrays["vocabulary"] = np.zeros((3, len(moe), vocab, experts))
        group = groups.index(by(item))
        ids, best = prompt.input_ids[0].tolist(), run.logits[0].argmax(-1).tolist()
        before = None
        for place, layer in enumerate(moe):
            logits = run[f"layers.{layer}.feed_forward.router.logits"][0].double().numpy()
            chosen = run[f"layers.{layer}.feed_forward.router.indices"][0].numpy()
            gates = run[f"layers.{layer}.feed_forward.router.gates"][0].double().numpy()
            out = run[f"layers.{layer}.feed_forward.experts.out"][0].double().numpy()
            for position in range(length):
                modality = MODALITIES.index(prompt.modality[0][position])
                z, own = logits[position], chosen[position]
                others = np.delete(z, own)
                p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                for slot, expert in enumerate(own):
                    arrays["choices"][group, modality, place, slot, expert] += 1
                    arrays["positions"][int(np.floor(np.log2(position + 1))), place, expert] += 1
                    arrays["gate"][group, place, expert] += gates[position, slot]
                    arrays["margin"][group, place, expert] += z[own].min() - others.max()
                    arrays["entropy"][group, place, expert] -= (p * np.log(p)).sum()
                    arrays["write_norm"][group, place, expert] += np.linalg.norm(out[position, slot])
                    arrays["writes"][place, expert] += out[position, slot]
                    for other in own:
                        arrays["pairs"][place, expert, other] += expert != other
                    for after in () if before is None else before[position]:
                        arrays["flow"][place - 1, after, expert] += 1
                    if prompt.modality[0][position] != "image":
                        arrays["vocabulary"][0, place, ids[position], expert] += 1
                        arrays["vocabulary"][2, place, best[position], expert] += 1
                        if position + 1 < length:
                            arrays["vocabulary"][1, place, ids[position + 1], expert] += 1
                if position:
                    arrays["repeats"][place, int(chosen[position, 0] == chosen[position - 1, 0])] += 1
            before = chosen
    return arrays


def agree(stats: lab.RoutingStats, expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        if name in (*SUMS, "writes"):
            scale = np.abs(array).max()
            np.testing.assert_allclose(
                stats.arrays[name] * RESOLUTION, array, rtol=2e-4, atol=1e-5 * scale, err_msg=name
            )
        else:
            np.testing.assert_array_equal(stats.arrays[name], array, err_msg=name)


def same(one: lab.RoutingStats, other: lab.RoutingStats, *, sums: bool = True) -> None:
    """All whole numbers are equal; with `sums`, those that stand for real numbers are, too."""
    assert (one.groups, one.layers, one.items) == (other.groups, other.layers, other.items)
    assert one.token_texts == other.token_texts
    for name, array in one.arrays.items():
        if sums or name not in (*SUMS, "writes"):
            np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)


def test_counts_are_those_of_single_runs_with_images(tiny, mixed):
    stats = lab.routing_stats(tiny, mixed, by="domain", vocabulary=True, tokens=200, progress=False)
    agree(stats, reference(tiny, mixed, lambda item: item.domain))
    assert stats.items == len(mixed)
    assert set(stats.token_counts()["modality"]) == set(MODALITIES)


def test_counts_are_those_of_single_runs_with_two_experts_a_token(small, random_items):
    stats = lab.routing_stats(small, random_items, by="kind", vocabulary=True, tokens=100, progress=False)
    agree(stats, reference(small, random_items, lambda item: item["kind"]))
    assert (stats.top_k, stats.layers) == (2, [1, 3])


def test_counts_are_the_same_however_the_batches_are_cut(tiny, mixed):
    one = lab.routing_stats(tiny, mixed, by="domain", vocabulary=True, progress=False)
    other = lab.routing_stats(tiny, reversed(mixed), by="domain", vocabulary=True, tokens=1, progress=False)
    same(one, other, sums=False)


def test_three_shards_add_up_to_one_pass(tiny, mixed):
    whole = lab.routing_stats(tiny, mixed, by="domain", vocabulary=True, progress=False)
    shards = [
        lab.routing_stats(tiny, mixed[first::3], by="domain", vocabulary=True, progress=False) for first in range(3)
    ]
    total = sum(shards)
    assert isinstance(total, lab.RoutingStats)
    same(total, whole, sums=False)


def test_three_shards_of_the_same_batches_are_one_pass_to_the_last_bit(small, random_items, monkeypatch):
    monkeypatch.setattr(batches, "MOST_ROWS", 10)  # so that the shards begin where a window does
    count = {"by": "kind", "tokens": 64, "progress": False, "vocabulary": True}
    whole = lab.routing_stats(small, random_items, **count)
    a, b, c = (lab.routing_stats(small, random_items[s], **count) for s in (slice(10), slice(10, 20), slice(20, 30)))
    for total in ((a + b) + c, a + (b + c), c + a + b):
        same(total, whole)


def test_any_generator_will_do_and_labels_may_come_as_a_mapping(tiny, mixed):
    listed = lab.routing_stats(tiny, mixed, by=lambda item: item.domain, progress=False)
    given = {name: iter([e for e in mixed if e.domain == name]) for name in dict.fromkeys(e.domain for e in mixed)}
    same(lab.routing_stats(tiny, given, progress=False), listed)


def test_padding_makes_no_difference(small, random_ids):
    rows = [random_ids(9, seed=1), random_ids(4, seed=2)]
    ids = torch.stack([rows[0], torch.cat([torch.zeros(5, dtype=torch.long), rows[1]])])
    prompt = small.prompt(ids)
    prompt.attention_mask[1, :5] = 0
    padded = lab.routing_stats(small, [prompt], progress=False)
    apart = lab.routing_stats(small, [row.tolist() for row in rows], tokens=1, progress=False)
    assert (padded.tokens, padded.items, apart.items) == (13, 1, 2)
    for name in ("choices", "positions", "flow", "pairs", "repeats"):
        np.testing.assert_array_equal(padded.arrays[name], apart.arrays[name])


def test_interventions_are_counted_as_they_act(small, random_items):
    name = "layers.1.feed_forward.router.indices"
    with lab.patched(small, {name: lambda indices: torch.zeros_like(indices) + torch.tensor([2, 0])}):
        choices = lab.routing_stats(small, random_items, progress=False).choices()
    forced = choices[(choices["layer"] == 1) & (choices["tokens"] > 0)]
    assert set(zip(forced["slot"], forced["expert"], strict=True)) == {(0, 2), (1, 0)}


def test_without_other_experts_there_is_no_margin(new_text_model, random_ids):
    model = new_text_model(num_experts_per_tok=4)
    stats = lab.routing_stats(model, [random_ids(6).tolist()], progress=False)
    means = stats.expert_means()
    assert np.isnan(np.asarray(means["margin"])).all()
    assert np.isfinite(np.asarray(means["gate"])).all()
    assert set(means["tokens"]) == {6}


def test_a_number_that_is_none_is_an_error_and_not_a_count(small, random_ids):
    name = "layers.3.feed_forward.experts.out"
    with (
        lab.patched(small, {name: lambda out: out * torch.nan}),
        pytest.raises(ValueError, match="not a finite number"),
    ):
        lab.routing_stats(small, [random_ids(6).tolist()], progress=False)


def test_the_head_runs_for_the_last_position_only_unless_predictions_are_counted(small, random_items):
    seen = []
    handle = small.logits.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    try:
        lab.routing_stats(small, random_items, progress=False)
    finally:
        handle.remove()
    assert set(seen) == {1}


def test_the_vocabulary_of_some_layers_is_that_part_of_all(small, random_items):
    every = lab.routing_stats(small, random_items, vocabulary=True, progress=False)
    some = lab.routing_stats(small, random_items, vocabulary=[3], progress=False)
    for kind in KINDS:
        whole = every.vocabulary(kind)
        own = whole.loc[np.asarray(whole["layer"] == 3)].reset_index(drop=True)
        pd.testing.assert_frame_equal(some.vocabulary(kind), own)


def test_a_vocabulary_that_does_not_fit_is_refused_with_both_figures(small, random_items, monkeypatch):
    need = 3 * 2 * 128 * 4 * 4
    monkeypatch.setattr(counting, "free_nbytes", lambda device: need - 1)
    with pytest.raises(MemoryError, match=r"takes 0\.0 GiB on cpu, where 0\.0 GiB are free"):
        lab.routing_stats(small, random_items, vocabulary=True, progress=False)
    lab.routing_stats(small, random_items[:2], vocabulary=[1], progress=False)


def test_long_items_are_cut_and_images_are_left_out_whole(tiny, asked):
    whole = lab.routing_stats(tiny, [asked], progress=False)
    first = int(asked.images[0].positions.min())
    cut = lab.routing_stats(tiny, [asked], max_length=first + 3, progress=False)
    assert (whole.tokens, cut.tokens) == (asked.input_ids.shape[1], first)
    assert "image" not in set(cut.token_counts()["modality"])
    texts = lab.routing_stats(tiny, ["one two three"], max_length=2, progress=False)
    assert texts.tokens == 2


@pytest.mark.parametrize(
    ("prompts", "counting", "error", "says"),
    [
        ([], {}, ValueError, "there are none"),
        (["a"], {"tokens": 0}, ValueError, "at least 1"),
        (["a"], {"vocabulary": [0]}, ValueError, "layer 0, which has no router"),
        (["a"], {"batch": 3}, TypeError, "'batch' is no option; options are tokens"),
        ({"text": "a"}, {}, TypeError, "Put it into a list"),
        ({"facts": ["a"]}, {"by": "domain"}, ValueError, "whose keys are the labels"),
        ([{"text": "a"}], {"by": "domain"}, KeyError, "its keys are text"),
        ([3.5], {}, TypeError, "is a float"),
        (5, {}, TypeError, "a int was given"),
    ],
)
def test_what_cannot_be_counted_is_refused(tiny, prompts, counting, error, says):
    with pytest.raises(error, match=says):
        lab.routing_stats(tiny, prompts, progress=False, **counting)


def test_a_model_without_routers_is_refused(new_text_model):
    with pytest.raises(ValueError, match="no router"):
        lab.routing_stats(new_text_model(moe_layers=[]), [[1, 2]], progress=False)


def test_no_hook_is_left_and_other_passes_are_not_counted(tiny, no_hooks_left):
    def prompts():
        for text in ("The cat", "A dog and a cat"):
            lab.record(tiny, "something else")
            yield text

    stats = lab.routing_stats(tiny, prompts(), progress=False)
    same(stats, lab.routing_stats(tiny, ["The cat", "A dog and a cat"], progress=False))


def test_memory_does_not_grow_with_the_number_of_tokens(small):
    def prompts(count: int):
        for n in range(count):
            yield [1 + (n * 7 + i) % 126 for i in range(50)]

    lab.routing_stats(small, prompts(30), tokens=250, progress=False)
    before = psutil.Process().memory_info().rss
    stats = lab.routing_stats(small, prompts(150), tokens=250, progress=False)
    assert stats.tokens == 7_500
    assert psutil.Process().memory_info().rss - before < 10 * 2**20
