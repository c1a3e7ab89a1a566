"""Copies and casts of whole models, embeddings of another size, tied embeddings."""

import copy
import io
import pickle

import pytest
import torch

from llama4lab.model.llama4 import HookedLlama4


@pytest.fixture(scope="module")
def model(new_model):
    return new_model()


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def saved_and_read(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_read,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_gives_the_same_bits_and_shares_nothing(copied, model, image_batch):
    batch = image_batch([[2], [1]])
    expected = logits(model, batch)
    other = copied(model)
    assert torch.equal(logits(other, batch), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_keeps_the_kernel_and_its_own_hook_points(copied, new_model, image_batch):
    model = new_model()
    model.attn = "sdpa"
    other = copied(model)
    assert other.attn == "sdpa"
    seen = []
    with other.hook_points().module("layers.0.resid_post").register_forward_hook(lambda m, a, x: seen.append(x)):
        logits(model, image_batch([[1]]))
        assert seen == []
        logits(other, image_batch([[1]]))
        assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_gives_the_bits_of_one_made_in_that_dtype(dtype, new_model, image_batch):
    """N1: transformers rounds its rotary tables in `.to(dtype)`: logits off by 4.9, image features by 2.9."""
    batch = image_batch([[2], [1]], words=60)
    cast, made = new_model().to(dtype), new_model(dtype=dtype)
    made.load_state_dict(cast.state_dict())
    assert torch.equal(logits(cast, batch), logits(made, batch))


def test_a_model_that_went_to_bfloat16_and_back_rotates_as_before(new_text_model, random_ids):
    model, ids = new_text_model(dtype=torch.bfloat16), random_ids(2, 100)
    wide = copy.deepcopy(model).float()
    expected = logits(wide, {"input_ids": ids})
    again = wide.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(logits(again, {"input_ids": ids}), expected)


def test_float16_gives_finite_logits_near_those_of_float32(new_text_model, random_ids):
    ids = random_ids(2, 12)
    wide, half = new_text_model(), new_text_model().half()
    assert logits(half, {"input_ids": ids}).dtype == torch.float16
    torch.testing.assert_close(
        logits(half, {"input_ids": ids[:, :1]}).float(), logits(wide, {"input_ids": ids[:, :1]}), atol=0.05, rtol=0
    )


def test_a_state_dict_makes_a_round_trip(model, new_model, image_batch):
    other = new_model(seed=1)
    other.load_state_dict(model.state_dict())
    batch = image_batch([[2], [1]])
    assert torch.equal(logits(other, batch), logits(model, batch))


def test_the_state_dict_holds_parameters_alone(model):
    """Hook points and tables have no place in a checkpoint."""
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_parameter_names_are_those_of_transformers(twins):
    ours, theirs = twins()
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


@pytest.mark.parametrize("size", [150, 100])
def test_embeddings_of_another_size_keep_the_logits_of_old_tokens(size, new_text_model, random_ids):
    model, ids = new_text_model(), random_ids(2, 9) % 100
    expected = logits(model, {"input_ids": ids})
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size
    resized = logits(model, {"input_ids": ids})
    assert resized.shape == (2, 9, size)
    torch.testing.assert_close(resized[..., :100], expected[..., :100], atol=1e-5, rtol=0)


def test_embeddings_of_the_model_with_vision_can_be_resized(new_model, image_batch):
    model = new_model()
    batch = image_batch([[2], [1]])
    expected = logits(model, batch)
    model.resize_token_embeddings(140, mean_resizing=False)
    assert model.config.text_config.vocab_size == 140
    torch.testing.assert_close(logits(model, batch)[..., :128], expected, atol=1e-5, rtol=0)


def test_new_tokens_are_known_after_resizing(new_text_model):
    model = new_text_model()
    with pytest.raises(ValueError, match="130"):
        model(torch.tensor([[130]]))
    model.resize_token_embeddings(140, mean_resizing=False)
    assert model(torch.tensor([[130]])).logits.shape == (1, 1, 140)


def test_tied_embeddings_are_one_tensor_also_after_resizing_and_copying(new_text_model):
    model = new_text_model(tie_word_embeddings=True)
    model.tie_weights()
    for other in (model, copy.deepcopy(model)):
        assert other.lm_head.weight is other.model.embed_tokens.weight
    model.resize_token_embeddings(140, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untied_embeddings_are_two_tensors(new_text_model):
    model = new_text_model()
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_input_vectors_give_the_logits_of_the_tokens(new_text_model, random_ids):
    model, ids = new_text_model(), random_ids(2, 20)
    vectors = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=vectors).logits, model(ids).logits)


def test_merged_input_vectors_give_the_logits_of_the_image(model, image_batch):
    batch, merged = image_batch([[2], [1]]), []
    with model.hook_points().module("embed_merged").register_forward_hook(lambda m, a, x: merged.append(x)):
        expected = logits(model, batch)
    vectors = {"inputs_embeds": merged[0], "attention_mask": batch["attention_mask"]}
    assert torch.equal(logits(model, vectors), expected)


def test_new_models_have_random_weights_of_the_size_that_the_config_says(full_config):
    model = HookedLlama4(full_config(initializer_range=0.05))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.startswith("language_model") and parameter.ndim > 1 and "embed" not in name:
            assert 0.04 < parameter.std() < 0.06, name
