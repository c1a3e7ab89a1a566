"""The config of a GGUF checkpoint: from its metadata or, where a config.json lies beside it, from both.

A GGUF file does not say all that a Llama 4 needs. Published models agree on what is left out; for any other model a
config.json beside the file says it. The two must not contradict each other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig, PreTrainedConfig

from llama4lab.checkpoint.consistency import check_raw_sizes, check_text, check_together, check_vision
from llama4lab.checkpoint.gguf.header import Header
from llama4lab.checkpoint.gguf.pieces import beside, read_model, read_vision
from llama4lab.checkpoint.gguf.rope_factors import difference
from llama4lab.checkpoint.gguf.text_settings import rope_base, rope_factors, taken_for_granted, text_rope, text_settings
from llama4lab.checkpoint.gguf.tokens import image_token_ids
from llama4lab.checkpoint.gguf.vision_settings import vision_rope, vision_settings
from llama4lab.checkpoint.settings import FILE, built, read_config

CLOSE = 1e-5
# A file may be told other ids than the config, and may be cut to another context; neither changes a number.
MAY_DIFFER = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "interleave_moe_layer_step"}


def gguf_config(path: Path) -> Llama4Config | Llama4TextConfig:
    """Gives the config of a GGUF checkpoint: with vision if the file of a vision tower lies beside the model.

    Raises:
        FileNotFoundError: if a part of the model is not there.
        ValueError: if a file is malformed, or does not describe a Llama 4, or config.json says something else.
    """
    headers, vision = read_model(path), read_vision(path)
    file = beside(path, FILE)
    given = None if file is None else read_config(file.parent)
    text = _text(headers, given)
    if vision is None:
        return text
    towers = given.vision_config if isinstance(given, Llama4Config) else None
    own = vision_settings(vision)
    if isinstance(towers, Llama4VisionConfig) and isinstance(given, Llama4Config):
        _agree(own, towers, vision.file)
        ids = {key: getattr(given, key) for key in ("boi_token_index", "eoi_token_index", "image_token_index")}
    else:
        towers = built(Llama4VisionConfig, own | {"rope_parameters": vision_rope()}, vision.file)
        check_vision(towers, vision.file, section="")
        ids = image_token_ids(headers[0])
    config = built(Llama4Config, {"text_config": text, "vision_config": towers, **ids}, path)
    check_together(config, path)
    return config


def _text(headers: Sequence[Header], given: PreTrainedConfig | None) -> Llama4TextConfig:
    said, file = text_settings(headers), headers[0].file
    if given is not None:
        text = given.text_config if isinstance(given, Llama4Config) else given
        assert isinstance(text, Llama4TextConfig)  # read_config saw to it
        _agree(said, text, file)
        _agree_on_rope(headers, text)
        return text
    check_raw_sizes(said, file, "")
    granted = taken_for_granted(said, text_rope(headers, said["head_dim"]))
    text = built(Llama4TextConfig, granted | said, file)
    check_text(text, file, section="")
    return text


def _agree(said: Mapping[str, Any], config: PreTrainedConfig, file: Path) -> None:
    """Raises ValueError when a file says another thing than the config beside it."""
    for key, value in said.items():
        other: Any = getattr(config, key)
        same = abs(value - other) <= CLOSE * abs(other) if isinstance(value, float) else value == other
        if key not in MAY_DIFFER and not same:
            raise ValueError(
                f"{file} says {key} {value!r:.60}; config.json beside it says {other!r:.60}.\n"
                "They do not belong together."
            )


def _agree_on_rope(headers: Sequence[Header], config: Llama4TextConfig) -> None:
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    base, file = rope_base(headers[0]), headers[0].file
    if abs(base - rope["rope_theta"]) > CLOSE * base:
        raise ValueError(f"{file} says that the base of RoPE is {base:g}; config.json says {rope['rope_theta']:g}.")
    try:
        off = difference(rope, rope_factors(headers), config.head_dim or 0)
    except ValueError as error:
        raise ValueError(f"{file}: {error}.") from error
    if off > CLOSE:
        raise ValueError(
            f"{file}: the factors of RoPE differ by {off:.2g} from those that config.json implies.\n"
            "They do not belong together."
        )
