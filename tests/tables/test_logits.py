"""Next-token tables against planted logits."""

# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import math

import pytest
import torch

from llama4lab.run.generation import generate
from llama4lab.tables.logits import compare, top_tokens


@pytest.fixture
def planted(make_prompt, make_run):
    """Rows "a b c" and "x y" behind padding; six tokens in the vocabulary, of known probability."""
    probs = torch.tensor([0.4, 0.05, 0.3, 0.1, 0.15, 1e-9])
    logits = torch.zeros(2, 3, 6)
    logits[0, 2], logits[1, 2] = probs.log() + 7, probs.flip(0).log()
    return make_run(make_prompt("a b c", "x y"), {}, logits)


@pytest.fixture
def changed(planted, make_run):
    """The same run with tokens 0 and 1 of row 0 swapped."""
    logits = planted.logits.clone()
    logits[0, 2, [0, 1]] = planted.logits[0, 2, [1, 0]]
    return make_run(planted.prompt, {}, logits)


def test_the_most_probable_tokens_come_in_order_with_their_probabilities(planted):
    table = top_tokens(planted, k=3)
    assert table["row"].tolist() == [0, 0, 0, 1, 1, 1]
    assert table["position"].tolist() == [2] * 6
    assert table["rank"].tolist() == [0, 1, 2, 0, 1, 2]
    assert table["token_id"].tolist() == [0, 2, 4, 5, 3, 1]
    assert table["prob"].tolist() == pytest.approx([0.4, 0.3, 0.15] * 2)
    assert table["log_prob"].tolist() == pytest.approx([math.log(p) for p in (0.4, 0.3, 0.15)] * 2)
    assert table["logit"][0] == pytest.approx(math.log(0.4) + 7)
    assert table["token"].tolist()[:3] == ["<0>", "<2>", "<4>"]


def test_a_row_with_padding_at_the_position_is_left_out(planted):
    assert top_tokens(planted, k=1, position=0)["row"].tolist() == [0]


def test_all_tokens_are_given_if_there_are_fewer_than_asked(planted):
    table = top_tokens(planted, k=99)
    assert len(table) == 12
    assert table.groupby("row")["prob"].sum().tolist() == pytest.approx([1, 1])


def test_positions_of_a_cut_run_are_those_of_the_prompt(planted):
    table = top_tokens(planted.cut(rows=1, positions=[2]), k=1)
    assert table[["row", "position", "token_id"]].values.tolist() == [[1, 2, 5]]


def test_wrong_positions_and_counts_are_refused(planted):
    with pytest.raises(IndexError, match="positions 0 to 2"):
        top_tokens(planted, position=3)
    with pytest.raises(IndexError, match="positions 0 to 2"):
        top_tokens(planted, position=-4)
    with pytest.raises(IndexError, match="padding"):
        top_tokens(planted.cut(rows=1), position=0)
    with pytest.raises(ValueError, match="k=0"):
        top_tokens(planted, k=0)
    with pytest.raises(ValueError, match="k=0"):
        compare(planted, planted, k=0)


def test_compare_shows_the_leading_tokens_of_either_run_and_what_changed(planted, changed):
    table = compare(planted, changed, k=2).query("row == 0")
    assert table["token_id"].tolist() == [0, 1, 2]
    assert table["prob_before"].tolist() == pytest.approx([0.4, 0.05, 0.3])
    assert table["prob_after"].tolist() == pytest.approx([0.05, 0.4, 0.3])
    assert table["difference"].tolist() == pytest.approx([-0.35, 0.35, 0])


def test_compare_shows_the_tokens_asked_for_in_that_order(planted, changed):
    table = compare(planted, changed, [5, 1])
    assert table["token_id"].tolist() == [5, 1] * 2
    assert table["row"].tolist() == [0, 0, 1, 1]


def test_a_run_compared_with_itself_differs_nowhere(planted):
    assert compare(planted, planted)["difference"].tolist() == [0] * 10


def test_runs_that_do_not_match_are_not_compared(planted, make_prompt, make_run):
    longer = make_run(make_prompt("a b c d", "x y"), {})
    with pytest.raises(ValueError, match="position 3"):
        compare(planted, longer)
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        compare(planted, planted.cut(rows=0))
    with pytest.raises(ValueError, match="7 tokens"):
        compare(planted, make_run(planted.prompt, {}, torch.zeros(2, 3, 7)))


def test_tokens_that_cannot_be_read_are_refused(planted):
    with pytest.raises(ValueError, match="no tokenizer"):
        compare(planted, planted, [" Paris"])
    with pytest.raises(IndexError, match="0 to 5"):
        compare(planted, planted, [6])


def test_tokens_are_written_by_the_tokenizer_of_the_prompt(tiny_run):
    tokenizer = tiny_run.prompt.tokenizer
    table = top_tokens(tiny_run, k=2)
    assert table["token"].tolist() == [tokenizer.decode([token]) for token in table["token_id"]]
    shown = compare(tiny_run, tiny_run, [" Paris"])
    assert shown["token"].tolist() == [" Paris"]


def test_logits_of_a_generated_run_stand_at_the_positions_that_chose_a_token(new_text_model):
    model = new_text_model()
    run = generate(model, [[5, 6, 7, 8]], max_new_tokens=3)
    chosen = run.prompt.input_ids[0, 4:].tolist()
    found = [top_tokens(run, k=1, position=position)["token_id"].item() for position in (3, 4, 5)]
    assert found == chosen
    assert top_tokens(run, k=1)["position"].item() == 5
    with pytest.raises(IndexError, match="positions 3 to 5"):
        top_tokens(run, position=2)
