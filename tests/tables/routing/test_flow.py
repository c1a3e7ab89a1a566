"""Flow of tokens between experts, against planted routes and counts made by hand."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from llama4lab.run.corpus.counting import routing_stats
from llama4lab.run.recording import record
from llama4lab.tables.routing.choices import bare_choices
from llama4lab.tables.routing.flow import coactivation, information, paths, repetition, transitions

ROUTERS = "layers.*.feed_forward.router.*"


@pytest.fixture
def chained(routed_run):
    """Expert e of layer 1 sends its tokens to e + 1 of layer 3, which sends half to 0 and half to 1 of layer 5."""
    first = [[[0], [0], [1], [1], [2], [2]]]
    second = [[[1], [1], [2], [2], [3], [3]]]
    third = [[[0], [1], [0], [1], [0], [1]]]
    return routed_run({1: first, 3: second, 5: third})


def test_transitions_are_the_planted_ones(chained):
    table = transitions(chained)
    columns = ["from_layer", "to_layer", "from_expert", "to_expert", "tokens", "share", "uniform"]
    early = [[1, 3, e, e + 1, 2, 1, 0.25] for e in (0, 1, 2)]
    late = [[3, 5, e, to, 1, 0.5, 0.25] for e in (1, 2, 3) for to in (0, 1)]
    assert table[columns].values.tolist() == early + late


def test_information_is_all_of_the_entropy_or_none(chained):
    table = information(chained)
    assert table["mutual_information"].tolist() == pytest.approx([math.log(3), 0])
    assert table["entropy"].tolist() == pytest.approx([math.log(3), math.log(2)])
    assert table["normalised"].tolist() == pytest.approx([1, 0])
    assert table["tokens"].tolist() == [6, 6]
    assert (table["chance"] > 0).all()


def test_layers_are_a_chain(chained):
    table = transitions(chained, (1, 5))
    assert set(zip(table["from_layer"], table["to_layer"], strict=True)) == {(1, 5)}
    with pytest.raises(ValueError, match="layer 2"):
        transitions(chained, (1, 2))
    with pytest.raises(ValueError, match="fewer than two"):
        transitions(chained, [1])


def test_all_pairs_of_slots_count_not_only_those_of_one_rank(routed_run):
    # The first slot decides the second slot of the next layer, and nothing of its first.
    first = [[[0, 3], [0, 3], [1, 3], [1, 3]]]
    second = [[[2, 0], [3, 0], [2, 1], [3, 1]]]
    table = transitions(routed_run({1: first, 3: second}))
    counts = table.set_index(["from_expert", "to_expert"])["tokens"].to_dict()
    assert (counts[0, 0], counts[1, 1]) == (2, 2)
    assert (0, 1) not in counts
    assert sum(counts.values()) == 4 * 2 * 2
    assert table.groupby("from_expert")["share"].sum().tolist() == [2, 2, 2]
    assert set(table["uniform"]) == {2 / 4}
    assert information(routed_run({1: first, 3: second}))["mutual_information"][0] > 0.1


def test_information_agrees_with_counts_of_a_random_run(new_text_model, random_ids):
    run = record(new_text_model(num_experts_per_tok=2), random_ids(2, 20).tolist(), at=ROUTERS)
    table = information(run)
    one, two = (
        run.layers("feed_forward.router.indices")[layer].flatten(0, 1).tolist() for layer in run.meta["moe_layers"][:2]
    )
    joint = Counter(pair for a, b in zip(one, two, strict=True) for pair in itertools.product(a, b))
    total = sum(joint.values())
    left, right = Counter(), Counter()
    for (a, b), count in joint.items():
        left[a] += count
        right[b] += count
    expected = sum(n / total * math.log(n * total / left[a] / right[b]) for (a, b), n in joint.items())
    assert table["mutual_information"][0] == pytest.approx(expected)


def test_chance_is_what_shuffled_tokens_show(routed_run):
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 4, (2, 1, 200, 1))
    table = information(routed_run({1: first.tolist(), 3: second.tolist()}, rows=[" ".join("a" * 200)]))
    # Of independent choices, the mean is (experts - 1) ** 2 / 2 / tokens to first order.
    assert table["chance"][0] == pytest.approx(9 / 400, rel=0.3)


def test_coactivation_counts_slots_that_are_no_neighbours(routed_run):
    table = coactivation(routed_run({1: [[[0, 1, 2], [0, 3, 2], [1, 0, 3]]]}))
    pairs = table.set_index(["expert", "other"])
    assert pairs["tokens"].to_dict()[0, 2] == 2  # slots 0 and 2, twice
    assert pairs["share"].to_dict()[0, 2] == pytest.approx(2 / 3)
    assert pairs["share"].to_dict()[2, 0] == 1
    assert table["tokens"].sum() == 3 * 3 * 2
    assert table.groupby("expert")["share"].sum().tolist() == [2, 2, 2, 2]
    assert set(table["uniform"]) == {2 / 3}


def test_coactivation_of_one_expert_a_token_is_refused(chained):
    with pytest.raises(ValueError, match="transitions"):
        coactivation(chained)


def test_paths_are_strings_of_experts_with_the_most_frequent_first(routed_run):
    run = routed_run({1: [[[0], [0], [1]]], 3: [[[2], [2], [2]]]}, rows=["a b <i>"])
    table = paths(run, "modality")
    assert table[["path", "tokens", "label", "purity"]].values.tolist() == [
        ["0-2", 2, "text", 1],
        ["1-2", 1, "image", 1],
    ]
    assert table["share"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert table.attrs["layers"] == [1, 3]
    assert table.attrs["purity"] == 1
    assert table.attrs["majority"] == pytest.approx(2 / 3)
    assert 2 / 3 <= table.attrs["purity_chance"] < 1


def test_paths_of_several_experts_do_not_depend_on_their_slots(routed_run):
    table = paths(routed_run({1: [[[0, 2], [2, 0]]]}))
    assert table[["path", "tokens"]].values.tolist() == [["0+2", 2]]


def test_rows_can_be_labelled(routed_run):
    run = routed_run({1: [[[0], [1]], [[0], [0]]]})
    table = paths(run, {0: "facts", 1: "code"}).set_index("path")
    assert table.loc["0", ["tokens", "label"]].tolist() == [3, "code"]
    assert table.loc["0", "purity"] == pytest.approx(2 / 3)
    with pytest.raises(KeyError, match="Row 1"):
        paths(run, {0: "facts"})
    with pytest.raises(KeyError, match="modality"):
        paths(run, "domain")


def test_paths_with_holes_are_refused(routed_run):
    table = bare_choices(routed_run({1: [[[0], [1]]], 3: [[[0], [1]]]}))
    with pytest.raises(ValueError, match="position 1"):
        paths(table.drop(index=1))


def test_repetition_counts_neighbours_of_the_same_row(routed_run):
    run = routed_run({1: [[[0], [0], [1]], [[3], [1], [1]]]}, rows=["a b c", "d e"])
    line = repetition(run).iloc[0]
    assert (line["tokens"], line["same"]) == (3, 2)
    assert line["share"] == pytest.approx(2 / 3)
    assert line["chance"] == pytest.approx(0.4**2 + 0.6**2)


def test_tokens_that_were_filtered_out_are_no_neighbours(routed_run):
    table = bare_choices(routed_run({1: [[[0], [1], [0]]]}))
    line = repetition(table[table["position"] != 1]).iloc[0]
    assert line["tokens"] == 0
    assert np.isnan(line["share"])


def test_planted_routes_stay_in_their_class(planted_run):
    _, run = planted_run()
    assert (transitions(run)["from_expert"] == transitions(run)["to_expert"]).all()
    assert paths(run)[["path", "tokens"]].values.tolist() == [["0-0", 2], ["1-1", 2], ["2-2", 2], ["3-3", 1]]
    assert repetition(run)["same"].tolist() == [1, 1]


@pytest.mark.parametrize("slots", [1, 2])
def test_statistics_of_a_corpus_give_what_a_run_gives(new_text_model, random_ids, slots):
    model = new_text_model(num_experts_per_tok=slots)
    ids = random_ids(1, 12).tolist()
    run, stats = record(model, ids, at=ROUTERS), routing_stats(model, [model.prompt(ids)], progress=False)
    for table in (transitions, information, repetition, *([coactivation] if slots > 1 else [])):
        one, other = table(run), table(stats)
        assert one.columns.tolist() == other.columns.tolist()
        np.testing.assert_allclose(one.to_numpy(float), other.to_numpy(float))
    with pytest.raises(ValueError, match="neighbouring"):
        transitions(stats, (stats.layers[0], stats.layers[0]))
    with pytest.raises(TypeError, match="corpus"):
        paths(stats.choices())
