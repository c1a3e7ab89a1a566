"""What the GGUF file of a vision tower says, in the words of config.json."""

from typing import Any

from llama4lab.checkpoint.gguf.header import Header

ADAPTER = {1: "mm.model.mlp.1.weight", 2: "mm.model.mlp.2.weight"}
ROPE_BASE = 10000.0  # no file says it
DEFAULT_IMAGE = (0.5, 0.5, 0.5)


def vision_settings(header: Header) -> dict[str, Any]:
    """Gives all settings that the file states, by their names in the `vision_config` of config.json.

    Raises:
        ValueError: if one is missing or of another kind, or a tensor of the adapter is not there.
    """

    def number(key: str, default: int | None = None) -> int:
        return header.get(f"clip.vision.{key}", int, default)

    for key, expected in {"clip.use_gelu": True, "clip.use_silu": False, "clip.has_vision_encoder": True}.items():
        if header.get(key, bool, expected) is not expected:
            raise ValueError(f"{header.file}: {key} is {not expected}; a Llama 4 has {expected}.")
    widths = {layer: _rows(header, name) for layer, name in ADAPTER.items()}
    factor = number("projector.scale_factor", 2)
    if factor < 1:
        raise ValueError(f"{header.file}: clip.vision.projector.scale_factor is {factor}; expected a positive number.")
    return {
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "image_size": number("image_size"),
        "patch_size": number("patch_size"),
        "norm_eps": header.get("clip.vision.attention.layer_norm_epsilon", float),
        "pixel_shuffle_ratio": 1 / factor,
        "projector_input_dim": widths[1],
        "projector_output_dim": widths[2],
        "vision_output_dim": widths[2],
    }


def vision_rope() -> dict[str, Any]:
    """Gives the `rope_parameters` of every vision tower."""
    return {"rope_type": "default", "rope_theta": ROPE_BASE}


def image_settings(header: Header) -> dict[str, Any]:
    """Gives how images are to be prepared: the side of a tile, and what is subtracted and divided by."""
    settings: dict[str, Any] = {}
    side = header.get("clip.vision.image_size", int)
    settings["size"] = {"height": side, "width": side}
    for name in ("image_mean", "image_std"):
        values = header.get(f"clip.vision.{name}", list, list(DEFAULT_IMAGE))
        if len(values) != 3 or not all(isinstance(value, float) for value in values):
            raise ValueError(f"{header.file}: clip.vision.{name} is {values!r:.80}; expected three numbers.")
        settings[name] = values
    return settings


def _rows(header: Header, name: str) -> int:
    if name not in header.tensors:
        raise ValueError(f"{header.file} lacks {name}, a tensor of the adapter of images.")
    return header.tensors[name].shape[0]
