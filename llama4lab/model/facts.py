"""The few figures of a config that a reader of activations needs, as plain data that can be saved beside them."""

from typing import Any

from transformers import Llama4Config, Llama4TextConfig

from llama4lab.model.config_parts import patch_side, text_part, tile_side, vision_part
from llama4lab.model.layer_kinds import is_chunked, is_moe, uses_rope


def facts(config: Llama4Config | Llama4TextConfig) -> dict[str, Any]:
    """Gives counts, sizes and layer kinds.

    Keys: num_layers, num_heads, num_kv_heads, num_experts, top_k, d_model, d_head, chunk_size (None without chunks),
    and the lists of layers moe_layers, rope_layers, chunked_layers; with vision also image_size, patch_size,
    num_vision_layers, num_vision_heads.
    """
    text = text_part(config)
    layers = range(text.num_hidden_layers)
    known: dict[str, Any] = {
        "num_layers": text.num_hidden_layers,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": text.num_key_value_heads,
        "num_experts": text.num_local_experts,
        "top_k": text.num_experts_per_tok,
        "d_model": text.hidden_size,
        "d_head": text.head_dim,
        "chunk_size": text.attention_chunk_size,
        "moe_layers": [layer for layer in layers if is_moe(text, layer)],
        "rope_layers": [layer for layer in layers if uses_rope(text, layer)],
        "chunked_layers": [layer for layer in layers if is_chunked(text, layer)],
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
