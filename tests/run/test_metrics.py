"""Metrics against their definitions."""

import pytest
import torch

import llama4lab as lab
from llama4lab.run.metrics import as_metric, evaluated

TEXTS = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]


@pytest.fixture(scope="module")
def run(tiny) -> lab.Run:
    return lab.record(tiny, TEXTS)


def last(run: lab.Run) -> torch.Tensor:
    return run.logits[:, -1].double()


def test_a_logit_difference_takes_one_token_or_one_for_each_row(tiny, run):
    paris, madrid, mary, john = (run.prompt.token_id(token) for token in (" Paris", " Madrid", " Mary", " John"))
    both = evaluated(lab.metrics.logit_diff([" Paris", " Mary"], [" Madrid", john]), run)
    logits = last(run)
    assert torch.allclose(
        both.double(), torch.stack([logits[0, paris] - logits[0, madrid], logits[1, mary] - logits[1, john]])
    )
    one = evaluated(lab.metrics.logit_diff(mary, john), run)
    assert torch.allclose(one.double(), logits[:, mary] - logits[:, john])


def test_probabilities_ranks_and_divergences_follow_their_definitions(tiny, run):
    mary = run.prompt.token_id(" Mary")
    log_probs = last(run).log_softmax(-1)
    assert torch.allclose(evaluated(lab.metrics.log_prob(" Mary"), run).double(), log_probs[:, mary], atol=1e-5)
    assert torch.allclose(evaluated(lab.metrics.prob(" Mary"), run).double(), log_probs[:, mary].exp(), atol=1e-6)
    order = last(run).argsort(dim=-1, descending=True)
    expected = (order == mary).int().argmax(1)
    assert evaluated(lab.metrics.rank(" Mary"), run).tolist() == expected.tolist()
    other = lab.record(tiny, [TEXTS[0].replace("France", "Spain"), TEXTS[1].replace("Mary", "Lily")])
    theirs = other.logits[:, -1].double().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(log_probs, theirs, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(evaluated(lab.metrics.kl_to(other), run).double(), divergence, atol=1e-4)


def test_the_loss_is_that_of_the_model_and_leaves_padding_out(tiny, run):
    found = evaluated(lab.metrics.loss(), run)
    for row, text in enumerate(TEXTS):
        inputs = tiny.prompt(text).inputs()
        expected = tiny(**inputs, labels=inputs["input_ids"]).loss
        assert torch.allclose(found[row], expected, atol=1e-4)


def test_a_metric_can_be_differentiated(tiny):
    run = lab.record(tiny, TEXTS, at="layers.7.resid_post", grad=True)
    evaluated(lab.metrics.log_prob(" Mary"), run).sum().backward()
    gradient = run["layers.7.resid_post"].grad
    assert gradient is not None
    assert gradient[:, -1].abs().max() > 0
    assert gradient[:, :-1].abs().max() == 0
    tiny.zero_grad()


def test_a_function_of_the_logits_is_a_metric(run):
    assert evaluated(lambda logits: logits[:, -1].amax(-1), run).shape == (2,)
    assert as_metric(lab.metrics.loss()).name == "loss"


BAD = {
    "a word of several tokens": (lambda: lab.metrics.prob(" Maryland"), ValueError, "Maryland"),
    "tokens for other rows": (lambda: lab.metrics.prob([1, 2, 3]), ValueError, "3 tokens, but the prompt has 2 rows"),
    "a position outside": (lambda: lab.metrics.prob(1, position=40), IndexError, "has 15 positions"),
    "a position of padding": (lambda: lab.metrics.prob(1, position=2), IndexError, "padding in row 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_the_prompt_is_refused(run, case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        evaluated(make(), run)


def test_logits_that_were_not_kept_are_asked_for_by_name(run):
    with pytest.raises(IndexError, match="position 14, which the run does not have"):
        evaluated(lab.metrics.prob(1), run.cut(positions=[9, 10]))
