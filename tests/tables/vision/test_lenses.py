"""The lens of image tokens against the model's own logits and against the lens of all tokens."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pytest
import torch

import llama4lab as lab
from llama4lab.run.tuned_lens import TunedLens
from llama4lab.tables.vision import lens, tokens, word_map
from llama4lab.tables.vision.places import token_places

AT = ["embed_merged", "image_features", "layers.*.resid_post"]
PLACE = ["row", "image", "tile", "is_global", "tile_row", "tile_column", "position", "left", "top", "right", "bottom"]


@pytest.fixture(scope="module")
def run(tiny, two_rows):
    return lab.record(tiny, two_rows, at=AT)


def without(run: lab.Run, *names: str) -> lab.Run:
    return lab.Run(
        {n: t for n, t in run.tensors.items() if n not in names}, run.shapes, run.logits, run.prompt, run.meta
    )


def test_after_the_last_layer_the_lens_gives_what_the_model_predicts(run, tiny):
    table = lens(run, tiny, layers=7, k=3)
    probs, ids = run.logits.softmax(-1).topk(3)
    where = [torch.tensor(table[name].to_numpy()) for name in ("row", "position", "rank")]
    assert table["token_id"].tolist() == ids[*where].tolist()
    assert table["prob"].tolist() == pytest.approx(probs[*where].tolist(), rel=1e-4)


def test_the_lens_agrees_with_that_of_all_tokens(run, tiny):
    ours = lens(run, tiny, k=2)
    theirs = lab.tables.logit_lens.top_tokens(tiny, run, 2)
    theirs["layer"] = theirs["layer"].fillna(-1)
    both = ours.merge(theirs, on=["row", "layer", "position", "rank"], suffixes=("", "_all"))
    assert len(both) == len(ours)
    assert both["token"].tolist() == both["token_all"].tolist()
    assert both["logit"].tolist() == pytest.approx(both["logit_all"].tolist(), rel=1e-4, abs=1e-4)
    assert both["prob"].tolist() == pytest.approx(both["prob_all"].tolist(), rel=1e-3)


def test_each_layer_has_every_image_token_in_the_order_of_the_prompt(run, tiny):
    table = lens(run, tiny, k=1)
    places = token_places(run.prompt)
    assert table["layer"].unique().tolist() == list(range(-1, 8))
    for _, own in table.groupby("layer"):
        assert own[PLACE].reset_index(drop=True).equals(places[PLACE])
    assert table.columns.tolist() == [*PLACE, "layer", "rank", "token_id", "token", "logit", "prob"]


@pytest.mark.parametrize("name", ["embed_merged", "image_features"])
def test_layer_minus_one_reads_the_features_from_either_hook_point(run, tiny, name):
    both, one = lens(run, tiny, layers=-1), lens(without(run, name), tiny, layers=-1)
    assert both["token_id"].tolist() == one["token_id"].tolist()
    assert both["logit"].tolist() == pytest.approx(one["logit"].tolist(), rel=1e-6)


def test_a_word_map_is_the_trajectory_of_the_word_at_the_image_tokens(run, tiny):
    ours = word_map(run, tiny, " red", layers=[2, 5])
    theirs = lab.tables.logit_lens.trajectories(tiny, run, " red")
    both = ours.merge(theirs, on=["row", "layer", "position"], suffixes=("", "_all"))
    assert len(both) == len(ours) == 2 * len(token_places(run.prompt))
    assert both["rank"].tolist() == both["rank_all"].tolist()
    assert both["prob"].tolist() == pytest.approx(both["prob_all"].tolist(), rel=1e-3)
    assert ours.attrs == {"token_id": run.prompt.token_id(" red"), "token": " red"}


def test_a_word_has_rank_0_exactly_where_the_lens_says_it(run, tiny):
    best = lens(run, tiny, layers=[4], k=1)
    word = int(best["token_id"].mode()[0])
    mapped = word_map(run, tiny, word, layers=[4])
    assert (mapped["rank"] == 0).tolist() == (best["token_id"] == word).tolist()
    assert (mapped["rank"] == 0).any()


def test_the_table_of_tokens_has_the_best_word_of_each_layer(run, tiny):
    table, best = tokens(run, tiny), lens(run, tiny, k=1)
    for layer in range(8):
        assert table[f"lens_{layer}"].tolist() == best.query(f"layer == {layer}")["token"].tolist()
    assert not [name for name in tokens(run) if name.startswith("lens")]


def test_a_tuned_lens_that_moves_nothing_changes_nothing(run, tiny):
    zero = torch.zeros(run.meta["d_model"])
    still = TunedLens({"layers.2.resid_post": zero.diag()}, {"layers.2.resid_post": zero}, dict(run.meta))
    plain, tuned = lens(run, tiny, layers=2), lens(run, tiny, layers=2, tuned=still)
    assert plain["token_id"].tolist() == tuned["token_id"].tolist()
    with pytest.raises(KeyError, match="not fitted"):
        lens(run, tiny, layers=3, tuned=still)


def test_a_cut_run_has_the_image_tokens_that_are_left(run, tiny):
    first = run.prompt.images[1].positions[2].item()
    whole = lens(run, tiny, layers=3).query("row == 1 and @first <= position < @first + 5")
    table = lens(run.cut(rows=[1], positions=slice(first, first + 5)), tiny, layers=3)
    assert table["position"].unique().tolist() == list(range(first, first + 5))
    assert table["token_id"].tolist() == whole["token_id"].tolist()


def test_a_model_without_a_tokenizer_is_read_by_ids(new_model, small_prompt):
    model = new_model(num_experts_per_tok=2)
    run = lab.record(model, small_prompt, at=AT)
    table = lens(run, model, layers=[-1, 4], k=200)
    assert table.groupby(["row", "layer", "position"])["prob"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    mapped = word_map(run, model, 17, layers=4)
    own = table.query("layer == 4 and token_id == 17")
    assert mapped["rank"].tolist() == own["rank"].tolist()


def test_a_word_of_several_tokens_is_refused_by_naming_them(run, tiny):
    with pytest.raises(ValueError, match="It is 7 tokens: ' ', 'r', 'e', 'd', 'r', 'e', 'd'"):
        word_map(run, tiny, " redred")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda run, model: lens(run, model, layers=9), KeyError, "Layer 9 was asked for"),
        (lambda run, model: lens(without(run, *run.names), model), KeyError, "recorded for a lens are layers none"),
        (lambda run, model: lens(run, model, k=0), ValueError, "k is at least 1"),
        (lambda run, model: word_map(run, model, 10**7), IndexError, "has ids 0 to"),
        (lambda run, model: word_map(run, model, -1), IndexError, "has ids 0 to"),
        (lambda run, model: lens(run.cut(rows=[0], positions=[0]), model), ValueError, "have no image, or"),
        (lambda run, model: tokens(without(run, *run.names), model), KeyError, "A lens was asked for"),
    ],
)
def test_what_cannot_be_read_is_refused(run, tiny, call, error, message):
    with pytest.raises(error, match=message):
        call(run, tiny)


def test_a_prompt_without_images_is_refused(tiny):
    run = lab.record(tiny, "The capital of France is", at="layers.*.resid_post")
    with pytest.raises(ValueError, match="no image"):
        lens(run, tiny)


def test_probabilities_and_ranks_go_together(run, tiny):
    table = lens(run, tiny, layers=6, k=5)
    for _, own in table.groupby(["row", "position"]):
        assert own["rank"].tolist() == [0, 1, 2, 3, 4]
        assert (np.diff(own["prob"]) <= 0).all()
