"""Generation by transformers over our classes: every way of decoding gives what greedy full passes give."""

import pytest
import torch
from transformers import DynamicCache

NEW = 16


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(scope="module")
def assistant(new_text_model):
    """A smaller model with other weights, whose guesses are mostly wrong."""
    return new_text_model(num_hidden_layers=2, seed=5)


@pytest.fixture(scope="module")
def ids(random_ids):
    return random_ids(2, 13)


@torch.no_grad()
def by_full_passes(model, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """Greedy decoding without any cache, by the definition."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.fixture(scope="module")
def greedy(model, ids):
    return by_full_passes(model, ids)


def generate(model, ids, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options)


WAYS = {
    "with the default cache": {},
    "without a cache": {"use_cache": False},
    "with a dynamic cache": {"cache_implementation": "dynamic"},
    "with a static cache": {"cache_implementation": "static"},
    "with the prompt in pieces of 3": {"prefill_chunk_size": 3},
    "with the prompt in pieces of a chunk": {"prefill_chunk_size": 8},
    "with one beam": {"num_beams": 1},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_greedy_decoding_gives_the_tokens_of_full_passes(options, model, ids, greedy):
    assert torch.equal(generate(model, ids, **options), greedy)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_greedy_decoding_gives_them_under_every_kernel(kernel, new_text_model, ids, greedy):
    model = new_text_model()
    model.attn = kernel
    assert torch.equal(generate(model, ids), greedy)


def test_prompt_lookup_gives_the_tokens_of_greedy_decoding(model, ids):
    options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
    prompt = torch.cat([ids[:1], ids[:1]], dim=1)  # so that there is something to look up
    assert torch.equal(generate(model, prompt, **options), by_full_passes(model, prompt))


def test_an_assistant_gives_the_tokens_of_greedy_decoding(model, assistant, ids, greedy):
    assert torch.equal(generate(model, ids[:1], assistant_model=assistant), greedy[:1])


def test_an_assistant_that_is_always_right_gives_the_tokens_of_greedy_decoding(model, new_text_model, ids, greedy):
    assert torch.equal(generate(model, ids[:1], assistant_model=new_text_model()), greedy[:1])


def test_sampling_repeats_with_its_seed_and_differs_with_another(model, ids):
    def sampled(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return generate(model, ids, do_sample=True, temperature=1.5)

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))


def test_sampling_with_a_cache_gives_the_tokens_of_sampling_without(model, ids):
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(model, ids, do_sample=True, use_cache=use_cache))
    assert torch.equal(*results)


@torch.no_grad()
def log_probability(model, sequence: torch.Tensor, prompt: int) -> float:
    steps = model(sequence[None]).logits[0].log_softmax(-1)
    return steps[prompt - 1 : -1].gather(-1, sequence[prompt:, None]).sum().item()


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_scores_its_sequences_truly(beams, model, ids):
    asked = {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    output = generate(model, ids, **asked)
    for row in range(2):
        score = log_probability(model, output.sequences[row], 13)
        assert output.sequences_scores[row].item() == pytest.approx(score, abs=1e-3)


def test_beam_search_with_padding_gives_each_row_what_it_gets_alone(model, ids):
    padded = ids.clone()
    padded[1, :6] = 0
    together = generate(model, padded, attention_mask=(padded != 0).long(), num_beams=3)
    alone = generate(model, padded[1:, 6:], num_beams=3)
    assert torch.equal(together[1, 13:], alone[0, 7:])
    assert torch.equal(together[0], generate(model, ids[:1], num_beams=3)[0])


def test_several_sequences_of_a_padded_prompt_are_those_of_the_prompt_alone(model, ids):
    results = []
    for prompt in (torch.nn.functional.pad(ids[:1], (4, 0)), ids[:1]):
        torch.manual_seed(4)
        options = {"do_sample": True, "num_return_sequences": 3, "attention_mask": (prompt != 0).long()}
        results.append(generate(model, prompt, **options)[:, -NEW:])
    assert torch.equal(*results)


def test_generation_from_input_vectors_gives_the_tokens_of_generation_from_ids(model, ids, greedy):
    vectors = model.get_input_embeddings()(ids).detach()
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(inputs_embeds=vectors, **options), greedy[:, 13:])


def test_generation_goes_on_in_a_cache_that_was_filled_before(model, ids, greedy):
    with torch.no_grad():
        cache = model(ids[:, :12], use_cache=True).cache
    assert torch.equal(generate(model, ids, cache=cache), greedy)


def test_generation_stops_at_the_end_token_and_fills_with_padding(model, ids, greedy):
    end = int(greedy[0, 13 + 3])
    expected_stop = (greedy[0, 13:] == end).nonzero()[0].item()
    output = generate(model, ids, eos_token_id=end, pad_token_id=0)
    assert (output[0, 13 + expected_stop + 1 :] == 0).all()
    assert torch.equal(output[0, : 13 + expected_stop + 1], greedy[0, : 13 + expected_stop + 1])


def test_generation_leaves_the_ids_and_the_model_as_they_were(model, ids):
    before, logits = ids.clone(), model(ids).logits
    generate(model, ids)
    assert torch.equal(ids, before)
    assert torch.equal(model(ids).logits, logits)


def test_a_hook_acts_on_every_step(model, ids, greedy):
    """Silencing the attention of a layer gives the tokens of full passes with that layer silenced."""
    point = model.hook_points().module("layers.3.self_attn.out")
    with point.register_forward_hook(lambda module, args, x: torch.zeros_like(x)):
        changed = generate(model, ids)
        expected = by_full_passes(model, ids)
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, greedy)


@pytest.mark.parametrize("cache", ["bare", "of the config"])
def test_a_cache_of_transformers_gives_the_tokens_of_full_passes(cache, model, ids, greedy):
    filled = DynamicCache() if cache == "bare" else DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, cache=filled), greedy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can offload")
def test_offloading_without_an_accelerator_is_refused(model, ids):
    """N15: layers of an offloaded cache wait in RAM; without an accelerator there is nothing to offload from."""
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)accelerator|offload"):
        generate(model, ids, cache_implementation="offloaded")


def test_a_quantized_cache_is_refused_in_words(model, ids):
    """N15: it would need one chunk size for all layers."""
    with pytest.raises((ValueError, ImportError, NotImplementedError), match=r"(?i)quanti|quanto|hqq"):
        generate(model, ids, cache_implementation="quantized")
