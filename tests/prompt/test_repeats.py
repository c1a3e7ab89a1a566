import pytest

from llama4lab.model.loading import load
from llama4lab.prompt.repeats import repeated_tokens


@pytest.fixture(scope="module")
def tiny():
    return load()


def test_rows_are_the_same_different_tokens_several_times(tiny):
    prompt = repeated_tokens(tiny, 4, length=7, rounds=3)
    rows = prompt.input_ids.tolist()
    assert [len(row) for row in rows] == [22] * 4
    for row in rows:
        assert row[0] == tiny.tokenizer.bos_token_id
        assert row[1:8] == row[8:15] == row[15:]
        assert len(set(row[1:8])) == 7
    assert len({tuple(row) for row in rows}) == 4


def test_by_default_all_rounds_fit_into_a_chunk_and_are_text(tiny):
    prompt = repeated_tokens(tiny, 50)
    chunk = tiny.text.config.attention_chunk_size
    assert chunk - 1 <= prompt.input_ids.shape[1] <= chunk
    assert {kind for row in prompt.modality for kind in row[1:]} == {"text"}
    assert prompt.attention_mask.all()


def test_a_seed_gives_the_same_rows(tiny):
    one, again, other = (repeated_tokens(tiny, 2, seed=seed).input_ids for seed in (0, 0, 1))
    assert one.equal(again)
    assert not one.equal(other)


def test_a_model_without_a_tokenizer_gets_ids_that_mean_nothing_special(new_model):
    model = new_model(attention_chunk_size=None, eos_token_id=[2, 3])
    ids = repeated_tokens(model, 30).input_ids
    assert ids.shape == (30, 101)
    config = model.text.config
    assert (ids[:, 0] == config.bos_token_id).all()
    assert not {config.bos_token_id, config.pad_token_id, 2, 3, model.config.image_token_id} & set(
        ids[:, 1:].unique().tolist()
    )


def test_the_vocabulary_can_be_chosen(new_text_model):
    model = new_text_model(bos_token_id=None)
    assert set(repeated_tokens(model, 3, length=3, vocabulary=[5, 9, 9, 11]).input_ids.unique().tolist()) == {5, 9, 11}


@pytest.mark.parametrize("options", [{"length": 0}, {"rounds": 1}, {"rows": 0}, {"length": 3, "vocabulary": [5, 6]}])
def test_what_cannot_be_repeated_is_refused(new_text_model, options):
    with pytest.raises(ValueError, match="at least 1 row, 2 rounds and 1 token"):
        repeated_tokens(new_text_model(), **options)
