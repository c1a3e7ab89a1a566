"""Measures of balance against loads whose every figure is known."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import math

import numpy as np
import pytest

from llama4lab.run.corpus.counting import routing_stats
from llama4lab.run.recording import record
from llama4lab.tables.routing.choices import bare_choices, decisions
from llama4lab.tables.routing.loads import balance, expert_load

EVEN = [[[0], [1], [2], [3]]]
SKEWED = [[[0], [0], [0], [1]]]
INDICES = "layers.*.feed_forward.router.indices"


def test_even_loads_are_balanced_by_every_measure(routed_run):
    line = balance(routed_run({1: EVEN})).iloc[0]
    assert line[["tokens", "max_violation", "cv2", "gini", "dead", "coverage_50"]].tolist() == [4, 0, 0, 0, 0, 2]
    assert line["entropy"] == pytest.approx(1)


def test_measures_of_skewed_loads_are_those_of_their_formulas(routed_run):
    line = balance(routed_run({1: SKEWED})).iloc[0]
    loads = np.array([3, 1, 0, 0])
    assert line["max_violation"] == 3 / 1 - 1
    assert line["cv2"] == np.mean((loads - 1) ** 2) / 1
    assert line["entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert line["gini"] == pytest.approx(np.abs(loads[:, None] - loads).sum() / (2 * 4**2 * loads.mean()))
    assert (line["dead"], line["coverage_50"]) == (2, 1)


def test_one_expert_with_everything_is_the_other_end(routed_run):
    line = balance(routed_run({1: [[[2]] * 5]})).iloc[0]
    assert (line["max_violation"], line["cv2"], line["entropy"], line["gini"]) == (3, 3, 0, 0.75)


def test_balancedness_sums_over_layers_before_it_divides(routed_run):
    run = routed_run({1: SKEWED, 3: EVEN})
    table = balance(run, placement=2)
    # Ranks hold experts 0, 1 and 2, 3: loads 4, 0 in layer 1 and 2, 2 in layer 3.
    assert table["balancedness"].tolist() == [0.5, 1]
    assert table.attrs["balancedness"] == (2 + 2) / (4 + 2)
    assert table["utilization"].tolist() == pytest.approx([(2 + 1e-5) / (4 + 1e-5), 1])


def test_placement_is_a_list_or_a_mapping_of_experts_to_ranks(routed_run):
    run = routed_run({1: SKEWED})
    apart = balance(run, placement=[0, 1, 0, 1])
    assert apart["balancedness"].tolist() == [2 / 3]
    assert balance(run, placement={3: 1, 0: 0, 1: 1, 2: 0})["balancedness"].tolist() == [2 / 3]
    assert balance(run, placement=[7, 9, 7, 9]).attrs["balancedness"] == 2 / 3


@pytest.mark.parametrize("placement", [3, 0, [0, 1], {0: 0, 1: 1, 2: 0, 4: 1}])
def test_a_placement_of_other_experts_is_refused(routed_run, placement):
    with pytest.raises(ValueError, match=r"placement"):
        balance(routed_run({1: SKEWED}), placement=placement)


def test_groups_have_measures_and_balancedness_of_their_own(routed_run):
    run = routed_run({1: [[[0], [0]], [[0], [2]]]})
    table = balance(run, by="row", placement=2)
    assert table[["row", "tokens", "dead"]].values.tolist() == [[0, 2, 3], [1, 2, 2]]
    assert table.attrs["balancedness"] == {0: 0.5, 1: 1}


def test_image_tokens_are_a_group_and_padding_is_none(routed_run):
    run = routed_run({1: [[[0], [1], [2]], [[3], [1], [1]]]}, rows=["a b <i>", "c <i>"])
    table = balance(run, by="modality").set_index("modality")
    assert table["tokens"].to_dict() == {"image": 2, "text": 3}
    assert balance(run)["dead"].tolist() == [1]


def test_a_group_that_a_layer_lacks_has_no_measures(routed_run):
    choices = bare_choices(routed_run({1: EVEN, 3: EVEN}))
    choices["kind"] = choices["layer"].map({1: "early", 3: "late"})
    table = balance(choices, by="kind", placement=2)
    empty = table[table["tokens"] == 0]
    assert len(empty) == 2
    assert empty[["max_violation", "cv2", "entropy", "gini", "coverage_50", "balancedness"]].isna().all().all()
    assert (empty["dead"] == 4).all()


def test_several_slots_count_each(routed_run):
    line = balance(routed_run({1: [[[0, 1], [0, 2]]]})).iloc[0]
    assert (line["tokens"], line["dead"], line["max_violation"]) == (4, 1, 1)


def test_statistics_of_a_corpus_give_what_a_run_gives(new_text_model, random_ids):
    model = new_text_model(num_experts_per_tok=2)
    ids = random_ids(1, 9)
    run = record(model, ids.tolist(), at=INDICES)
    stats = routing_stats(model, [model.prompt(ids.tolist())], progress=False)
    assert expert_load(stats).equals(expert_load(run))
    assert balance(stats, placement=2).equals(balance(run, placement=2))
    assert expert_load(stats, by="group")["group"].unique().tolist() == ["all"]


def test_decisions_and_run_have_one_balance(planted_run):
    _, run = planted_run()
    assert balance(decisions(run)).equals(balance(run))
