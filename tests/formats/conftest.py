"""Small checkpoints in the layouts that are in use, written with the formats' own libraries where there are any."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MLPS = re.compile(r"layers\.\d+\.feed_forward\.((shared_expert|experts\.\d+)\.)?(gate|up|down)_proj$")
TEXT_LINEARS = re.compile(r"layers\.\d+\.(self_attn|feed_forward\.(?!router))")
BANK = re.compile(r"\.experts\.(gate_up|down)_proj$")
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256, "head_dim": 32}
SIZES |= {"num_hidden_layers": 4, "num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 8}

Tensors = dict[str, Tensor]


@dataclass
class Written:
    """What a format stores for a matrix, and the numbers that its own library makes of that (None without one)."""

    parts: Tensors
    numbers: Tensor | None = None


Write = Callable[[Tensor], Written]


def compressed_tensors(scheme: str, format: str) -> Write:
    """Writes with compressed-tensors' own compressors; scales as its observers make them."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    compressor = pytest.importorskip("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(format)
    settings = quantization.preset_name_to_scheme(scheme, ["Linear"])
    weights = settings.weights

    def write(values: Tensor) -> Written:
        values = values.bfloat16()
        rows, columns = values.shape
        side = [rows, columns] if weights.strategy == "block" else [1, weights.group_size or columns]
        if weights.strategy == "block":
            side = list(weights.block_structure)
        padded = torch.nn.functional.pad(values, (0, -columns % side[1], 0, -rows % side[0]))
        split = padded.unflatten(1, (-1, side[1])).unflatten(0, (-1, side[0]))
        state: Tensors = {"weight": values}
        if scheme == "NVFP4":
            whole = 448.0 * 6.0 / values.float().abs().max().reshape(1)
            state |= {"weight_global_scale": whole, "weight_scale": split.float().abs().amax((1, 3)) / 6 * whole}
        else:
            scale, zero = helpers.calculate_qparams(split.amin((1, 3)), split.amax((1, 3)), weights)
            state |= {"weight_scale": scale.bfloat16()} | ({} if weights.symmetric else {"weight_zero_point": zero})
        stored = {name: part for name, part in compressor.compress(dict(state), settings).items() if part is not None}
        return Written(stored, compressor.decompress(dict(stored), settings)["weight"])

    return write


def bitsandbytes(kind: str, nested: bool) -> Write:
    """Writes with bitsandbytes' own functions."""
    functional = pytest.importorskip("bitsandbytes.functional")

    def write(values: Tensor) -> Written:
        stored, state = functional.quantize_4bit(values.bfloat16(), quant_type=kind, compress_statistics=nested)
        parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        return Written({"weight": stored} | parts, functional.dequantize_4bit(stored, state))

    return write


