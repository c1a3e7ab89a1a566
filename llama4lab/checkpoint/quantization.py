"""Signs that a checkpoint is quantized, and the refusal of what cannot be read.

Reading quantized weights as plain numbers, or without one of their scales, would give a model of noise.
"""

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from llama4lab.checkpoint.declared import CONFIG_KEYS
from llama4lab.checkpoint.recognition import PLAIN_DTYPES
from llama4lab.checkpoint.strict_json import read_json
from llama4lab.checkpoint.tensor_files import TensorFiles

# What configs call the methods whose weights can be read; MLX writes bits and group size without a name.
READABLE = {"compressed-tensors", "bitsandbytes", "modelopt", "fbgemm_fp8"}
# Scales of activations and of cached keys and values: weights are read, activations stay as they are.
FOR_ACTIVATIONS = re.compile(r"[._](input_scale|input_scale_ub|input_global_scale|k_scale|v_scale|output_scale)$")
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


def refuse_unknown_method(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError when a config, or a file beside it, says that the weights are quantized in an unknown way."""
    sections = {"": config, "text_config.": config.get("text_config"), "vision_config.": config.get("vision_config")}
    for prefix, section in sections.items():
        for key in CONFIG_KEYS:
            if isinstance(section, Mapping) and section.get(key) is not None:
                _refuse_settings(section[key], f"{file}: {prefix}{key}")
    for name in CONFIG_FILES:
        if (file.parent / name).is_file():
            producer = read_json(file.parent / name).get("producer")
            by = producer.get("name", "") if isinstance(producer, Mapping) else ""
            if by != "modelopt":
                raise ValueError(_refusal(f"{file.parent / name} says quantized" + (f" with {by}" if by else "")))


def _refuse_settings(settings: Any, where: str) -> None:
    method = settings.get("quant_method", settings) if isinstance(settings, Mapping) else settings
    if str(method) not in READABLE and not _is_unnamed(settings):
        raise ValueError(_refusal(f"{where} says quantized with {str(method)[:80]}"))
    if isinstance(settings, Mapping) and settings.get("transform_config"):
        raise ValueError(_refusal(f"{where} says that the weights are rotated (transform_config)"))
    sparsity = settings.get("sparsity_config") if isinstance(settings, Mapping) else None
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise ValueError(_refusal(f"{where} says that the weights are stored sparse ({sparsity['format']})"))


def _is_unnamed(settings: Any) -> bool:
    """Whether settings are those of MLX, or of early compressed-tensors, which do not say whose they are."""
    if not isinstance(settings, Mapping) or "quant_method" in settings:
        return False
    return {"bits", "group_size"} <= settings.keys() or bool({"config_groups", "format"} & settings.keys())


def is_for_activations(name: str) -> bool:
    """Whether a tensor is a scale of activations, which the weights do not need."""
    return FOR_ACTIVATIONS.search(name) is not None


def refuse_unread(shards: TensorFiles, read: Set[str]) -> None:
    """Raises ValueError when a tensor that nobody reads is a scale or the like, or is not a plain number.

    Args:
        shards: The files.
        read: The names on disk of the tensors that are read.
    """
    unread = [name for name in shards if name not in read and not is_for_activations(name)]
    for sign, writer in SIGNS.items():
        for name in unread:
            if re.search(sign, name):
                raise ValueError(_refusal(f"{shards.file(name)}: {name} shows weights quantized with {writer}"))
    for name in unread:
        dtype = shards.spec(name).dtype
        if dtype not in PLAIN_DTYPES:
            found = f"{shards.file(name)}: {name} is stored as {str(dtype).removeprefix('torch.')}, without a scale"
            raise ValueError(_refusal(found))


def _refusal(found: str) -> str:
    return (
        f"{found}, in a form that cannot be read.\nReadable are plain numbers, compressed-tensors (int4, int8, FP8, "
        "NVFP4), bitsandbytes (nf4, fp4), modelopt (FP8, NVFP4), fbgemm, MLX, GGUF and Meta's own files."
    )
