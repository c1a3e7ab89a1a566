"""What must hold between the settings of a config so that they describe a Llama 4 at all."""

import math
import warnings
from pathlib import Path
from typing import Any

from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig
from transformers.activations import ACT2FN

from llama4lab.checkpoint.spelling import near_misses

# Beyond these a config is damaged or hostile: building a model of such a size would exhaust the machine.
LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 1024
MOST_EXPERTS = 65_536
MOST_IN_ALL = 131_072  # experts of all layers, each of which may have tensors of its own
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "no_rope_layer_interval",
    "attention_chunk_size", "floor_scale", "num_channels", "image_size", "patch_size", "projector_input_dim",
    "projector_output_dim", "vision_output_dim",
)  # fmt: skip
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS = (
    *ROPE_NUMBERS, "rope_type", "type", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate",
)  # fmt: skip
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def check_raw_sizes(document: dict[str, Any], file: Path, section: str) -> None:
    """Checks sizes before transformers sees them, which makes lists as long as `num_hidden_layers` says."""
    for key in SIZES:
        size = document.get(key, 1)
        if key == "attention_chunk_size" and size is None:
            continue  # no chunks at all, as in Llama Guard 4
        if key in ("head_dim", "num_key_value_heads") and size is None:
            continue  # follows from other sizes
        if type(size) is not int or not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"{file}: {section}{key} is {size!r:.80}; a positive whole number was expected.")
    if document.get("num_hidden_layers", 1) > MOST_LAYERS:
        raise ValueError(f"{file}: {section}num_hidden_layers is {document['num_hidden_layers']:,}.")
    step = document.get("interleave_moe_layer_step", 1)
    if document.get("moe_layers") is None and (type(step) is not int or step < 1):
        raise ValueError(
            f"{file}: {section}interleave_moe_layer_step is {step!r:.80}; a positive whole number was expected.\n"
            "A model without experts says moe_layers: []."
        )


