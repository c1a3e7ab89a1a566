"""Quantized checkpoints that lack something or contradict themselves are refused with file and tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llama4lab as lab
from llama4lab.cli import app

FORMATS = {
    "int4": ("weight_packed", "weight_scale", "weight_shape"),
    "int4 with zero points": ("weight_zero_point", "weight_scale"),
    "fp8 by row": ("weight", "weight_scale"),
    "fp8 by block": ("weight", "weight_scale"),
    "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "nf4, nested": ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.quant_state"),
    "modelopt fp8": ("weight", "weight_scale"),
    "modelopt nvfp4": ("weight", "weight_scale", "weight_scale_2"),
    "mlx": ("weight", "scales", "biases"),
}
CASES = [(format, part) for format, parts in FORMATS.items() for part in parts]
OPTIONAL = {"weight_shape", "weight_zero_point"}


@pytest.fixture
def damaged(saved_as, tmp_path):
    """A checkpoint of a format of which one tensor was changed by a function, or taken away where that gives None."""

    def make(format, part, change):
        shutil.copytree(saved_as(format), tmp_path / "damaged")
        tensors = load_file(tmp_path / "damaged" / "model.safetensors")
        name = next(n for n in sorted(tensors) if "feed_forward" in n and f"_proj.{part}" in n + "." and ends(n, part))
        tensor = change(tensors.pop(name))
        save_file(tensors | ({} if tensor is None else {name: tensor}), tmp_path / "damaged" / "model.safetensors")
        return tmp_path / "damaged", name

    return make


def ends(name: str, part: str) -> bool:
    return name.endswith(f"_proj.{part}") or name.endswith(f"_proj.{part}.bitsandbytes__nf4")


@pytest.mark.parametrize(("format", "part"), [case for case in CASES if case[1] not in OPTIONAL])
def test_a_part_that_is_missing_is_named(damaged, format, part):
    folder, name = damaged(format, part, lambda tensor: None)
    base = name.partition("_proj.")[0]
    with pytest.raises(ValueError, match=r"stored without|cannot be read|lacks") as error:
        lab.load(folder)
    assert base in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(("format", "part"), [case for case in CASES if case[1] != "weight.quant_state"])
def test_a_part_of_another_shape_is_named(damaged, format, part):
    folder, name = damaged(format, part, lambda tensor: torch.stack([tensor.flatten()[:1]] * 3).repeat(3, 5))
    with pytest.raises(ValueError, match=r"shape|cannot be read|divide|says|config") as error:
        lab.load(folder)
    assert str(folder) in str(error.value)
    assert name.partition("_proj.")[0] in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("format", "part"), [("int4", "weight_scale"), ("modelopt nvfp4", "weight_scale_2"), ("mlx", "biases")]
)
def test_a_scale_that_is_no_number_is_named(damaged, format, part, value):
    folder, name = damaged(format, part, lambda tensor: torch.full_like(tensor, value))
    with pytest.raises(ValueError, match="holds values that are NaN or infinite") as error:
        lab.load(folder)
    assert name in str(error.value)


def test_a_float8_that_is_no_number_is_named(damaged):
    folder, name = damaged("fp8 by row", "weight", lambda tensor: torch.full_like(tensor, float("nan")))
    with pytest.raises(ValueError, match="holds values that are NaN or infinite") as error:
        lab.load(folder)
    assert name in str(error.value)


@pytest.mark.parametrize("state", [b"{}", b"nonsense", b'{"quant_type": "int9", "blocksize": 64, "shape": [1, 2]}'])
def test_a_quant_state_that_bitsandbytes_does_not_write_is_named(damaged, state):
    new = torch.tensor(list(state), dtype=torch.uint8)
    folder, name = damaged("nf4", "weight.quant_state", lambda tensor: new)
    with pytest.raises(ValueError, match="quant_state") as error:
        lab.load(folder)
    assert name.partition(".weight")[0] in str(error.value)


def test_a_scale_that_nobody_reads_is_refused(saved_as, tmp_path):
    shutil.copytree(saved_as("int4"), tmp_path / "extra")
    tensors = load_file(tmp_path / "extra" / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight_scale"
    save_file(tensors | {name: torch.ones(128, 1)}, tmp_path / "extra" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} shows weights quantized with"):
        lab.load(tmp_path / "extra")


def test_info_tells_how_matrices_are_stored(saved_as):

    shown = CliRunner().invoke(app, ["info", str(saved_as("int4"))]).output
    assert "unfused experts" in shown
    assert "quantized as int4, groups of 128 (" in shown
    assert json.loads((saved_as("int4") / "config.json").read_text())["quantization_config"]
