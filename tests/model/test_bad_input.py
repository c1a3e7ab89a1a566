"""Bad input is a ValueError, TypeError or KeyError that names what was wrong; never a number."""

import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True)
def _without_type_checks():
    """As users run it: the checks of the annotations exist in tests alone, and would come before the errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def model(new_model):
    return new_model()


@pytest.fixture(scope="module")
def batch(image_batch):
    return image_batch([[2], [1]])


IDS = torch.ones(2, 9, dtype=torch.long)
VECTORS = torch.ones(2, 9, 64)
TEXT_CASES = {
    "no input": ({}, "exactly one of input_ids and inputs_embeds"),
    "two inputs": ({"input_ids": IDS, "inputs_embeds": VECTORS}, "exactly one"),
    "one-dimensional ids": ({"input_ids": IDS[0]}, r"\[9\]"),
    "three-dimensional ids": ({"input_ids": IDS[None]}, r"\[1, 2, 9\]"),
    "an empty sequence": ({"input_ids": IDS[:, :0]}, r"\[2, 0\]"),
    "an empty batch": ({"input_ids": IDS[:0]}, r"\[0, 9\]"),
    "ids that are not whole": ({"input_ids": IDS.float()}, "float32"),
    "an id past the vocabulary": ({"input_ids": IDS * 128}, "128"),
    "a negative id": ({"input_ids": IDS * -100}, "-100"),
    "vectors of another width": ({"inputs_embeds": torch.ones(2, 9, 32)}, "32"),
    "vectors without batch": ({"inputs_embeds": VECTORS[0]}, r"\[9, 64\]"),
    "an empty sequence of vectors": ({"inputs_embeds": VECTORS[:, :0]}, r"\[2, 0"),
    "a mask one too short": ({"input_ids": IDS, "attention_mask": IDS[:, :8]}, r"\[2, 8\]"),
    "a mask one too long": ({"input_ids": IDS, "attention_mask": torch.ones(2, 10)}, r"\[2, 10\]"),
    "a mask of another batch": ({"input_ids": IDS, "attention_mask": torch.ones(3, 9)}, r"\[3, 9\]"),
    "a one-dimensional mask": ({"input_ids": IDS, "attention_mask": torch.ones(9)}, "1 dim|\\[9\\]"),
    "a three-dimensional mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 9, 9)}, "3 dim|\\[2, 9, 9\\]"),
    "a 4-D mask of another size": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 8).bool()}, "9, 8"),
    "a mask that is neither 0 nor 1": ({"input_ids": IDS, "attention_mask": IDS * 7}, "7"),
    "additive numbers as a padding mask": ({"input_ids": IDS, "attention_mask": (IDS - 2).float()}, "-1"),
    "positions of another length": ({"input_ids": IDS, "position_ids": IDS[:, :8]}, r"\[2, 8\]"),
    "positions of another batch": ({"input_ids": IDS, "position_ids": torch.ones(3, 9).long()}, r"\[3, 9\]"),
    "negative positions": ({"input_ids": IDS, "position_ids": IDS * -4}, "-4"),
    "positions that are not whole": ({"input_ids": IDS, "position_ids": IDS * 0.5}, "float32"),
    "labels of another length": ({"input_ids": IDS, "labels": IDS[:, :8]}, r"\[2, 8\]"),
    "an unknown option": ({"input_ids": IDS, "attentionmask": IDS}, "attentionmask"),
    "a mask dict without a kind of layer": (
        {"input_ids": IDS, "attention_mask": {"full": torch.ones(2, 1, 9, 9).bool()}},
        "full_attention",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), TEXT_CASES.values(), ids=TEXT_CASES)
def test_wrong_text_input_is_refused_with_what_was_wrong(wrong, message, model):
    with pytest.raises((ValueError, TypeError), match=message):
        model.language_model(**wrong)


@pytest.mark.parametrize(("wrong", "message"), TEXT_CASES.values(), ids=TEXT_CASES)
def test_the_model_with_vision_refuses_the_same(wrong, message, model):
    with pytest.raises((ValueError, TypeError), match=message):
        model(**wrong)


def test_a_label_past_the_vocabulary_is_refused(model):
    with pytest.raises((ValueError, IndexError), match="500"):
        model(IDS, labels=IDS * 500)


def test_too_few_image_patch_tokens_are_refused_with_both_counts(model, batch):
    """D9: Meta's code takes 8 of 12 without a word."""
    with pytest.raises(ValueError, match=r"(?s)12 image patch tokens.*8.*2 tiles of 4"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})


def test_too_many_image_patch_tokens_are_refused_with_both_counts(model, batch):
    with pytest.raises(ValueError, match=r"(?s)12 image patch tokens.*16"):
        model(**{**batch, "pixel_values": torch.ones(4, 3, 24, 24)})


def test_image_patch_tokens_without_an_image_are_refused(model, batch):
    """The embedding of a patch token was never trained; without pixels the text would be about nothing."""
    without = {name: value for name, value in batch.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="12 image patch tokens"):
        model(**without)


def test_pixels_together_with_input_vectors_are_refused(model, batch):
    with pytest.raises(ValueError, match="pixel_values"):
        model(inputs_embeds=VECTORS, pixel_values=batch["pixel_values"])


def test_pixels_together_with_ready_image_features_are_refused(model, batch):
    features = model.get_image_features(batch["pixel_values"])
    with pytest.raises(ValueError, match="mm_encoder_outputs"):
        model(**batch, mm_encoder_outputs={"image": features})


def test_pixels_for_a_model_without_vision_are_refused(model, batch):
    with pytest.raises((ValueError, TypeError), match="pixel_values"):
        model.language_model(input_ids=IDS, pixel_values=batch["pixel_values"])


def test_a_cache_of_another_batch_is_refused(model):
    cache = model(IDS, use_cache=True).cache
    with pytest.raises((ValueError, RuntimeError), match=r"9 tokens in 3 rows|[Ss]ize"):
        model(torch.ones(3, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("shape", [(2, 3, 24, 12), (2, 1, 24, 24), (3, 24, 24)])
def test_pixels_of_another_shape_are_refused(shape, model, batch):
    with pytest.raises((ValueError, TypeError), match=str(shape[-1])):
        model(**{**batch, "pixel_values": torch.ones(shape)})


def test_bad_input_leaves_a_cache_as_it_was(model, random_ids):
    ids = random_ids(1, 12)
    cache = model.language_model(ids[:, :6], use_cache=True).cache
    with pytest.raises(ValueError, match="999"):
        model.language_model(torch.tensor([[999]]), cache=cache)
    with pytest.raises(ValueError, match="7"):
        model.language_model(ids[:, 6:], attention_mask=torch.ones(1, 7), cache=cache)
    with torch.no_grad():
        logits = model.language_model(ids[:, 6:], cache=cache).logits
        torch.testing.assert_close(logits, model.language_model(ids).logits[:, 6:], atol=1e-5, rtol=0)
