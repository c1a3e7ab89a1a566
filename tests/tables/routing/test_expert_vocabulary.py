import math

import numpy as np
import pandas as pd
import pytest

import llama4lab as lab
from llama4lab.run.corpus.arrays import AXES
from llama4lab.tables.routing.expert_vocabulary import vocabulary, vocabulary_specialization

COUNTS = np.array([[30, 0, 0], [4, 4, 4], [0, 19, 1], [1, 0, 0], [0, 0, 0]])  # token x expert


def planted(counts: np.ndarray, top_k: int = 1) -> lab.RoutingStats:
    """Statistics of one router with these vocabulary counts, of all kinds alike."""
    vocab, experts = counts.shape
    sizes = {axis: 1 for axes in AXES.values() for axis in axes}
    sizes |= {"kind": 3, "token_id": vocab, "expert": experts, "slot": top_k, "modality": 3, "same": 2, "bin": 32}
    arrays = {name: np.zeros([sizes[axis] for axis in axes], np.int64) for name, axes in AXES.items()}
    arrays["vocabulary"][:] = counts
    texts = {token: f"word {token}" for token in range(vocab)}
    return lab.RoutingStats(["all"], [1], experts, 1, arrays, {"vocabulary": [1]}, texts)


def first(table: pd.DataFrame) -> dict:
    return table.to_dict("records")[0]


@pytest.mark.parametrize("smoothing", [0, 1.0, 5])
def test_npmi_is_the_formula(smoothing):
    table = vocabulary(planted(COUNTS), smoothing=smoothing)
    total = COUNTS.sum()
    loads = COUNTS.sum(0) / total
    smooth = np.array([row + smoothing * loads for row in COUNTS if row.sum()])
    p = smooth / smooth.sum()
    found = {(line["token_id"], line["expert"]): line for line in table.to_dict("records")}
    assert set(found) == {(0, 0), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)}  # token 3 is too rare, token 4 is never seen
    for (token, expert), line in found.items():
        pmi = math.log2(p[token, expert] / (p[token].sum() * p[:, expert].sum()))
        assert line["npmi"] == pytest.approx(pmi / -math.log2(p[token, expert]))
        assert line["share"] == pytest.approx(COUNTS[token, expert] / COUNTS[token].sum())
        assert (line["tokens"], line["token"]) == (COUNTS[token, expert], f"word {token}")


def test_npmi_has_its_known_values():
    together = vocabulary(planted(np.diag([20, 30, 50])), smoothing=0)
    assert together["npmi"].tolist() == pytest.approx([1, 1, 1])
    independent = vocabulary(planted(np.outer([20, 30, 50], [1, 2, 3])), smoothing=0)
    assert independent["npmi"].tolist() == pytest.approx([0] * 9, abs=1e-12)
    smoothed = vocabulary(planted(np.outer([20, 30, 50], [1, 2, 3])), smoothing=7)
    assert smoothed["npmi"].tolist() == pytest.approx([0] * 9, abs=1e-12)
    assert vocabulary(planted(np.array([[25, 0]])), smoothing=0)["npmi"].tolist() == [0]


def test_smoothing_draws_rare_tokens_to_zero_and_not_frequent_ones():
    counts = np.array([[1000, 0], [0, 900], [2, 0], [1, 0]])
    plain, smoothed = (vocabulary(planted(counts), smoothing=s, least=1) for s in (0, 1))
    before, after = (dict(zip(table["token_id"], table["npmi"], strict=True)) for table in (plain, smoothed))
    change = {token: after[token] / before[token] for token in range(4)}
    assert change[3] < change[2] < 0.9
    assert change[0] > 0.97
    assert change[1] > 0.97


def test_lines_are_sorted_by_layer_expert_and_association():
    table = vocabulary(planted(COUNTS), least=1)
    keys = [(line["layer"], line["expert"], -line["npmi"]) for line in table.to_dict("records")]
    assert keys == sorted(keys)
    assert list(table.columns) == ["layer", "expert", "token_id", "token", "tokens", "share", "npmi"]


def test_the_score_is_the_mean_share_of_the_favourite_over_the_listed_tokens():
    table = vocabulary_specialization(planted(COUNTS))
    assert table["kind"].tolist() == ["input", "next", "predicted"]
    assert table["ids"].tolist() == [3] * 3
    assert table["score"].tolist() == pytest.approx([(1 + 4 / 12 + 19 / 20) / 3] * 3)
    # The code that the formula is from takes rare tokens into the mean.
    everything = first(vocabulary_specialization(planted(COUNTS), least=1))
    assert everything["score"] == pytest.approx((2 + 4 / 12 + 19 / 20) / 4)


def test_with_two_experts_a_token_nothing_is_rounded():
    counts = np.array([[11, 7, 4], [15, 10, 5]])  # 11 and 15 occurrences
    table = vocabulary_specialization(planted(counts, top_k=2))
    assert first(table)["score"] == pytest.approx((11 / 11 + 15 / 15) / 2)
    shares = vocabulary(planted(counts, top_k=2))
    for line in shares.to_dict("records"):
        assert line["share"] == pytest.approx(counts[line["token_id"], line["expert"]] / (11, 15)[line["token_id"]])


def test_chance_is_the_score_of_choices_that_do_not_depend_on_the_token():
    rng = np.random.default_rng(3)
    random = rng.multinomial(rng.integers(10, 40, 3000), [0.5, 0.3, 0.2])
    loose = first(vocabulary_specialization(planted(random)))
    assert loose["score"] == pytest.approx(loose["chance"], rel=0.01)
    assert loose["chance"] > 0.5
    firm = first(vocabulary_specialization(planted(np.diag([50, 30, 20]))))
    assert firm["score"] == 1
    assert firm["chance"] < 0.75


def test_without_tokens_that_are_frequent_enough_there_is_no_score():
    table = vocabulary_specialization(planted(COUNTS), least=1000)
    assert np.isnan(np.asarray(table["score"])).all()
    assert table["ids"].tolist() == [0, 0, 0]
    assert not len(vocabulary(planted(COUNTS), least=1000))


def test_on_the_checkpoint_the_token_itself_decides_most():
    tiny = lab.load()
    texts = [f"The {a} {b} has {n} apples." for a in ("red", "green") for b in ("cat", "dog") for n in range(12)]
    stats = lab.routing_stats(tiny, texts, vocabulary=[1, 5], progress=False)
    lines = vocabulary_specialization(stats).to_dict("records")
    scores = {(line["layer"], line["kind"]): line["score"] for line in lines}
    assert scores[1, "input"] > scores[1, "next"]
    table = vocabulary(stats, "input")
    assert set(table["layer"]) == {1, 5}
    assert set(table["token"]) <= set(stats.token_texts.values())
    assert " cat" in set(table["token"])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="smoothing=-1 is negative"):
        vocabulary(planted(COUNTS), smoothing=-1)
    with pytest.raises(ValueError, match="choose from input"):
        vocabulary(planted(COUNTS), "output")
