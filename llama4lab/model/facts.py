"""The few figures of a config that a reader of activations needs, as plain data that can be saved beside them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers import Llama4Config, Llama4TextConfig

from llama4lab.model.config_parts import patch_side, text_part, tile_side, vision_part
from llama4lab.model.layer_kinds import is_chunked, is_moe, uses_rope
from llama4lab.model.text import TextModel


def facts(config: Llama4Config | Llama4TextConfig, layers_of: TextModel | None = None) -> dict[str, Any]:
    """Gives counts, sizes and layer kinds.

    Keys: num_layers, num_heads, num_kv_heads, num_experts, top_k, d_model, d_head, chunk_size (None without chunks;
    where layers differ, the size that most have), chunk_sizes (one for each layer, None for full attention), and the
    lists of layers moe_layers, rope_layers, chunked_layers, barred_layers (where single keys are hidden); with vision
    also image_size, patch_size, num_vision_layers, num_vision_heads.

    Args:
        config: Of the model.
        layers_of: The text layers, if what they do now shall count, as `llama4lab.edited` may have changed it.
    """
    text = text_part(config)
    layers = range(text.num_hidden_layers)
    if layers_of is None:
        ropes = [uses_rope(text, layer) for layer in layers]
        sizes = [text.attention_chunk_size if is_chunked(text, layer) else None for layer in layers]
    else:
        ropes = [layer.self_attn.rope for layer in layers_of.layers]
        sizes = [layer.self_attn.chunk_size for layer in layers_of.layers]
    known: dict[str, Any] = {
        "num_layers": text.num_hidden_layers,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": text.num_key_value_heads,
        "num_experts": text.num_local_experts,
        "top_k": text.num_experts_per_tok,
        "d_model": text.hidden_size,
        "d_head": text.head_dim,
        "chunk_size": _usual(sizes, text.attention_chunk_size),
        "chunk_sizes": sizes,
        "moe_layers": [layer for layer in layers if is_moe(text, layer)],
        "rope_layers": [layer for layer in layers if ropes[layer]],
        "chunked_layers": [layer for layer in layers if sizes[layer] is not None],
        "barred_layers": [] if layers_of is None else _barred(layers_of),
    }
    if isinstance(config, Llama4Config):
        vision = vision_part(config)
        known |= {
            "image_size": tile_side(vision),
            "patch_size": patch_side(vision),
            "num_vision_layers": vision.num_hidden_layers,
            "num_vision_heads": vision.num_attention_heads,
        }
    return known


def chunk_sizes(known: Mapping[str, Any]) -> list[int | None]:
    """Gives the chunk size of each layer from facts; None for a layer that sees everything.

    Facts that were saved by earlier versions have one size for all chunked layers.
    """
    size, chunked = known["chunk_size"], known["chunked_layers"]
    old = [size if layer in chunked else None for layer in range(known["num_layers"])]
    return known.get("chunk_sizes", old)


def rotary_kind(known: Mapping[str, Any], layer: int) -> str:
    """Gives "rope" for a layer that rotates queries and keys by their positions, else "nope", from facts."""
    return "rope" if layer in known["rope_layers"] else "nope"


def _barred(text: TextModel) -> list[int]:
    return [number for number, layer in enumerate(text.layers) if layer.self_attn.barred]


def _usual(sizes: list[int | None], planned: int | None) -> int | None:
    """The chunk size of most chunked layers; of equally many, that of the config."""
    counts = Counter(size for size in sizes if size is not None)
    return max(counts, key=lambda size: (counts[size], size == planned)) if counts else None
