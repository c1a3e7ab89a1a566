"""Rounding to 8 or 4 bits while a plain checkpoint is loaded."""

import pytest
import torch
from torch import nn

import llama4lab as lab
from llama4lab.model.expert_bank import ExpertBank
from llama4lab.model.packed_linear import PackedLinear

METHODS = [("int8", 0.01), ("int4", 0.13), ("fp8", 0.035)]


@pytest.fixture(params=["fused", "unfused"])
def folder(request, new_model, saved_as, tmp_path):
    if request.param == "unfused":
        return saved_as("plain, unfused")
    new_model(dtype=torch.bfloat16, hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("method", "error"), METHODS)
def test_experts_and_mlps_are_rounded_and_nothing_else(folder, method, error):
    plain, rounded = lab.load(folder), lab.load(folder, quantize=method)
    others = dict(rounded.named_modules())
    seen = set()
    for name, module in plain.named_modules():
        other = others[name]
        if isinstance(other, PackedLinear):
            assert "feed_forward" in name
            assert "router" not in name
            assert 0 < (other.weight - module.get_parameter("weight")).norm() < error * other.weight.norm()
            seen.add(name.rpartition(".")[2])
        elif isinstance(module, nn.Linear):
            assert torch.equal(other.get_parameter("weight"), module.weight), name
        elif isinstance(bank := getattr(other, "gate_up_proj", None), ExpertBank):
            for expert, numbers in enumerate(module.get_parameter("gate_up_proj")):
                assert 0 < (bank[expert] - numbers).norm() < error * numbers.norm()
            seen.add("bank")
    assert seen == {"bank", "gate_proj", "up_proj", "down_proj"}


@torch.no_grad()
@pytest.mark.parametrize(("method", "error"), METHODS)
def test_the_logits_stay_near(folder, method, error, image_batch):
    batch = image_batch([[2], [1]])
    plain, rounded = lab.load(folder)(**batch).logits, lab.load(folder, quantize=method)(**batch).logits
    valid = batch["attention_mask"].bool()
    difference = (rounded - plain)[valid].norm() / plain[valid].norm()
    # An expert that is another one now changes much; so few tokens may show none.
    assert 0 < difference < 10 * error


def test_tiny_answers_as_before_in_eight_bits():
    prompts = ["The capital of France is", "When Mary and John went to the store, John gave a drink to", "print("]
    plain, rounded = lab.load(), lab.load(quantize="int8")
    for text in prompts:
        best = [lab.record(model, text, at="embed").logits[0, -1].argmax().item() for model in (plain, rounded)]
        assert best[0] == best[1]


def test_what_is_packed_already_is_not_rounded(saved_as, folder):
    with pytest.raises(ValueError, match=r"tensors of .* are quantized already"):
        lab.load(saved_as("modelopt fp8"), quantize="int8")
    with pytest.raises(ValueError, match="quantize='int3' is not a method; choose from int8, int4, fp8"):
        lab.load(folder, quantize="int3")


def test_tables_of_weights_read_packed_experts(folder):
    packed = lab.load(folder, quantize="int8")
    first, second = (lab.tables.routing.similarity(model, "weights") for model in (lab.load(folder), packed))
    assert abs(first["cosine"] - second["cosine"]).max() < 0.02