def modelopt_fp8(values: Tensor) -> Written:
    """One scale for the whole tensor, here of any number of axes."""
    scale = values.abs().max().float() / 448
    stored = (values.float() / scale).to(torch.float8_e4m3fn)
    return Written({"weight": stored, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, stored.float() * scale)


def modelopt_nvfp4(values: Tensor) -> Written:
    """A matrix [.., in]; what is packed, and grouped by 16, is the last axis."""
    whole = values.abs().max().float() / (6 * 448)
    groups = values.float().unflatten(-1, (-1, 16))
    scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    wide = scale.float()[..., None] * whole
    nearest = (groups.abs() / wide).flatten(-2)[..., None].sub(FP4).abs().argmin(-1)
    codes = (nearest + 8 * (groups.flatten(-2) < 0)).to(torch.uint8)
    numbers = (FP4[nearest] * torch.where(groups.flatten(-2) < 0, -1.0, 1.0)).unflatten(-1, (-1, 16)) * wide
    parts = {"weight": codes[..., ::2] | codes[..., 1::2] << 4, "weight_scale": scale, "weight_scale_2": whole}
    return Written(parts | {"input_scale": torch.tensor(0.5)}, numbers.flatten(-2))


def mlx(bits: int) -> Write:
    """Affine integers in groups of 64; axes before the last two are kept."""

    def write(values: Tensor) -> Written:
        groups = values.float().unflatten(-1, (-1, 64))
        low = groups.amin(-1).bfloat16()
        scale = ((groups.amax(-1) - low.float()) / (2**bits - 1)).bfloat16()
        wide, bias = scale.float()[..., None], low.float()[..., None]
        codes = ((groups - bias) / wide).round().clamp(0, 2**bits - 1)
        each = codes.flatten(-2).long().unflatten(-1, (-1, 32 // bits))
        words = (each << torch.arange(0, 32, bits)).sum(-1).to(torch.uint32)
        return Written({"weight": words, "scales": scale, "biases": low}, (codes * wide + bias).flatten(-2))

    return write


def fp8_rows(values: Tensor, axis: int = -1) -> Written:
    """A scale for each row, which lies along an axis."""
    scale = (values.float().abs().amax(axis, keepdim=True) / 448).clamp(min=1e-12)
    stored = (values.float() / scale).to(torch.float8_e4m3fn)
    return Written({"weight": stored, "weight_scale": scale}, stored.float() * scale)


def unfused(state: Tensors, write: Write, which: re.Pattern) -> Tensors:
    """A state with experts one by one, and some of its matrices written in a format."""
    split: Tensors = {}
    for name, tensor in state.items():
        found = BANK.search(name)
        if found is None:
            split[name] = tensor
            continue
        experts = name[: found.start()] + ".experts"
        for number, own in enumerate(tensor.mT):
            parts = {"down": own} if found[1] == "down" else dict(zip(("gate", "up"), own.chunk(2), strict=True))
            split |= {f"{experts}.{number}.{part}_proj.weight": each for part, each in parts.items()}
    made: Tensors = {}
    for name, tensor in split.items():
        base = name.removesuffix(".weight")
        if tensor.ndim == 2 and which.search(base):
            made |= {f"{base}.{part}": each for part, each in write(tensor).parts.items()}
        else:
            made[name] = tensor
    return made


def fused(state: Tensors, linear: Write, bank: Callable[[Tensor], Tensors], which: re.Pattern) -> Tensors:
    """A state whose experts stay together, with scales whose names begin like theirs."""
    made: Tensors = {}
    for name, tensor in state.items():
        base = name.removesuffix(".weight")
        if BANK.search(name):
            made |= {name + end: part for end, part in bank(tensor).items()}
        elif tensor.ndim == 2 and which.search(base):
            made |= {f"{base}.{part}": each for part, each in linear(tensor).parts.items()}
        else:
            made[name] = tensor
    return made


def _modelopt_bank(write: Write, packed: bool) -> Callable[[Tensor], Tensors]:
    def bank(values: Tensor) -> Tensors:
        parts = write(values.mT if packed else values).parts
        turned = {name: part.mT.contiguous() if part.ndim == 3 else part for name, part in parts.items()}
        ends = {"weight": "", "weight_scale": "_weight_scale", "weight_scale_2": "_weight_scale_2"}
        ends |= {"input_scale": "_input_scale"}
        return {ends[name]: (turned if packed else parts)[name] for name in parts}

    return bank


def _fbgemm_bank(values: Tensor) -> Tensors:
    found = fp8_rows(values, 1).parts
    # The scales of the second projection are stored as a column.
    scale = found["weight_scale"].mT.contiguous() if values.shape[1] == 128 and values.shape[2] == 128 else None
    return {"": found["weight"], "_scale": found["weight_scale"] if scale is None else scale}


def _stacked(state: Tensors) -> Tensors:
    """MLX: experts of a projection in one tensor, embeddings, head and router packed too, no vision."""
    made: Tensors = {}
    for name, tensor in state.items():
        found = BANK.search(name)
        if name.startswith(("vision_model", "multi_modal")):
            continue
        own = {name.removesuffix(".weight"): tensor}
        if found:
            experts = name[: found.start()] + ".experts"
            turned = tensor.mT
            halves = [turned] if found[1] == "down" else list(turned.chunk(2, dim=1))
            own = {f"{experts}.{part}_proj": half for part, half in zip(_names(found[1]), halves, strict=True)}
        for base, each in own.items():
            if each.ndim > 1:
                made |= {f"{base}.{part}": value for part, value in mlx(4)(each).parts.items()}
            else:
                made[name] = each
    return made


def _names(projection: str) -> tuple[str, ...]:
    return ("down",) if projection == "down" else ("gate", "up")


CT = {"quant_method": "compressed-tensors", "config_groups": {}}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
MODELOPT = {"quant_method": "modelopt"}


def _mlps(scheme: str, format: str) -> Callable[[Tensors], Tensors]:
    return lambda state: unfused(state, compressed_tensors(scheme, format), MLPS)


def _all(kind: str, nested: bool) -> Callable[[Tensors], Tensors]:
    return lambda state: unfused(state, bitsandbytes(kind, nested), TEXT_LINEARS)


def _whole(write: Write, packed: bool) -> Callable[[Tensors], Tensors]:
    return lambda state: fused(state, write, _modelopt_bank(write, packed), TEXT_LINEARS)


WRITERS: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "plain, unfused": ({}, lambda state: unfused(state, lambda values: Written({"weight": values}), MLPS)),
    "int4": (CT, _mlps("W4A16", "pack-quantized")),
    "int4 with zero points": (CT, _mlps("W4A16_ASYM", "pack-quantized")),
    "int8": (CT, _mlps("W8A16", "pack-quantized")),
    "int8 by row": (CT, _mlps("W8A8", "int-quantized")),
    "fp8 by row": (CT, _mlps("FP8_DYNAMIC", "float-quantized")),
    "fp8 by block": (CT, _mlps("FP8_BLOCK", "float-quantized")),
    "nvfp4": (CT, _mlps("NVFP4", "nvfp4-pack-quantized")),
    "nf4, nested": (BNB, _all("nf4", True)),
    "nf4": (BNB, _all("nf4", False)),
    "fp4": (BNB, _all("fp4", True)),
    "modelopt fp8": (MODELOPT, _whole(modelopt_fp8, False)),
    "modelopt nvfp4": (MODELOPT, _whole(modelopt_nvfp4, True)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, lambda state: fused(state, fp8_rows, _fbgemm_bank, TEXT_LINEARS)),
    "mlx": ({"group_size": 64, "bits": 4, "mode": "affine"}, _stacked),
}
MATRICES: dict[str, Callable[[], Write]] = {
    "int4": lambda: compressed_tensors("W4A16", "pack-quantized"),
    "int4 with zero points": lambda: compressed_tensors("W4A16_ASYM", "pack-quantized"),
    "int8": lambda: compressed_tensors("W8A16", "pack-quantized"),
    "int8 by row": lambda: compressed_tensors("W8A8", "int-quantized"),
    "fp8 by row": lambda: compressed_tensors("FP8_DYNAMIC", "float-quantized"),
    "fp8 by block": lambda: compressed_tensors("FP8_BLOCK", "float-quantized"),
    "nvfp4": lambda: compressed_tensors("NVFP4", "nvfp4-pack-quantized"),
    "nf4, nested": lambda: bitsandbytes("nf4", True),
    "nf4": lambda: bitsandbytes("nf4", False),
    "fp4": lambda: bitsandbytes("fp4", True),
    "modelopt fp8": lambda: modelopt_fp8,
    "modelopt nvfp4": lambda: modelopt_nvfp4,
    "fp8 rows": lambda: fp8_rows,
    "mlx 4": lambda: mlx(4),
    "mlx 8": lambda: mlx(8),
}


@pytest.fixture(scope="session", params=MATRICES)
def write(request) -> Write:
    """Writes one matrix in each format."""
    return MATRICES[request.param]()


@pytest.fixture(scope="session", params=WRITERS)
def format(request) -> str:
    """The name of each format of a checkpoint."""
    return request.param


@pytest.fixture(scope="session")
def saved_as(tmp_path_factory, new_model) -> Callable[[str], Path]:
    """A checkpoint in a format of `WRITERS`, with random weights; "mlx" has no vision, though its model had."""
    made: dict[str, Path] = {}

    def save(format: str) -> Path:
        if format in made:
            return made[format]
        settings, write = WRITERS[format]
        model = new_model(**SIZES)
        folder = tmp_path_factory.mktemp("format")
        model.bfloat16().save_pretrained(folder)
        state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        save_file({n: t.contiguous().clone() for n, t in write(state).items()}, folder / "model.safetensors")
        document = json.loads((folder / "config.json").read_text())
        if settings:
            document["quantization_config"] = settings
        if format == "mlx":  # it leaves out the settings of what it leaves out
            document["quantization"] = document["quantization_config"]
            del document["vision_config"]
        (folder / "config.json").write_text(json.dumps(document))
        made[format] = folder
        return folder

    return save


@pytest.fixture(params=["fused", "unfused"])
def plain(request, new_model, saved_as, tmp_path):
    """A checkpoint of numbers, with sizes that groups of 128 divide."""
    if request.param == "unfused":
        return saved_as("plain, unfused")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256}
    new_model(dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"
