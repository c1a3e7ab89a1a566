"""Quantized checkpoints whose tensors and settings contradict each other; and those that only seem to."""

import json

import pytest
import torch
from safetensors.torch import save_file

MLP = "language_model.model.layers.1.feed_forward"
EXPERT = f"{MLP}.experts.1.down_proj"
BANK = f"{MLP}.experts.down_proj"


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def each(change, *names):
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous().clone() for name in names})


def without(end):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(end)]


def saying(**settings):
    return lambda document: document["quantization_config"].update(settings)


def grouped(**weights):
    return lambda document: document["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights)


# Format, change to the tensors, change to config.json, and what the refusal must hold besides the folder.
REFUSED = {
    "no scale beside int8": ("int8 by row", without("_scale"), None, ("gate_proj.weight", "weight_scale")),
    "no scale beside float8": ("fp8 by row", without("_scale"), None, ("gate_proj.weight", "weight_scale")),
    "bytes without anything": ("nf4", without(("absmax", "quant_map", "__nf4")), None, ("proj.weight", "uint8")),
    "one expert without a scale": ("fp8 by row", without(f"{EXPERT}.weight_scale"), None, (f"{EXPERT}.weight_scale",)),
    "one expert without zero points": (
        "int4 with zero points",
        without(f"{EXPERT}.weight_zero_point"),
        None,
        (f"{EXPERT}.weight_packed", "weight_zero_point", "symmetric"),
    ),
    "one expert without anything": ("int4", without((f"{EXPERT}.weight_packed", f"{EXPERT}.weight_scale")), None, ()),
    "a scale that nobody reads": (
        "int4",
        put(f"{MLP}.experts.9.down_proj.weight_scale", torch.ones(128, 1)),
        None,
        (f"{MLP}.experts.9.down_proj.weight_scale",),
    ),
    "a scale beside plain numbers": (
        "int4",
        put("vision_model.model.layers.0.mlp.fc1.weight_scale", torch.ones(128, 1)),
        None,
        ("fc1.weight_scale",),
    ),
    "groups that do not divide": ("int4", put(f"{EXPERT}.weight_scale", torch.ones(128, 3)), None, ("3 groups",)),
    "a negative column": (
        "int4",
        put(f"{EXPERT}.weight_g_idx", torch.full((128,), -1, dtype=torch.int32)),
        None,
        (f"{EXPERT}.weight_g_idx", "between 0 and 0"),
    ),
    "a column beyond the groups": (
        "int4",
        put(f"{EXPERT}.weight_g_idx", torch.ones(128, dtype=torch.int32)),
        None,
        (f"{EXPERT}.weight_g_idx", "between 0 and 0"),
    ),
    "a shape that lies": (
        "int4",
        put(f"{EXPERT}.weight_shape", torch.tensor([127, 128])),
        None,
        (f"{EXPERT}.weight_shape", "[127, 128]"),
    ),
    "zero points that are not packed": (
        "int4 with zero points",
        put(f"{EXPERT}.weight_zero_point", torch.zeros(128, 1, dtype=torch.int8)),
        None,
        (f"{EXPERT}.weight_zero_point", "[16, 1]"),
    ),
    **{
        f"a scale of the tensor that is {value}": (
            "nvfp4",
            put(f"{EXPERT}.weight_global_scale", torch.tensor([value])),
            None,
            (f"{EXPERT}.weight_global_scale",),
        )
        for value in (0.0, -1.0, float("nan"), float("inf"), 1e-40)
    },
    "a negative scale of all experts": (
        "modelopt nvfp4",
        put(f"{MLP}.experts.down_proj_weight_scale_2", torch.tensor(-1.0)),
        None,
        ("down_proj_weight_scale_2", "-1.0"),
    ),
    "a scale of one expert for all": (
        "modelopt nvfp4",
        each(lambda scale: scale[:1], f"{MLP}.experts.down_proj_weight_scale"),
        None,
        ("down_proj_weight_scale", "4 experts"),
    ),
    "a stacked expert too few": ("mlx", each(lambda part: part[:3], f"{BANK}.scales"), None, (f"{BANK}.scales",)),
    "a stacked expert too many": (
        "mlx",
        each(lambda part: part[[0, 1, 2, 3, 3]], f"{BANK}.weight", f"{BANK}.scales", f"{BANK}.biases"),
        None,
        (f"{BANK}.weight", "4 experts"),
    ),
    "other bits in config.json": ("int8", None, grouped(num_bits=4), ("weight_packed", "config.json", "int4")),
    "other groups in config.json": ("int4", None, grouped(group_size=64), ("weight_scale", "config.json")),
    "rows by config.json, blocks in the file": ("fp8 by block", None, grouped(strategy="channel"), ("weight_scale",)),
    "other blocks in config.json": ("fp8 by block", None, grouped(block_structure=[64, 64]), ("weight_scale",)),
    "zero points by config.json": ("int4", None, grouped(symmetric=False), ("weight_packed", "weight_zero_point")),
    "an unknown method": ("int4", None, saying(quant_method="gptq"), ("config.json", "gptq")),
    "a method that is a list": ("int4", None, saying(quant_method=["gptq"]), ("config.json", "gptq")),
    "rotated weights": ("int4", None, saying(transform_config={"R1": {}}), ("config.json", "transform_config")),
    "sparse weights": ("int4", None, saying(sparsity_config={"format": "sparse-24"}), ("config.json", "sparse-24")),
    "more experts than a machine can name": (
        "plain, unfused",
        None,
        lambda document: document["text_config"].update(
            num_local_experts=65_536, num_hidden_layers=1024, no_rope_layers=None, layer_types=None, moe_layers=None
        ),
        ("config.json", "num_local_experts"),
    ),
    "other sizes in config.json": (
        "fp8 by row",
        None,
        lambda document: document["text_config"].update(intermediate_size=64),
        ("shape", "[64,"),
    ),
}
SETTINGS = {
    "none": lambda document: document.pop("quantization_config", None),
    "the method alone": lambda document: document.update(quantization_config={"quant_method": "compressed-tensors"}),
    "those of Hugging Face's own": lambda document: document.update(
        quantization_config={"quant_method": "bitsandbytes"}
    ),
    "groups of nothing": lambda document: document.update(
        quantization_config={"quant_method": "compressed-tensors", "config_groups": {"a": None, "b": {"weights": 7}}}
    ),
}


@pytest.mark.parametrize(("format", "tensors", "settings", "names"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_itself_is_refused_before_there_is_a_model(damaged, format, tensors, settings, names):
    damaged.refusal(damaged.copy(format, tensors, settings), *names)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("format", ["int4 with zero points", "fp8 by block"])
def test_packed_tensors_are_read_whatever_config_does_not_say(damaged, format, settings):
    good = damaged.numbers(damaged.copy(format))
    found = damaged.numbers(damaged.copy(format, None, settings))
    assert all(torch.equal(found[name], tensor) for name, tensor in good.items())


def test_plain_tensors_are_read_though_config_says_quantized(damaged):
    good = damaged.numbers(damaged.copy("plain, unfused"))
    said = damaged.settings("int4")["quantization_config"]
    folder = damaged.copy("plain, unfused", None, lambda document: document.update(quantization_config=said))
    assert all(torch.equal(tensor, good[name]) for name, tensor in damaged.numbers(folder).items())


@pytest.mark.parametrize("other", ["nf4", "fp8 by row", "nvfp4", "plain, unfused"])
def test_an_expert_in_another_scheme_than_its_neighbours_has_its_own_numbers(damaged, other):
    theirs = damaged.numbers(damaged.copy(other))
    ours = damaged.numbers(damaged.copy("int4"))

    def mixed(tensors):
        without_expert = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{EXPERT}.")}
        own = {name: tensor for name, tensor in damaged.tensors(other).items() if name.startswith(f"{EXPERT}.")}
        tensors.clear()
        tensors.update(without_expert | own)

    found = damaged.numbers(damaged.copy("int4", mixed))
    bank = f"{MLP}.experts.down_proj"
    assert not torch.equal(ours[bank][1], theirs[bank][1])
    for expert in range(4):
        assert torch.equal(found[bank][expert], (theirs if expert == 1 else ours)[bank][expert])
    assert all(torch.equal(tensor, ours[name]) for name, tensor in found.items() if name != bank)


@pytest.fixture
def split(damaged):
    """A quantized checkpoint in two files: scales in the second."""

    def make(change=None):
        folder = damaged.copy("int4")
        tensors = damaged.tensors("int4")
        (folder / "model.safetensors").unlink()
        second = {name: tensor for name, tensor in tensors.items() if name.endswith("weight_scale")}
        files = {"model-1.safetensors": {n: t for n, t in tensors.items() if n not in second}}
        files["model-2.safetensors"] = second
        places = {name: file for file, own in files.items() for name in own}
        if change is not None:
            change(files, places)
        for file, own in files.items():
            save_file(own, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder

    return make


def test_scales_may_lie_in_another_file(damaged, split):
    good = damaged.numbers(damaged.copy("int4"))
    assert all(torch.equal(tensor, good[name]) for name, tensor in damaged.numbers(split()).items())


SCALE = f"{EXPERT}.weight_scale"
PLACED = {
    "in a file that is not there": (lambda files, places: places.update({SCALE: "model-3.safetensors"}), "model-3"),
    "in a file that does not hold it": (lambda files, places: places.update({SCALE: "model-1.safetensors"}), SCALE),
    "in both files": (lambda files, places: files["model-1.safetensors"].update({SCALE: torch.ones(128, 1)}), SCALE),
    "nowhere": (lambda files, places: places.pop(SCALE), SCALE),
}


@pytest.mark.parametrize(("change", "name"), PLACED.values(), ids=PLACED)
def test_a_scale_that_the_index_places_wrongly_is_refused(damaged, split, change, name):
    damaged.refusal(split(change), name)
