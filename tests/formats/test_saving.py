"""Saving packed models: what is loaded again is the same model, bit for bit, and other tools can load it."""

import copy
import json
import math
import pickle
import shutil
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file

import llama4lab as lab
from llama4lab.model import saving
from llama4lab.model.expert_bank import ExpertBank
from llama4lab.model.packed_linear import PackedLinear

METHODS = ["int8", "int4", "fp8"]
SETTINGS = ("quantization_config", "quantization")


def tensors_in(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def quantization_in(folder):
    document = json.loads((folder / "config.json").read_text())
    return {key: document.get(key) for key in SETTINGS}


def same_bytes(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert same_bytes(one[name], other[name]), name


def packed_bytes(model):
    """Every stored tensor of a model, by module, expert, matrix and role."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            found |= {(path, 0, n, r): t for n, each in enumerate(module.packed.tensors) for r, t in each.items()}
        for name in ("gate_up_proj", "down_proj"):
            if isinstance(bank := getattr(module, name, None), ExpertBank):
                for expert in range(len(bank)):
                    for number, each in enumerate(bank.source.matrix(expert).tensors):
                        found |= {(f"{path}.{name}", expert, number, role): t for role, t in each.items()}
    return found


def batch_for(model, image_batch, random_ids):
    return {"input_ids": random_ids(2, 14)} if model.vision is None else image_batch([[2], [1]])


def assert_same_model(one, other, image_batch, random_ids):
    batch = batch_for(one, image_batch, random_ids)
    with torch.no_grad():
        assert torch.equal(one(**batch).logits, other(**batch).logits)
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("experts", ["resident", "offload"])
def test_a_packed_checkpoint_is_written_as_it_was(saved_as, format, experts, tmp_path, image_batch, random_ids):
    source = saved_as(format)
    model = lab.load(source, dtype="auto", experts=experts)
    model.save_pretrained(tmp_path)
    if (format, experts) != ("plain, unfused", "resident"):
        assert_same_tensors(tensors_in(tmp_path), tensors_in(source))
    assert quantization_in(tmp_path) == quantization_in(source)
    assert_same_model(lab.load(tmp_path, dtype="auto"), model, image_batch, random_ids)


@pytest.mark.parametrize("format", ["int4", "nf4, nested", "modelopt nvfp4", "mlx"])
def test_a_model_in_another_dtype_comes_back_in_it(saved_as, format, tmp_path, image_batch, random_ids):
    model = lab.load(saved_as(format), dtype="float32")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    stored = tensors_in(tmp_path)
    assert any(tensor.dtype == torch.float32 for name, tensor in stored.items() if name.endswith("norm.weight"))
    assert_same_model(lab.load(tmp_path), model, image_batch, random_ids)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("experts", ["resident", "offload"])
def test_what_was_rounded_while_it_was_loaded_comes_back_bit_for_bit(
    plain, method, experts, tmp_path, image_batch, random_ids
):
    model = lab.load(plain, quantize=method, experts=experts)
    model.save_pretrained(tmp_path / "saved")
    again = lab.load(tmp_path / "saved")
    assert_same_model(again, model, image_batch, random_ids)
    # Saved once more, now as a checkpoint that was packed before.
    again.save_pretrained(tmp_path / "twice")
    assert_same_tensors(tensors_in(tmp_path / "twice"), tensors_in(tmp_path / "saved"))
    assert (tmp_path / "twice/config.json").read_text() == (tmp_path / "saved/config.json").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_the_rounded_bytes_are_those_in_the_model(saved_as, method, tmp_path):
    model = lab.load(saved_as("plain, unfused"), quantize=method)
    model.save_pretrained(tmp_path)
    ours, theirs = packed_bytes(model), packed_bytes(lab.load(tmp_path))
    assert_same_tensors(ours, theirs)
    sizes = {
        name: sum(t.nbytes for n, t in tensors_in(folder).items() if ".experts." in n)
        for name, folder in [("rounded", tmp_path), ("plain", saved_as("plain, unfused"))]
    }
    assert sizes["rounded"] < sizes["plain"] * (0.6 if method != "int4" else 0.35)


@pytest.mark.parametrize("format", ["int4", "mlx", "modelopt fp8", "plain, unfused", "rounded"])
def test_a_model_that_waits_on_disk_as_a_whole_is_copied(saved_as, format, tmp_path, image_batch, random_ids):
    options: dict[str, Any] = {"quantize": "int4"} if format == "rounded" else {}
    source = saved_as("plain, unfused" if format == "rounded" else format)
    model = lab.load(source, dtype="bfloat16", device_map="disk", **options)
    model.save_pretrained(tmp_path)
    if format != "rounded":
        assert_same_tensors(tensors_in(tmp_path), tensors_in(source))
    assert_same_model(lab.load(tmp_path, dtype="bfloat16"), model, image_batch, random_ids)


def test_groups_of_several_sizes_are_told_apart_by_name(new_text_model, tmp_path):
    new_text_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = lab.load(tmp_path / "plain", quantize="int4", dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    groups = quantization_in(tmp_path / "saved")["quantization_config"]["config_groups"].values()
    assert {group["weights"]["group_size"] for group in groups} == {math.gcd(128, width) for width in (64, 48, 80)}
    again = lab.load(tmp_path / "saved", dtype="bfloat16")
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_text_models_with_tied_weights_keep_them(new_text_model, tmp_path, random_ids):
    new_text_model(tie_word_embeddings=True, interleave_moe_layer_step=1).save_pretrained(tmp_path / "plain")
    choices: list[dict[str, Any]] = [{"quantize": "int8"}, {"experts": "offload"}]
    for options in choices:
        model = lab.load(tmp_path / "plain", **options)
        model.save_pretrained(tmp_path / "saved")
        assert "lm_head.weight" not in tensors_in(tmp_path / "saved")
        again = lab.load(tmp_path / "saved")
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(again(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


@pytest.mark.parametrize("format", ["mlx", "int4"])
def test_parameters_are_written_as_they_are_now(saved_as, format, tmp_path, random_ids):
    model = lab.load(saved_as(format))
    with torch.no_grad():
        model.text.embed_tokens.weight[7] += 1.0
        model.text.norm.weight.mul_(2.0)
    model.save_pretrained(tmp_path)
    again = lab.load(tmp_path)
    assert torch.equal(again.text.embed_tokens.weight, model.text.embed_tokens.weight)
    assert torch.equal(again(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


def test_scales_of_activations_and_the_file_beside_the_config_are_kept(saved_as, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(saved_as("modelopt fp8"), source)
    (source / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    model = lab.load(source, experts="offload")
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert (tmp_path / "saved/hf_quant_config.json").read_bytes() == (source / "hf_quant_config.json").read_bytes()
    assert any(name.endswith("input_scale") for name in tensors_in(tmp_path / "saved"))
    # Over a model of numbers they would be wrong.
    lab.load().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/hf_quant_config.json").exists()
    assert not (tmp_path / "saved/model.safetensors.index.json").exists()
    lab.load(tmp_path / "saved")


@pytest.mark.parametrize(("format", "experts"), [("int4", "resident"), ("modelopt nvfp4", "offload")])
def test_shards_are_no_larger_than_asked_and_the_index_knows_them(saved_as, format, experts, tmp_path):
    model = lab.load(saved_as(format), experts=experts)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        tensors = load_file(file)
        assert set(tensors) == {name for name, own in index["weight_map"].items() if own == file.name}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 60_000
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_in(tmp_path).values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())


def test_weights_packed_in_other_files_are_written_as_numbers(saved_as, tmp_path, monkeypatch, image_batch, random_ids):
    monkeypatch.setattr(saving, "Shards", type(None))
    for experts in ("resident", "offload"):
        model = lab.load(saved_as("int4"), dtype="bfloat16", experts=experts)
        model.save_pretrained(tmp_path)
        again = lab.load(tmp_path, dtype="auto")
        assert not [module for module in again.modules() if isinstance(module, PackedLinear)]
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert again.state_dict().keys() == model.state_dict().keys()
        ours, theirs = model.state_dict(), again.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_state_dict_holds_every_number_and_saves_a_packed_model_as_numbers(saved_as, tmp_path):
    for experts in ("resident", "offload"):
        model = lab.load(saved_as("int4"), experts=experts)
        state = model.state_dict()
        new: Any = type(model)
        assert state.keys() == new(model.config).state_dict().keys()
        model.save_pretrained(tmp_path, state_dict=state)
        stored = tensors_in(tmp_path)
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[name], stored[name]) for name in state)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_packed_model_is_saved_like_it(saved_as, how, tmp_path, image_batch, random_ids):
    model = lab.load(saved_as("int4"))
    copied = COPIES[how](model)
    assert_same_model(copied, model, image_batch, random_ids)
    copied.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "model")
    assert_same_tensors(tensors_in(tmp_path / "copy"), tensors_in(tmp_path / "model"))


def test_weights_that_accelerate_took_out_of_the_model_are_written(saved_as, tmp_path, image_batch, random_ids):
    model = lab.load(saved_as("int4"))
    kept = lab.load(saved_as("int4"))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert_same_model(lab.load(tmp_path), kept, image_batch, random_ids)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"safe_serialization": False}, ValueError, "safetensors files only"),
        ({"max_shard_sise": "1GB"}, TypeError, "no option 'max_shard_sise'; near misses: max_shard_size"),
        ({"variant": "fp16"}, ValueError, "variant='fp16' was given; a packed or offloaded model is saved without"),
        ({"push_to_hub": True}, ValueError, "Save to a folder first"),
        ({"max_shard_size": "much"}, ValueError, "'much' is not a size"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(saved_as, tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        lab.load(saved_as("int4")).save_pretrained(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_other_processes_write_nothing(saved_as, tmp_path):
    lab.load(saved_as("int4")).save_pretrained(tmp_path, is_main_process=False, safe_serialization=True)
    assert not list(tmp_path.iterdir())
