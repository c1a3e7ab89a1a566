"""Nearest words against all cosines at once."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false

import pytest
import torch

import llama4lab as lab
from llama4lab.tables.vision import embedding_words, nearest_words
from llama4lab.tables.vision.places import token_places


@pytest.fixture(scope="module")
def run(tiny, two_rows):
    return lab.record(tiny, two_rows, at=["image_features", "embed_merged"])


@pytest.mark.parametrize("rows", [4096, 100])
def test_words_are_those_of_the_largest_cosines_however_the_vocabulary_is_cut(run, tiny, monkeypatch, rows):
    monkeypatch.setattr(embedding_words, "ROWS", rows)
    table, places = nearest_words(run, tiny, 3), token_places(run.prompt)
    x = run["embed_merged"][places["row"].tolist(), places["position"].tolist()].double()
    weight = tiny.get_input_embeddings().weight.detach().double()
    cosines = torch.nn.functional.cosine_similarity(x[:, None], weight[None], dim=-1)
    best, ids = cosines.topk(3, dim=-1)
    assert table["token_id"].tolist() == ids.flatten().tolist()
    assert table["cosine"].tolist() == pytest.approx(best.flatten().tolist(), abs=1e-5)
    assert table["rank"].tolist() == [0, 1, 2] * len(places)


def test_a_feature_that_is_an_embedding_finds_its_word(run, tiny):
    places = token_places(run.prompt)
    merged = run["embed_merged"].clone()
    planted = torch.arange(100, 100 + len(places))
    merged[places["row"].tolist(), places["position"].tolist()] = 3 * tiny.get_input_embeddings()(planted).detach()
    own = lab.Run({"embed_merged": merged}, run.shapes, run.logits, run.prompt, run.meta)
    table = nearest_words(own, tiny, 1)
    assert table["token_id"].tolist() == planted.tolist()
    assert table["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)


def test_an_embedding_without_length_is_like_nothing(new_model, small_prompt):
    model = new_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 0
    table = nearest_words(lab.record(model, small_prompt, at="image_features"), model, 128)
    assert table["cosine"].notna().all()
    assert (table.loc[table["token_id"] == 5, "cosine"] == 0).all()
    assert len(table) == 128 * len(token_places(small_prompt))


def test_features_are_needed(run, tiny):
    bare = lab.Run({}, {}, run.logits, run.prompt, run.meta)
    with pytest.raises(KeyError, match="were not recorded"):
        nearest_words(bare, tiny)
    with pytest.raises(ValueError, match="at least 1"):
        nearest_words(run, tiny, 0)
