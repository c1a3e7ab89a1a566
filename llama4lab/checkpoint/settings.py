"""The config of a checkpoint, as transformers' classes hold it, read strictly.

transformers keeps keys that it does not know as attributes, takes some values without looking, and refuses some that
were published. Here an unknown key is an error (a misspelt one would silently leave a default in its place), and so is
a value that contradicts another.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, Llama4Config, Llama4TextConfig, Llama4VisionConfig, PreTrainedConfig

from llama4lab.checkpoint.consistency import check_raw_sizes, check_text, check_together, check_vision
from llama4lab.checkpoint.quantization import refuse_unknown_method
from llama4lab.checkpoint.spelling import near_misses
from llama4lab.checkpoint.strict_json import read_json

FILE = "config.json"
# What transformers' classes raise for values that cannot be.
REFUSED = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError)

# Keys that transformers itself turns into other ones.
LEGACY = {"torch_dtype", "rope_theta", "rope_scaling", "num_labels", "attn_implementation", "output_attentions"}

# Published keys that never change a number of the forward pass.
WITHOUT_EFFECT = {
    "add_cross_attention", "auto_map", "bad_words_ids", "begin_suppress_tokens", "cache_implementation",
    "compression_config", "cross_attention_hidden_size", "experts_implementation", "finetuning_task",
    "for_llm_compressor", "is_decoder", "keys_to_ignore_at_inference", "name_or_path", "prefix", "pruned_heads",
    "quantization", "quantization_config", "sep_token_id", "suppress_tokens", "task_specific_params",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torchscript", "unsloth_fixed", "unsloth_version",
    "use_bfloat16",
}  # fmt: skip

# Keys that would change numbers if they had another value than the one every published checkpoint has.
FIXED = {
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "multi_modal_projector_bias": False,
}


def read_config(folder: Path) -> Llama4Config | Llama4TextConfig:
    """Gives the config of a checkpoint: `Llama4TextConfig` for text only, `Llama4Config` for text and vision.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        ValueError: if it is not the config of a Llama 4, or of a quantized one, or has an unknown key, or a value that
            is impossible or contradicts another.

    Warns:
        UserWarning: if the RoPE scaling is 8 / 4 with 16 experts, which an early conversion wrote by mistake.
    """
    file = folder / FILE
    document = read_json(file)
    model_type = document.get("model_type")
    if model_type not in ("llama4", "llama4_text"):
        raise ValueError(
            f"{file}: model_type is {model_type!r}; llama4lab opens Llama 4 checkpoints only, "
            'which say "llama4" or, for text alone, "llama4_text".'
        )
    refuse_unknown_method(document, file)
    if model_type == "llama4_text":
        text = _build(Llama4TextConfig, document, file, section="")
        check_text(text, file, section="")
        return text
    if "vision_config" not in document:  # MLX writes the text model of a multimodal one so
        _check_keys(Llama4Config, document, file, section="")
        text = _build(Llama4TextConfig, document.get("text_config"), file, section="text_config.")
        check_text(text, file, section="text_config.")
        return text
    text, vision = (document.get(f"{part}_config") for part in ("text", "vision"))
    config = _build(
        Llama4Config,
        document
        | {"text_config": _build(Llama4TextConfig, text, file, section="text_config.")}
        | {"vision_config": _build(Llama4VisionConfig, vision, file, section="vision_config.")},
        file,
        section="",
    )
    check_text(config.text_config, file, section="text_config.")
    check_vision(config.vision_config, file, section="vision_config.")
    check_together(config, file)
    return config


def built(kind: type[PreTrainedConfig], settings: Mapping[str, Any], file: Path) -> Any:
    """Gives a config from settings that a file of another format states.

    Raises:
        ValueError: if a value is impossible.
    """
    try:
        check_raw_sizes(dict(settings), file, "")
        return kind(**settings)
    except REFUSED as error:
        raise ValueError(f"{file} describes no valid model: {' '.join(str(error).split())}") from error


def _build(kind: type[PreTrainedConfig], document: Any, file: Path, *, section: str) -> Any:
    """Gives a config of that class after checking every key."""
    if not isinstance(document, dict):
        raise ValueError(f"{file}: {section.rstrip('.')} is {document!r:.80}; an object of settings was expected.")
    if document.get("model_type", kind.model_type) != kind.model_type:
        raise ValueError(f"{file}: {section}model_type is {document['model_type']!r}, not {kind.model_type!r}.")
    _check_keys(kind, document, file, section)
    check_raw_sizes(document, file, section)
    # model_type is the class itself; names that start with _ are private to whatever wrote them.
    left_out = {"model_type", *WITHOUT_EFFECT, *(key for key in document if key.startswith("_"))}
    try:
        settings = _in_the_types_of(kind, document)
        return kind(**{key: value for key, value in settings.items() if key not in left_out})
    except REFUSED as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{file}: {section.rstrip('.') or 'the config'} is not valid: {message}") from error


def _check_keys(kind: type[PreTrainedConfig], document: dict[str, Any], file: Path, section: str) -> None:
    known = {field.name for field in fields(kind)} | LEGACY | WITHOUT_EFFECT | FIXED.keys() | {"model_type"}
    known |= set(kind.attribute_map) | set(GenerationConfig().to_dict())
    for key, value in document.items():
        if key not in known and not key.startswith("_"):
            near = near_misses(key, known)
            raise ValueError(
                f"{file}: {section}{key} is not a setting of Llama 4" + (f"; near misses: {near}." if near else ".")
            )
        if key in FIXED and value is not None and value != FIXED[key]:
            raise ValueError(f"{file}: {section}{key} is {value!r}; llama4lab computes only {FIXED[key]!r}.")
    _check_twins(kind, document, file, section)


def _check_twins(kind: type[PreTrainedConfig], document: dict[str, Any], file: Path, section: str) -> None:
    """Refuses a setting that is given under two names with two values."""
    for first, second in [*kind.attribute_map.items(), ("dtype", "torch_dtype"), ("rope_parameters", "rope_scaling")]:
        one, other = document.get(first), document.get(second)
        if one is not None and other is not None and one != other:
            raise ValueError(f"{file}: {section}{first} is {one!r:.80}, yet {section}{second} is {other!r:.80}.")
    for name in ("rope_parameters", "rope_scaling"):
        rope = document.get(name)
        theta = document.get("rope_theta")
        if isinstance(rope, dict) and theta is not None and rope.get("rope_theta", theta) != theta:
            raise ValueError(f"{file}: {section}rope_theta is {theta}, yet {name} says {rope['rope_theta']}.")


def _in_the_types_of(kind: type[PreTrainedConfig], document: dict[str, Any]) -> dict[str, Any]:
    """Gives the settings in the types that transformers insists on, where that changes no value."""
    declared = {field.name: field.type for field in fields(kind)}
    document = dict(document)
    for key, value in document.items():
        if declared.get(key) is float and type(value) is int:
            document[key] = float(value)
    # The published Scout says 4 and means true; transformers 5 refuses a number here.
    if type(document.get("attn_temperature_tuning")) is int:
        document["attn_temperature_tuning"] = bool(document["attn_temperature_tuning"])
    # A size that is null follows from the others; transformers means to derive it and then refuses the null.
    for key in ("head_dim", "num_key_value_heads"):
        if key in document and document[key] is None and key in declared:
            document[key] = _derived(key, document)
    for name in ("dtype", "torch_dtype"):
        if isinstance(document.get(name), str):
            document[name] = re.sub(r"^torch\.", "", document[name])
    return document


def _derived(key: str, document: dict[str, Any]) -> Any:
    defaults = {field.name: field.default for field in fields(Llama4TextConfig)}
    heads = document.get("num_attention_heads", defaults["num_attention_heads"])
    hidden = document.get("hidden_size", defaults["hidden_size"])
    if key == "num_key_value_heads":
        return heads
    exact = isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and hidden % heads == 0
    return hidden // heads if exact else None
