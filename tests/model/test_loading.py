"""Loading and saving, between this library and transformers, in both directions."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from llama4lab.checkpoint.locating import TINY
from llama4lab.model.llama4 import HookedLlama4, HookedLlama4ForCausalLM
from llama4lab.model.loading import load

CPU = torch.device("cpu")


@pytest.fixture
def saved_text(tmp_path, new_text_model):
    """A text-only checkpoint in bfloat16, in several files."""
    new_text_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "text", max_shard_size="100KB")
    return tmp_path / "text"


@pytest.fixture
def saved(tmp_path, new_model):
    """A checkpoint with vision in bfloat16, in one file."""
    new_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def same_parameters(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def test_a_text_model_saved_by_transformers_loads_and_computes_the_same(tmp_path, text_twins, random_ids):
    ours, theirs = text_twins()
    theirs.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is HookedLlama4ForCausalLM
    assert same_parameters(loaded, ours)
    ids = random_ids(2, 20)
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_model_with_vision_saved_by_transformers_loads_and_computes_the_same(tmp_path, twins, image_batch):
    ours, theirs = twins()
    theirs.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is HookedLlama4
    assert same_parameters(loaded, ours)
    batch = image_batch([[2], [1]])
    assert torch.equal(loaded(**batch).logits, ours(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_we_save_and_gives_the_same_logits(tmp_path, new_text_model, random_ids, dtype):
    ours = new_text_model(dtype=dtype)
    ours.save_pretrained(tmp_path)
    theirs = Llama4ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert same_parameters(ours, theirs)
    ids = random_ids(2, 7)
    bound = 2e-5 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=bound)


@torch.no_grad()
def test_transformers_loads_what_we_save_with_vision_and_gives_the_same_logits(
    tmp_path, new_model, image_batch, monkeypatch
):
    # transformers 5.24.0 reads this off the output of its text model, which lacks it: every pass would fail.
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    ours = new_model()
    ours.save_pretrained(tmp_path)
    theirs = Llama4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    # Without padding: transformers counts it as positions in the temperature of the attention.
    batch = image_batch([[2, 1]])
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=0, atol=2e-5)


def assert_same_files(one, other):
    names = sorted(file.name for file in one.iterdir())
    assert sorted(file.name for file in other.iterdir()) == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_loading_and_saving_gives_identical_files(tmp_path, saved, saved_text):
    load(saved, dtype="auto").save_pretrained(tmp_path / "again")
    assert_same_files(saved, tmp_path / "again")
    load(saved_text, dtype="auto").save_pretrained(tmp_path / "text again", max_shard_size="100KB")
    assert_same_files(saved_text, tmp_path / "text again")


def test_from_pretrained_and_saving_gives_identical_files(tmp_path, saved, saved_text):
    HookedLlama4.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert_same_files(saved, tmp_path / "again")
    # In one file: transformers spreads a model over several in an order that depends on how it was made.
    load(saved_text, dtype="auto").save_pretrained(tmp_path / "one file")
    HookedLlama4ForCausalLM.from_pretrained(saved_text).save_pretrained(tmp_path / "text again")
    assert_same_files(tmp_path / "one file", tmp_path / "text again")


def test_from_pretrained_and_load_give_the_same_model(saved):
    assert same_parameters(load(saved, dtype="auto"), HookedLlama4.from_pretrained(saved))


@torch.no_grad()
def test_saving_over_the_folder_it_came_from_changes_no_weight(saved, random_ids):
    model = load(saved, dtype="auto")
    before = model(random_ids(1, 12)).logits
    model.save_pretrained(saved)
    assert torch.equal(model(random_ids(1, 12)).logits, before)
    assert same_parameters(load(saved, dtype="auto"), model)


@torch.no_grad()
def test_unfused_experts_and_names_without_prefix_compute_the_same(saved, random_ids):
    expected = load(saved)(random_ids(2, 20)).logits
    tensors = {}
    for name, tensor in load_file(saved / "model.safetensors").items():
        experts, _, projection = name.removeprefix("language_model.").rpartition(".")
        if projection == "gate_up_proj":
            for expert, weight in enumerate(tensor):
                gate, up = weight.T.chunk(2)
                tensors[f"{experts}.{expert}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{experts}.{expert}.up_proj.weight"] = up.contiguous()
        elif projection == "down_proj":
            for expert, weight in enumerate(tensor):
                tensors[f"{experts}.{expert}.down_proj.weight"] = weight.T.contiguous()
        else:
            tensors[name.removeprefix("language_model.")] = tensor
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(saved)(random_ids(2, 20)).logits, expected)


def test_a_loaded_model_is_ready_to_run(saved):
    model = load(saved)
    assert model.folder == saved
    assert not model.training
    assert model.config._name_or_path == str(saved)
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_generation_settings_come_from_their_file(saved):
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "max_new_tokens": 7}))
    settings = load(saved).generation_config
    assert settings.eos_token_id == [5, 6]
    assert settings.max_new_tokens == 7
    (saved / "generation_config.json").unlink()
    assert load(saved).generation_config.max_new_tokens != 7


def test_damaged_generation_settings_are_an_error_that_names_the_file(saved):
    (saved / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        load(saved)


def test_tied_embeddings_stay_one_parameter(tmp_path, new_text_model, random_ids):
    model = new_text_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


def test_tied_embeddings_that_are_stored_twice_must_be_equal(tmp_path, new_text_model):
    new_text_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert load(tmp_path).lm_head.weight.shape == embedding.shape
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight .* differ"):
        load(tmp_path)


def test_a_failed_load_leaves_torch_as_it_was(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["language_model.model.norm.weight"][0] = math.nan
    save_file(tensors, saved / "model.safetensors")
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"language_model\.model\.norm\.weight holds 1 values that are NaN"):
        load(saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.empty(1).device == CPU
    assert torch.get_default_dtype() == torch.float32


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_that_no_machine_can_hold_are_an_error(saved_text):
    document = json.loads((saved_text / "config.json").read_text())
    document |= {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}
    (saved_text / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"config\.json describes a model that cannot be built"):
        load(saved_text)


def test_tiny_loads_by_default():
    model = load()
    assert model.folder == TINY
    assert isinstance(model, HookedLlama4)
    assert model.device == CPU