def check_text(config: Llama4TextConfig, file: Path, section: str) -> None:
    """Checks the settings of the text model against each other."""

    def must(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{file}: {section}{key} is {getattr(config, key)!r:.80}; expected {expected}.")

    layers = config.num_hidden_layers
    must(config.head_dim % 2 == 0, "head_dim", "an even number, since RoPE turns pairs")
    must(
        config.num_attention_heads % config.num_key_value_heads == 0,
        "num_key_value_heads",
        f"a divisor of num_attention_heads, {config.num_attention_heads}",
    )
    must(len(config.no_rope_layers or ()) == layers, "no_rope_layers", f"one 0 or 1 for each of {layers} layers")
    must(all(flag in (0, 1) for flag in config.no_rope_layers or ()), "no_rope_layers", "nothing but 0 and 1")
    kinds = set(config.layer_types or ())
    must(kinds <= {"chunked_attention", "full_attention"}, "layer_types", "chunked_attention and full_attention only")
    must(len(config.layer_types or ()) == layers, "layer_types", f"one kind for each of {layers} layers")
    _check_experts(config, must)
    must(config.hidden_act in ACT2FN, "hidden_act", f"an activation; near: {near_misses(config.hidden_act, ACT2FN)}")
    must(0 < config.rms_norm_eps < 1, "rms_norm_eps", "a small positive number")
    must(math.isfinite(config.attn_scale), "attn_scale", "a finite number")
    must(0 <= (config.pad_token_id or 0) < config.vocab_size, "pad_token_id", f"an id below {config.vocab_size}")
    _check_rope(config, file, section)
    _warn_of_early_conversion(config, file, section)


def _check_experts(config: Llama4TextConfig, must: Any) -> None:
    moe = config.moe_layers or []
    valid = all(type(layer) is int and 0 <= layer < config.num_hidden_layers for layer in moe)
    must(valid, "moe_layers", f"layer numbers below {config.num_hidden_layers}")
    must(len(set(moe)) == len(moe), "moe_layers", "every layer once")
    if moe:
        experts = config.num_local_experts
        must(
            1 <= experts <= MOST_EXPERTS, "num_local_experts", f"1 to {MOST_EXPERTS:,}, as layers {moe[:3]}.. need them"
        )
        must(experts * len(moe) <= MOST_IN_ALL, "num_local_experts", f"at most {MOST_IN_ALL:,} in {len(moe)} layers")
        must(
            1 <= config.num_experts_per_tok <= experts, "num_experts_per_tok", f"1 to {experts}, the number of experts"
        )


def _check_rope(config: Llama4TextConfig | Llama4VisionConfig, file: Path, section: str) -> None:
    rope = dict(config.rope_parameters or {})
    for key, value in rope.items():
        if key not in ROPE_KEYS:
            near = near_misses(key, ROPE_KEYS)
            raise ValueError(
                f"{file}: {section}rope_parameters.{key} is not a setting of RoPE"
                + (f"; near misses: {near}." if near else ".")
            )
        must_be_number = key in ROPE_NUMBERS or (isinstance(value, int | float) and type(value) is not bool)
        if must_be_number and not (isinstance(value, int | float) and 0 < value < 1e30):
            raise ValueError(f"{file}: {section}rope_parameters.{key} is {value!r:.80}; expected a positive number.")
    if rope.get("rope_type") not in STATIC_ROPE:
        raise ValueError(
            f"{file}: {section}rope_parameters.rope_type is {rope.get('rope_type')!r:.80}; "
            f"llama4lab computes {', '.join(STATIC_ROPE)}."
        )


def _warn_of_early_conversion(config: Llama4TextConfig, file: Path, section: str) -> None:
    rope = dict(config.rope_parameters or {})
    if config.num_local_experts == 16 and (rope.get("factor"), rope.get("high_freq_factor")) == (8.0, 4.0):
        warnings.warn(
            f"{file}: {section}rope_scaling is 8 / 4 (factor / high_freq_factor) with 16 experts.\n"
            "Early conversions of Scout wrote these values by mistake; Meta's own code uses 16 / 1.\n"
            "The values of the file are used; correct them there if this is Scout.",
            stacklevel=2,
        )


def check_vision(config: Llama4VisionConfig, file: Path, section: str) -> None:
    """Checks the settings of the vision tower against each other."""

    def must(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{file}: {section}{key} is {getattr(config, key)!r:.80}; expected {expected}.")

    heads, ratio = config.num_attention_heads, config.pixel_shuffle_ratio
    assert isinstance(config.image_size, int)  # check_raw_sizes saw to both
    assert isinstance(config.patch_size, int)
    must(config.hidden_size % (4 * heads) == 0, "hidden_size", f"a multiple of 4 x {heads} heads, for two-axis RoPE")
    must(config.image_size % config.patch_size == 0, "image_size", f"a multiple of patch_size, {config.patch_size}")
    must(0 < ratio <= 1 and (1 / ratio).is_integer(), "pixel_shuffle_ratio", "one over a whole number, such as 0.5")
    side = config.image_size // config.patch_size
    must(side % round(1 / ratio) == 0, "image_size", f"a multiple of {round(1 / ratio)} patches a side; it has {side}")
    shuffled = config.hidden_size * round(1 / ratio) ** 2
    must(config.intermediate_size == shuffled, "intermediate_size", f"{shuffled}, the width after pixel shuffle")
    must(
        config.vision_output_dim == config.projector_output_dim,
        "vision_output_dim",
        f"projector_output_dim, {config.projector_output_dim}",
    )
    must(config.hidden_act in ACT2FN, "hidden_act", f"an activation; near: {near_misses(config.hidden_act, ACT2FN)}")
    must(0 < config.norm_eps < 1, "norm_eps", "a small positive number")
    _check_rope(config, file, section)


def check_together(config: Llama4Config, file: Path) -> None:
    """Checks what text and vision must agree on."""
    assert isinstance(config.text_config, Llama4TextConfig)
    vocab = config.text_config.vocab_size
    if not 0 <= config.image_token_index < vocab:
        raise ValueError(
            f"{file}: image_token_index is {config.image_token_index}; expected an id below vocab_size, {vocab}."
        )
