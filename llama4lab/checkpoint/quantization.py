"""Signs that a checkpoint is quantized. Reading such weights as plain numbers would give a model of noise."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama4lab.checkpoint.shards import Shards
from llama4lab.checkpoint.strict_json import read_json

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
CONFIG_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

# Names of tensors that only a quantized checkpoint has, and who writes them; the first that matches counts.
SIGNS = {
    r"\.quant_state\.|\.(nested_)?(absmax|quant_map)$|\.SCB$": "bitsandbytes",
    r"\._weight_(qdata|scale|zero_point)$": "torchao",
    r"_weight_scale(_2)?$|\.weight_scale_2$|\.input_scale$|_input_scale$|\.[kv]_scale$": "modelopt",
    r"\.weight_(packed|zero_point|shape|g_idx|global_scale)$|\.input_global_scale$": "compressed-tensors",
    r"\.weight_scale$": "compressed-tensors or fbgemm (FP8)",
    r"\.(gate_up|down)_proj_scale$|\.input_scale_ub$": "fbgemm (FP8)",
    r"\.weight_scale_inv$": "block-wise FP8",
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.(scales|biases)$": "MLX",
    r"scale(s|_inv)?$": "an unknown quantizer",
}


def refuse_quantized_config(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError when a config, or a file beside it, says that the weights are quantized."""
    sections = {"": config, "text_config.": config.get("text_config"), "vision_config.": config.get("vision_config")}
    for prefix, section in sections.items():
        for key in CONFIG_KEYS:
            if isinstance(section, Mapping) and section.get(key) is not None:
                settings = section[key]
                method = settings.get("quant_method", settings) if isinstance(settings, Mapping) else settings
                raise ValueError(_refusal(f"{file}: {prefix}{key} says quantized with {str(method)[:80]}"))
    for name in CONFIG_FILES:
        if (file.parent / name).is_file():
            producer = read_json(file.parent / name).get("producer")
            by = producer.get("name", "") if isinstance(producer, Mapping) else ""
            raise ValueError(_refusal(f"{file.parent / name} says quantized" + (f" with {by}" if by else "")))


def refuse_quantized_tensors(shards: Shards) -> None:
    """Raises ValueError when a tensor is a scale or the like, or is not stored in a plain floating-point dtype."""
    for sign, writer in SIGNS.items():
        for name in shards:
            if re.search(sign, name):
                raise ValueError(_refusal(f"{shards.file(name)}: {name} shows weights quantized with {writer}"))
    for name in shards:
        dtype = shards.spec(name).dtype
        if dtype not in PLAIN_DTYPES:
            found = f"{shards.file(name)}: {name} is stored as {str(dtype).removeprefix('torch.')}, without a scale"
            raise ValueError(_refusal(found))


def _refusal(found: str) -> str:
    return f"{found}.\nReadable are bfloat16, float16 and float32 weights; load the version that is not quantized."
