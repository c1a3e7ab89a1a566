"""`params.json`, the settings of a checkpoint of Meta's, read strictly: keys are known, and values possible."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama4lab.checkpoint.spelling import near_misses
from llama4lab.checkpoint.strict_json import read_json

FILE = "params.json"
LARGEST = 2**31 - 1


class Key(NamedTuple):
    """What a setting may be.

    Attributes:
        kind: "size" (a positive whole number), "number" (a positive one), "flag" or "object".
        default: What it is when the file does not say; an error if there is none.
    """

    kind: str
    default: Any = ...


# The defaults are those of `ModelArgs` in Meta's code.
TEXT = {
    "dim": Key("size"), "n_layers": Key("size"), "n_heads": Key("size"), "n_kv_heads": Key("size", None),
    "head_dim": Key("size", None), "vocab_size": Key("size", None), "multiple_of": Key("size", 256),
    "ffn_dim_multiplier": Key("number", None), "ffn_exp": Key("number", None), "norm_eps": Key("number", 1e-5),
    "attention_chunk_size": Key("size", None), "rope_theta": Key("number", 500000.0),
    "use_scaled_rope": Key("flag", False), "rope_scaling_factor": Key("number", None),
    "rope_high_freq_factor": Key("number", None), "nope_layer_interval": Key("size", None),
    "use_qk_norm": Key("flag", False), "attn_temperature_tuning": Key("flag", False),
    "floor_scale": Key("size", 8192), "attn_scale": Key("number", 0.1), "moe_args": Key("object", None),
    "vision_args": Key("object", None), "quantization_args": Key("object", None), "lora_args": Key("object", None),
    # How much Meta's code reserves for its cache.
    "max_batch_size": Key("size", None), "max_seq_len": Key("size", None),
}  # fmt: skip
EXPERTS = {
    "num_experts": Key("size"), "capacity_factor": Key("number", 1.0), "auto_scale_F": Key("flag", True),
    "top_k": Key("size", 1), "interleave_moe_layer_step": Key("size", 1),
    "use_shared_expert": Key("flag", True), "use_token_choice": Key("flag", True),
    # How training sent tokens around.
    "token_shuffle_group_size": Key("size", None),
}  # fmt: skip
VISION = {
    "image_size": Key("object"), "patch_size": Key("object"), "dim": Key("size"), "n_layers": Key("size"),
    "n_heads": Key("size"), "mlp_ratio": Key("number"), "output_dim": Key("size"),
    "pixel_shuffle_ratio": Key("number"),
}  # fmt: skip
SIDES = {"height": Key("size"), "width": Key("size")}
QUANTIZATION = {"scheme": Key("object", None), "group_size": Key("size", None), "spinquant": Key("flag", False)}
EXPECTED = {"size": "a positive whole number", "number": "a positive number", "flag": "true or false"}

Settings = dict[str, Any]


def read_params(folder: Path) -> Settings:
    """Gives all settings, with their defaults; `moe_args` and `vision_args` are such settings themselves, or None.

    Raises:
        FileNotFoundError: if there is no params.json.
        ValueError: if it has an unknown key, or lacks one, or a value is impossible.
    """
    file = folder / FILE
    document = read_json(file)
    if isinstance(document.get("model"), Mapping):  # the settings of a training run have others beside them
        document = document["model"]
    if document.get("vocab_size") == -1:
        document = document | {"vocab_size": None}
    settings = _checked(document, TEXT, file, "")
    if settings["lora_args"] is not None:
        raise ValueError(f"{file}: lora_args is given; weights with adapters beside them are not read.")
    if settings["quantization_args"] is not None:
        _refuse_other_numbers(_checked(settings["quantization_args"], QUANTIZATION, file, "quantization_args."), file)
    if settings["moe_args"] is not None:
        settings["moe_args"] = moe = _checked(settings["moe_args"], EXPERTS, file, "moe_args.")
        for key in ("use_shared_expert", "use_token_choice"):
            if not moe[key]:
                raise ValueError(f"{file}: moe_args.{key} is false; a Llama 4 has it true.")
    if settings["vision_args"] is not None:
        settings["vision_args"] = vision = _checked(settings["vision_args"], VISION, file, "vision_args.")
        for key in ("image_size", "patch_size"):
            vision[key] = _side(vision[key], file, f"vision_args.{key}")
    return settings


def _checked(document: Any, keys: Mapping[str, Key], file: Path, section: str) -> Settings:
    if not isinstance(document, Mapping):
        raise ValueError(f"{file}: {section.rstrip('.')} is {document!r:.80}; an object of settings was expected.")
    for name in document:
        if name not in keys:
            near = near_misses(name, keys)
            raise ValueError(
                f"{file}: {section}{name} is not a setting of Llama 4" + (f"; near misses: {near}." if near else ".")
            )
    found: Settings = {}
    for name, key in keys.items():
        value = document.get(name)
        if value is None and key.default is ...:
            raise ValueError(f"{file} does not say {section}{name}.")
        found[name] = key.default if value is None else _value(value, key.kind, f"{file}: {section}{name}")
    return found


def _value(value: Any, kind: str, where: str) -> Any:
    if kind == "object":
        return value
    is_number = type(value) in (int, float) and math.isfinite(value) and 0 < value <= LARGEST
    if kind == "size" and is_number and value == int(value):
        return int(value)  # Meta's code has some of them as floats
    if kind == "number" and is_number:
        return float(value)
    if kind == "flag" and type(value) is bool:
        return value
    raise ValueError(f"{where} is {value!r:.80}; {EXPECTED[kind]} was expected.")


def _side(document: Any, file: Path, where: str) -> int:
    sides = _checked(document, SIDES, file, f"{where}.")
    if sides["height"] != sides["width"]:
        raise ValueError(f"{file}: {where} is {sides['height']} x {sides['width']}; tiles and patches are squares.")
    return sides["height"]


def _refuse_other_numbers(settings: Settings, file: Path) -> None:
    """What the files of scales hold is read; other ways to quantize change what the weights mean."""
    for key, value in settings.items():
        if key != "group_size" and value:
            raise ValueError(
                f"{file}: quantization_args.{key} is {value!r:.80}; read are plain weights, and experts with "
                "fp8_scales_N.pt or int4_scales_N.pt beside them."
            )
