"""Quantized checkpoints are refused by the name of what wrote them, however they say it."""

import json

import pytest
import torch

from llama4lab.checkpoint.quantization import refuse_unread
from llama4lab.checkpoint.settings import read_config
from llama4lab.checkpoint.shards import Shards

LINEAR = "model.layers.0.feed_forward.experts.0.down_proj"
FUSED = "model.layers.0.feed_forward.experts.gate_up_proj"
FP8, U8, I32, F32 = torch.float8_e4m3fn, torch.uint8, torch.int32, torch.float32

# What each writer stores for one projection, and the name it must be refused by.
WRITERS = {
    "compressed-tensors int4": (
        {
            f"{LINEAR}.weight_packed": I32,
            f"{LINEAR}.weight_scale": torch.bfloat16,
            f"{LINEAR}.weight_shape": torch.int64,
        },
        "compressed-tensors",
    ),
    "compressed-tensors FP8": (
        {f"{LINEAR}.weight": FP8, f"{LINEAR}.weight_scale": torch.bfloat16},
        r"compressed-tensors or fbgemm \(FP8\)",
    ),
    "compressed-tensors NVFP4": (
        {f"{LINEAR}.weight_packed": U8, f"{LINEAR}.weight_scale": FP8, f"{LINEAR}.weight_global_scale": F32},
        "compressed-tensors",
    ),
    "bitsandbytes nf4": (
        {
            f"{LINEAR}.weight": U8,
            f"{LINEAR}.weight.absmax": U8,
            f"{LINEAR}.weight.quant_map": F32,
            f"{LINEAR}.weight.quant_state.bitsandbytes__nf4": U8,
        },
        "bitsandbytes",
    ),
    "bitsandbytes int8": ({f"{LINEAR}.weight": torch.int8, f"{LINEAR}.SCB": F32}, "bitsandbytes"),
    "modelopt FP8": ({FUSED: FP8, f"{FUSED}_weight_scale": F32, f"{FUSED}_input_scale": F32}, "modelopt"),
    "modelopt FP8, a Linear": (
        {f"{LINEAR}.weight": FP8, f"{LINEAR}.weight_scale": F32, f"{LINEAR}.input_scale": F32},
        "modelopt",
    ),
    "modelopt NVFP4": (
        {f"{LINEAR}.weight": U8, f"{LINEAR}.weight_scale": FP8, f"{LINEAR}.weight_scale_2": F32},
        "modelopt",
    ),
    "fbgemm": ({FUSED: FP8, f"{FUSED}_scale": F32}, "fbgemm"),
    "block-wise FP8": ({f"{LINEAR}.weight": FP8, f"{LINEAR}.weight_scale_inv": F32}, "block-wise FP8"),
    "GPTQ": ({f"{LINEAR}.qweight": I32, f"{LINEAR}.qzeros": I32, f"{LINEAR}.scales": torch.float16}, "GPTQ or AWQ"),
    "MLX": ({f"{LINEAR}.weight": torch.uint32, f"{LINEAR}.scales": torch.bfloat16}, "MLX"),
    "torchao": ({f"{LINEAR}._weight_qdata": torch.int8, f"{LINEAR}._weight_scale": F32}, "torchao"),
    "unknown": ({f"{LINEAR}.weight": FP8, f"{LINEAR}.row_scale": F32}, "an unknown quantizer"),
    "FP8 without a scale": ({f"{LINEAR}.weight": FP8}, r"stored as float8_e4m3fn, without a scale"),
    "bytes without a scale": ({f"{LINEAR}.weight": U8}, r"stored as uint8, without a scale"),
}


@pytest.mark.parametrize(("dtypes", "writer"), WRITERS.values(), ids=WRITERS.keys())
def test_quantized_tensors_are_refused_with_file_and_tensor(tmp_path, make, text_only, dtypes, writer):
    plain = make.tensors(text_only)
    quantized = {name: torch.zeros(2, 2).to(dtype) for name, dtype in dtypes.items()}
    shards = Shards(make.saved(tmp_path / "quantized", text_only, plain | quantized))
    with pytest.raises(ValueError, match=writer) as error:
        refuse_unread(shards, set())
    assert "model.safetensors: model.layers.0." in str(error.value)
    assert any(name in str(error.value) for name in quantized)
    assert len(str(error.value).splitlines()) == 2


def test_plain_tensors_of_any_float_dtype_are_not_refused(tmp_path, make, multimodal):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        tensors = {name: tensor.to(dtype) for name, tensor in make.tensors(multimodal).items()}
        refuse_unread(Shards(make.saved(tmp_path / str(dtype), multimodal, tensors)), set())


@pytest.mark.parametrize(
    ("key", "settings", "method"),
    [
        ("quantization_config", {"quant_method": "of tomorrow"}, "of tomorrow"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ("quantization_config", "fp8", "fp8"),
        ("quantization", {"group_size": 64}, "group_size"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_names_an_unknown_method_is_refused_with_it(tmp_path, multimodal, key, settings, method, nested):
    multimodal.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (document["text_config"] if nested else document)[key] = settings
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"config\.json: .*{key} says quantized with .*{method}"):
        read_config(tmp_path)


def test_a_quantization_config_of_null_is_none(tmp_path, multimodal):
    multimodal.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"quantization_config": None}))
    assert read_config(tmp_path).model_type == "llama4"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}}, "are rotated"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "stored sparse"),
    ],
)
def test_weights_that_need_more_than_a_scale_are_refused(tmp_path, multimodal, settings, found):
    multimodal.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"quantization_config": settings}))
    with pytest.raises(ValueError, match=found):
        read_config(tmp_path)


def test_a_file_beside_the_config_that_says_quantized_by_somebody_unknown_is_enough(tmp_path, multimodal):
    multimodal.save_pretrained(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "nobody"}, "quantization": {}}')
    with pytest.raises(ValueError, match=r"hf_quant_config\.json says quantized with nobody"):
        read_config(tmp_path)
