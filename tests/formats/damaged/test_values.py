"""Damage that shows only in values: raised when they are read, which for offloaded experts is when they are used."""

import gc
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import llama4lab as lab

MLP = "language_model.model.layers.1.feed_forward.experts"
IDS = torch.arange(1, 121).reshape(5, 24)  # enough for every expert to be routed to


def put_into(name, value):
    def change(tensors):
        wide = tensors[name].float().clone()
        wide.flatten()[0] = value
        tensors[name] = wide.to(tensors[name].dtype)

    return change


VALUES = {
    "int4": (f"{MLP}.2.up_proj.weight_scale", float("nan")),
    "fp8 by row": (f"{MLP}.2.up_proj.weight", float("nan")),
    "fp8 by block": (f"{MLP}.2.up_proj.weight_scale", float("inf")),
    "nvfp4": (f"{MLP}.2.up_proj.weight_scale", float("nan")),
    "nf4": (f"{MLP}.2.up_proj.weight.quant_map", float("nan")),
    "nf4, nested": (f"{MLP}.2.up_proj.weight.nested_absmax", float("inf")),
    "modelopt fp8": (f"{MLP}.gate_up_proj_weight_scale", float("nan")),
    "modelopt nvfp4": (f"{MLP}.gate_up_proj_weight_scale_2", -1.0),
    "plain, unfused": (f"{MLP}.2.up_proj.weight", float("nan")),
}


@pytest.mark.parametrize(("format", "damage"), VALUES.items(), ids=VALUES)
def test_a_value_that_is_no_number_is_named_while_loading(damaged, format, damage):
    damaged.refusal(damaged.copy(format, put_into(*damage)), damage[0])


@pytest.mark.parametrize(("format", "damage"), VALUES.items(), ids=VALUES)
def test_an_offloaded_expert_that_holds_no_numbers_is_named_when_it_is_read(damaged, format, damage):
    folder = damaged.copy(format, put_into(*damage))
    model = lab.load(folder, experts="offload")
    with pytest.raises(ValueError, match=r"damaged") as error:
        [bank_of(model, 1)[expert] for expert in range(4)]
    assert str(folder / "model.safetensors") in str(error.value)
    assert damage[0] in str(error.value)


def bank_of(model, layer) -> Any:
    return model.text.layers[layer].feed_forward.experts.gate_up_proj


def hooks(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_a_pass_over_a_damaged_expert_leaves_no_hook_and_the_other_layers_usable(damaged):
    name, value = VALUES["int4"]
    good, bad = (lab.load(damaged.copy("int4", change), experts="offload") for change in (None, put_into(name, value)))
    before = hooks(bad)
    with pytest.raises(ValueError, match="weight_scale holds values that are NaN"):
        lab.record(bad, IDS, "layers.*.resid_post")
    assert hooks(bad) == before
    for layer in (1, 3):
        for expert in range(4):
            if (layer, expert) != (1, 2):
                assert torch.equal(bank_of(good, layer)[expert], bank_of(bad, layer)[expert])


def test_refusals_leave_no_file_open_and_no_page_mapped(damaged):
    folder = damaged.copy("int4", put_into(*VALUES["int4"]))
    damaged.refusal(folder)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        damaged.refusal(folder)
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) <= before


class WritesAFile:
    """What a hostile pickle does when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "model.ckpt"])
@pytest.mark.parametrize("saved", ["torch", "old torch", "pickle"])
def test_no_pickle_is_run(damaged, tmp_path, name, saved):
    folder, trap = damaged.copy("int4"), tmp_path / "trap"
    (folder / "model.safetensors").unlink()
    if saved == "pickle":
        (folder / name).write_bytes(pickle.dumps({"a": WritesAFile(trap)}))
    else:
        torch.save({"a": WritesAFile(trap)}, folder / name, _use_new_zipfile_serialization=saved == "torch")
    damaged.refusal(folder, "pickle")
    assert not trap.exists()
