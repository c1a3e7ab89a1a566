"""The cache and what the vision tower gave go by two names each, with every release of transformers."""

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama4 import modeling_llama4
from transformers.utils import generic

from llama4lab.model.cache import new_cache

NAMES = ["cache", "past_key_values"]


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(scope="module")
def model_with_vision(new_model):
    return new_model()


@pytest.fixture(autouse=True)
def _no_advice(monkeypatch):
    """transformers must not tell users of llama4lab to take another name."""

    def complain(message: str, *_) -> None:
        raise AssertionError(message)

    for module in (generic, modeling_llama4):
        monkeypatch.setattr(module.logger, "warning_once", complain)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_goes_on_in_a_cache_under_either_name(name, model, random_ids):
    ids = random_ids(2, 20)
    output = model(ids[:, :13], use_cache=True)
    rest = model(ids[:, 13:], **{name: getattr(output, name)}).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 13:], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_of_the_model_with_vision_goes_on_under_either_name(name, model_with_vision, image_batch):
    batch = image_batch([[2]])
    whole = model_with_vision(**batch).logits
    first = {"input_ids": batch["input_ids"][:, :-2], "pixel_values": batch["pixel_values"]}
    cache = getattr(model_with_vision(**first, use_cache=True), name)
    rest = model_with_vision(batch["input_ids"][:, -2:], **{name: cache}).logits
    torch.testing.assert_close(rest, whole[:, -2:], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ours", "of transformers"])
@pytest.mark.parametrize("name", NAMES)
def test_generation_goes_on_in_a_cache_under_either_name(name, kind, model, random_ids):
    ids, options = random_ids(2, 13), {"max_new_tokens": 8, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    cache = new_cache(model.config) if kind == "ours" else DynamicCache(config=model.config)
    model(ids[:, :12], cache=cache)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, **{name: cache}), expected)
    assert cache.get_seq_length() == 13 + 8 - 1


@torch.no_grad()
def test_an_output_has_one_cache_under_both_names_and_lists_it_once(model, random_ids):
    output = model(random_ids(1, 5), use_cache=True)
    assert output.cache is output.past_key_values
    assert len(set(NAMES) & set(output.keys())) == 1
    without = model(random_ids(1, 5), use_cache=False)
    assert without.cache is None
    assert without.past_key_values is None


@torch.no_grad()
def test_two_caches_at_once_are_refused(model, model_with_vision, random_ids):
    ids = random_ids(1, 5)
    caches = {name: new_cache(model.config) for name in NAMES}
    for call in (model, model_with_vision, model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(ids, **caches)


@torch.no_grad()
def test_one_cache_under_both_names_is_one_cache(model, random_ids):
    ids, cache = random_ids(1, 5), new_cache(model.config)
    assert torch.equal(model(ids, cache=cache, past_key_values=cache).logits, model(ids).logits)
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_an_output_has_the_vectors_of_the_vision_tower_under_both_names(model_with_vision, image_batch, random_ids):
    batch = image_batch([[2], [1]])
    vectors = model_with_vision.vision_model(batch["pixel_values"])
    before = {"pixel_values": None, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(vectors)}}
    for inputs in (batch, batch | before):
        output = model_with_vision(**inputs)
        assert torch.equal(output.image_hidden_states, vectors)
        assert torch.equal(output.image_outputs.last_hidden_state, vectors)
    text = model_with_vision(random_ids(1, 5))
    assert text.image_hidden_states is None
    assert text.image_outputs is None


@torch.no_grad()
def test_a_tuple_of_an_output_with_images_begins_with_the_logits(model_with_vision, image_batch):
    batch = image_batch([[1]])
    output = model_with_vision(**batch, return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], model_with_vision(**batch).logits)
