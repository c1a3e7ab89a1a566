"""What kind a text layer is. Hides the inverted flag of the config, where `no_rope_layers[i] == 1` means RoPE."""

from transformers import Llama4TextConfig


def uses_rope(config: Llama4TextConfig, layer: int) -> bool:
    """Whether the layer rotates queries and keys by their positions. The others are NoPE layers."""
    assert config.no_rope_layers is not None  # filled in by the config itself
    return bool(config.no_rope_layers[layer])


def is_chunked(config: Llama4TextConfig, layer: int) -> bool:
    """Whether a token of the layer attends only to tokens of its own chunk."""
    assert config.layer_types is not None
    return config.layer_types[layer] == "chunked_attention" and config.attention_chunk_size is not None


def is_moe(config: Llama4TextConfig, layer: int) -> bool:
    """Whether the layer routes tokens to experts. The others have one dense MLP."""
    assert config.moe_layers is not None
    return layer in config.moe_layers
