"""Cards of planted experts, of which every line is known."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import numpy as np
import pytest

from llama4lab.run.corpus.counting import routing_stats
from llama4lab.run.recording import record
from llama4lab.tables.routing.cards import expert_card

WORDS = [10, 20, 30, 40]


def test_a_planted_expert_gets_and_promotes_its_own_token(planted_run):
    model, run = planted_run()
    for expert, word in enumerate(WORDS):
        card = expert_card(model, run, layer=1, expert=expert, k=3)
        assert card.inputs[["token_id", "share"]].values.tolist() == [[word, 1]]
        assert card.tokens == card.inputs["tokens"].sum() == [2, 2, 2, 1][expert]
        assert card.promoted["token_id"].iloc[0] == word
        assert card.neurons["neuron"].iloc[0] == 0
        assert card.neurons["norm"].iloc[0] == 1
        assert card.neurons["promoted"].iloc[0][0] == f"<{word}>"
        best = card.direction.groupby("side").first()["token_id"].to_dict()
        assert best["embedding"] == word
        assert len(card.direction) == 6


def test_activations_are_means_over_the_tokens_of_the_expert(new_text_model, random_ids):
    model = new_text_model(num_experts_per_tok=2)
    run = record(model, random_ids(2, 9).tolist(), at="layers.1.feed_forward.*.*")
    chosen = run["layers.1.feed_forward.router.indices"] == 2
    hidden = run["layers.1.feed_forward.experts.hidden"][chosen].abs().mean(0)
    card = expert_card(model, run, layer=1, expert=2, k=5)
    assert card.tokens == chosen.sum()
    np.testing.assert_allclose(card.neurons["activation"], hidden[card.neurons["neuron"].tolist()])
    norm = model.text.layers[1].feed_forward.experts.down_proj[2].detach().norm(dim=-1)
    assert card.neurons["neuron"].tolist() == (hidden * norm).topk(5).indices.tolist()
    write = run["layers.1.feed_forward.experts.out"][chosen].mean(0)
    logits = model.lm_head(model.text.norm(write)).detach()
    assert card.promoted["token_id"].tolist() == logits.topk(5).indices.tolist()
    assert (card.inputs["share"] <= 1).all()


def test_shares_of_one_expert_a_token_are_no_more_than_one_where_all_tokens_come_twice(planted_model):
    model = planted_model()
    run = record(model, [[10, 10, 20, 20]], at="layers.*.feed_forward.*.*")
    assert expert_card(model, run, layer=0, expert=0).inputs["share"].tolist() == [1]


def test_an_expert_without_tokens_has_a_card_of_its_weights(planted_model):
    model = planted_model()
    run = record(model, [[10, 20]], at="layers.*.feed_forward.*.*")
    card = expert_card(model, run, layer=0, expert=3)
    assert (card.tokens, len(card.inputs), len(card.promoted)) == (0, 0, 0)
    assert card.neurons["activation"].tolist() == [0] * 8
    assert card.direction["token_id"].iloc[0] == 40


def test_statistics_of_a_corpus_give_the_card_of_a_run_but_for_activations(planted_run, planted_prompt):
    model, run = planted_run()
    stats = routing_stats(model, [planted_prompt], vocabulary=True, progress=False)
    one, other = (expert_card(model, source, layer=1, expert=1) for source in (run, stats))
    assert one.tokens == other.tokens
    assert one.inputs.drop(columns="token").equals(other.inputs.drop(columns="token"))
    assert one.promoted["token_id"].iloc[0] == other.promoted["token_id"].iloc[0]
    assert other.neurons["activation"].isna().all()
    bare = expert_card(model, routing_stats(model, [planted_prompt], progress=False), layer=1, expert=1)
    assert bare.inputs.empty


def test_what_cannot_be_is_refused(planted_run, new_text_model):
    model, run = planted_run()
    with pytest.raises(IndexError, match="experts 0 to 3"):
        expert_card(model, run, layer=0, expert=4)
    with pytest.raises(ValueError, match="k=0"):
        expert_card(model, run, layer=0, expert=0, k=0)
    with pytest.raises(KeyError, match="was not recorded"):
        expert_card(model, record(model, [[10]], at="layers.*.feed_forward.router.*"), layer=0, expert=0)
    with pytest.raises(ValueError, match="dense"):
        expert_card(new_text_model(), run, layer=0, expert=0)
