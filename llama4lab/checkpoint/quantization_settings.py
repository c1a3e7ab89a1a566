"""What a config says of quantized weights: kept from an older config, or made as compressed-tensors writes it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama4lab.checkpoint.quantization import CONFIG_FILES, CONFIG_KEYS
from llama4lab.checkpoint.schemes.integers import PackedIntegers
from llama4lab.checkpoint.schemes.scaled import Scaled
from llama4lab.checkpoint.schemes.scheme import Scheme
from llama4lab.checkpoint.settings import FILE
from llama4lab.checkpoint.strict_json import read_json

Settings = Mapping[str, Any]
SECTIONS = ("text_config", "vision_config")


def kept_settings(folder: Path) -> dict[str, Any]:
    """Gives what the config of a checkpoint says of quantization, in the places where it says so."""
    document = read_json(folder / FILE)
    kept = {key: document[key] for key in CONFIG_KEYS if key in document}
    for section in SECTIONS:
        inner = document.get(section)
        found = {key: inner[key] for key in CONFIG_KEYS if key in inner} if isinstance(inner, Mapping) else {}
        if found:
            kept[section] = found
    return kept


def copy_settings_files(folder: Path, target: Path) -> None:
    """Copies the files beside the config of a checkpoint that speak of quantization."""
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def can_be_told(scheme: Scheme) -> bool:
    """Whether `told_settings` knows a scheme."""
    return isinstance(scheme, PackedIntegers) or scheme == Scaled(torch.float8_e4m3fn, "row")


def told_settings(modules: Mapping[Scheme, Sequence[str]], plain: Sequence[str]) -> dict[str, Any]:
    """Gives the settings of compressed-tensors for quantized weights and activations as they are.

    Args:
        modules: The names of the quantized modules, by how they are.
        plain: The names of the linear modules that are not quantized.
    """
    groups = {}
    for number, (scheme, names) in enumerate(modules.items()):
        # One scheme alone is for every linear module; only several must be told apart by name.
        targets = ["Linear"] if len(modules) == 1 else list(names)
        group = {"targets": targets, "weights": _weights(scheme), "input_activations": None}
        groups[f"group_{number}"] = group | {"output_activations": None, "format": _format(scheme)}
    formats = {_format(scheme) for scheme in modules}
    settings = {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(plain),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    return {"quantization_config": settings}


def _weights(scheme: Scheme) -> dict[str, Any]:
    common = {"symmetric": True, "dynamic": False}
    if isinstance(scheme, PackedIntegers):
        own = {"num_bits": scheme.bits, "type": "int", "strategy": "group", "group_size": scheme.group}
    else:
        own = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
    return own | common


def _format(scheme: Scheme) -> str:
    return "pack-quantized" if isinstance(scheme, PackedIntegers) else "naive-quantized"
