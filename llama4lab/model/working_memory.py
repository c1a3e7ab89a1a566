"""What a pass takes besides the weights: cache, activations, and the numbers of packed matrices while they are used."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Llama4TextConfig

from llama4lab.model.expert_store import AHEAD
from llama4lab.model.layer_kinds import is_chunked

ON_THE_WAY = "on the way"
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Room:
    """Memory that is set aside on a device.

    Attributes:
        what: It is for.
        nbytes: How much.
        note: How it was reckoned.
    """

    what: str
    nbytes: int
    note: str


def cache_nbytes(config: Llama4TextConfig, layer: int, tokens: int, dtype: torch.dtype) -> int:
    """Gives the most bytes that the keys and values of one row take in one layer.

    A chunked layer keeps less than a chunk, inside of at most twice that: see `ChunkedLayerCache`.

    Args:
        config: Of the text model.
        layer: Which.
        tokens: How many were seen.
        dtype: Of keys and values.
    """
    chunk = config.attention_chunk_size if is_chunked(config, layer) else None
    kept = tokens if chunk is None else min(tokens, 2 * (chunk - 1))
    return 2 * kept * config.num_key_value_heads * config.head_dim * dtype.itemsize


def cache_room(config: Llama4TextConfig, layers: Sequence[int], tokens: int, dtype: torch.dtype) -> Room:
    """Gives the room for the cache of some layers."""
    nbytes = sum(cache_nbytes(config, layer, tokens, dtype) for layer in layers)
    each = len(layers) * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    drops = "; chunked layers hold two chunks at most" if nbytes < each * tokens else ""
    return Room("KV cache", nbytes, f"{tokens:,} tokens, {each:,} bytes each{drops}")


def activation_room(config: Llama4TextConfig, tokens: int, dtype: torch.dtype, device: str) -> Room:
    """Gives the room for what a prefill without gradients holds at once, at most: text, one row, no hook point kept."""
    size, d_model, slots = dtype.itemsize, config.hidden_size, config.num_experts_per_tok
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    d_ff = max(slots * config.intermediate_size, config.intermediate_size_mlp)
    # Rotation and norms are computed in float32.
    attention = 4 * size * d_model + 4 * (6 * queries + 4 * keys)
    feed_forward = size * ((6 + 4 * slots) * d_model + 4 * d_ff)
    if device == "cpu" and dtype in HALF:
        feed_forward += 4 * slots * (d_model + 2 * config.intermediate_size)  # products in float32
    stream = 4 * size * d_model + 4 * config.head_dim + 64
    note = f"a prefill of {tokens:,} tokens in one row, text only, without gradients, nothing recorded"
    return Room("activations", tokens * (stream + max(attention, feed_forward)), note)


def logits_room(config: Llama4TextConfig, tokens: int, dtype: torch.dtype) -> Room:
    """Gives the room for the logits of a prefill."""
    note = f"{tokens:,} tokens x {config.vocab_size:,}; logits_to_keep needs less"
    return Room("logits", tokens * config.vocab_size * dtype.itemsize, note)


def making_room(nbytes: int, largest_expert: int, device: str, dtype: torch.dtype) -> Room:
    """Gives the room for the numbers of one matrix, where matrices are packed or are stored in another dtype.

    Args:
        nbytes: The most bytes for that.
        largest_expert: Numbers in the largest matrix of an expert, which a CPU multiplies in float32.
        device: That computes.
        dtype: To compute in.
    """
    wide = 4 * largest_expert if device == "cpu" and dtype in HALF else 0
    return Room("one matrix", max(nbytes, wide), "its numbers while it is used; they are dropped after")


def passing_room(matrices: Sequence[int], device: str) -> Room:
    """Gives the room for matrices that are being read, or moved to a device, before they are kept.

    Args:
        matrices: Bytes of each that waits on disk.
        device: Where they come to.
    """
    count = AHEAD + 1 if device == "cpu" else 1
    note = f"the {count} largest matrices, being read" if device == "cpu" else "the largest matrix, being moved"
    return Room(ON_THE_WAY, sum(sorted(matrices)[-count:]), note)


def rounding_room(nbytes: int) -> Room:
    """Gives the room for a matrix that is rounded when it has been read."""
    return Room("rounding", nbytes, "of a matrix that was read")


def lent_room(largest: int) -> Room:
    """Gives the room for a weight of RAM that is used on a GPU."""
    return Room("lent from RAM", largest, "the largest weight of the modules that wait in RAM")
