"""What quantize= rounded and was saved, as transformers and compressed-tensors read it."""

import json
from contextlib import suppress

import pytest
import torch
from torch import nn
from transformers import CompressedTensorsConfig, Llama4ForConditionalGeneration

import llama4lab as lab


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_settings_name_every_linear_module_that_stays_as_it_is(plain, method, tmp_path):
    model = lab.load(plain, quantize=method)
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(settings["ignore"]) == linear
    assert any("router" in name for name in linear)
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["quantization_status"] == "compressed"


def dense_in(model):
    """The numbers of transformers' model, experts of a layer together as in ours."""
    state, found = model.state_dict(), {}
    for name, tensor in state.items():
        experts, is_expert, rest = name.partition(".experts.")
        if is_expert and rest.endswith(".weight"):
            found.setdefault(experts, {})[rest.removesuffix(".weight")] = tensor
        elif not is_expert and not name.endswith(("weight_scale", "weight_shape")):
            found[name] = tensor
    for layer in [name for name in found if isinstance(found[name], dict)]:
        own = found.pop(layer)
        each = range(len(own) // 3)
        gate_up = [torch.cat([own[f"{expert}.gate_proj"], own[f"{expert}.up_proj"]]).T for expert in each]
        found[f"{layer}.experts.gate_up_proj"] = torch.stack(gate_up)
        found[f"{layer}.experts.down_proj"] = torch.stack([own[f"{expert}.down_proj"].T for expert in each])
    return found


@pytest.mark.parametrize(("method", "dequantize"), [("int8", True), ("int4", True), ("int4", False), ("fp8", True)])
@pytest.mark.filterwarnings("ignore")
def test_transformers_and_compressed_tensors_read_the_same_numbers(plain, method, dequantize, tmp_path, random_ids):
    pytest.importorskip("compressed_tensors")
    model = lab.load(plain, quantize=method, dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    settings = CompressedTensorsConfig(dequantize=dequantize)
    theirs = Llama4ForConditionalGeneration.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, quantization_config=settings
    )
    if not dequantize:
        with suppress(Exception):  # they unpack in their first pass, which transformers 5.24.0 does not get through
            theirs(random_ids(1, 4))
    ours, found = model.state_dict(), dense_in(theirs)
    assert ours.keys() == found.keys()
    assert [name for name in ours if not torch.equal(ours[name], found[name])] == []
