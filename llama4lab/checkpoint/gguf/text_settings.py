"""What a GGUF file says of the text model, in the words of config.json, and what llama.cpp takes for granted."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llama4lab.checkpoint.gguf.header import Header
from llama4lab.checkpoint.gguf.names import ROPE_FACTORS
from llama4lab.checkpoint.gguf.rope_factors import scaled_rope
from llama4lab.checkpoint.gguf.tokens import token_ids
from llama4lab.checkpoint.spelling import listed

# No file says these: llama.cpp has the same for every Llama 4, save that the larger one does without norms of q and k.
CHUNK, FLOOR, SCALE, NOPE_PERIOD = 8192, 8192, 0.1, 4
WITHOUT_QK_NORM = 128  # experts

SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
# Settings that llama4lab computes in one way only, with the values that say so.
FIXED = {
    "expert_gating_func": (2,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_count": (0, 1),
    "expert_group_count": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "attention.sliding_window": (CHUNK,),
    "attention.sliding_window_pattern": (NOPE_PERIOD,),
    "attention.causal": (True,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0,),
}
READ = {
    *SIZES.values(),
    *FIXED,
    *("vocab_size", "feed_forward_length", "expert_feed_forward_length", "expert_shared_feed_forward_length"),
    *("expert_count", "expert_used_count", "interleave_moe_layer_step", "attention.layer_norm_rms_epsilon"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("rope.freq_base", "rope.freq_base_swa", "rope.scaling.original_context_length"),
    *("attention.chunk_size", "use_qk_norm"),  # of ollama's writer
}


def text_settings(headers: Sequence[Header]) -> dict[str, Any]:
    """Gives all settings that the file states, by their names in config.json.

    Args:
        headers: Of all parts, the one with the settings first.

    Raises:
        ValueError: if one is missing, of another kind, unknown, or one that llama4lab does not compute.
    """
    header = headers[0]
    _refuse_unknown(header)

    def number(key: str, default: int | None = None) -> int:
        return header.get(f"llama4.{key}", int, default)

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise ValueError(
                f"{header.file}: llama4.{key} is {number(key)}, yet heads are {head_dim} wide; Llama 4 has one width."
            )
    said: dict[str, Any] = {name: number(key) for name, key in SIZES.items()}
    said |= {
        "head_dim": head_dim,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "rms_norm_eps": header.get("llama4.attention.layer_norm_rms_epsilon", float),
        "vocab_size": number("vocab_size", _rows(headers, "token_embd.weight")),
        "tie_word_embeddings": not any("output.weight" in each.tensors for each in headers),
    }
    said |= _experts(header, number) | token_ids(header)
    chunk = number("attention.chunk_size", 0)
    norms = {"use_qk_norm": header.get("llama4.use_qk_norm", bool)} if "llama4.use_qk_norm" in header.metadata else {}
    return said | ({"attention_chunk_size": chunk} if chunk else {}) | norms


def taken_for_granted(said: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the settings that no file states."""
    return {
        "attention_chunk_size": CHUNK,
        "attn_temperature_tuning": True,
        "floor_scale": FLOOR,
        "attn_scale": SCALE,
        "no_rope_layer_interval": NOPE_PERIOD,
        "use_qk_norm": said["num_local_experts"] != WITHOUT_QK_NORM,
        "attention_bias": False,
        "hidden_act": "silu",
        "rope_parameters": dict(rope),
    }


def rope_base(header: Header) -> float:
    """Gives the base of the frequencies of RoPE; llama.cpp's own if the file does not say."""
    base = header.get("llama4.rope.freq_base", float, 10000.0)
    if header.get("llama4.rope.freq_base_swa", float, base) != base:
        raise ValueError(f"{header.file}: llama4.rope.freq_base_swa is another than llama4.rope.freq_base, {base:g}.")
    return base


def rope_factors(headers: Sequence[Header]) -> list[float] | None:
    """Gives by what each frequency is divided; None if the file has no such tensor.

    Raises:
        ValueError: if the tensor is not a row of float32.
    """
    found = next((header for header in headers if ROPE_FACTORS in header.tensors), None)
    if found is None:
        return None
    stored = found.tensors[ROPE_FACTORS]
    if stored.kind.dtype != torch.float32 or len(stored.shape) != 1 or stored.shape[0] > 4096:
        raise ValueError(
            f"{found.file}: {ROPE_FACTORS} is {stored.kind.name} {list(stored.shape)}; expected F32 in a row."
        )
    with found.file.open("rb") as opened:
        opened.seek(stored.start)
        return list(struct.unpack(f"<{stored.shape[0]}f", opened.read(stored.nbytes)))


def text_rope(headers: Sequence[Header], head_dim: int) -> dict[str, Any]:
    """Gives the `rope_parameters` that the file implies.

    Raises:
        ValueError: if its factors follow from no known settings.
    """
    original = headers[0].get("llama4.rope.scaling.original_context_length", int, 8192)
    try:
        return scaled_rope(rope_base(headers[0]), rope_factors(headers), head_dim, original)
    except ValueError as error:
        raise ValueError(f"{headers[0].file}: {ROPE_FACTORS} cannot be understood: {error}.") from error


def _experts(header: Header, number: Any) -> dict[str, Any]:
    experts, width = number("expert_count", 0), number("expert_feed_forward_length", 0)
    step = number("interleave_moe_layer_step", 1)
    if experts and number("expert_shared_feed_forward_length", width) != width:
        raise ValueError(
            f"{header.file}: llama4.expert_shared_feed_forward_length is another than that of experts, {width}."
        )
    dense = number("feed_forward_length")
    if not experts or not step:
        return {"num_local_experts": max(experts, 1), "moe_layers": [], "num_experts_per_tok": 1} | {
            "intermediate_size_mlp": dense
        }
    said = {"num_local_experts": experts, "num_experts_per_tok": number("expert_used_count")}
    return said | {
        "interleave_moe_layer_step": step,
        "intermediate_size": number("expert_feed_forward_length"),
        "intermediate_size_mlp": dense,
    }


def _rows(headers: Sequence[Header], name: str) -> int | None:
    return next((header.tensors[name].shape[0] for header in headers if name in header.tensors), None)


def _refuse_unknown(header: Header) -> None:
    own = {key.removeprefix("llama4."): value for key, value in header.metadata.items() if key.startswith("llama4.")}
    unknown = [f"llama4.{key}" for key in own if key not in READ]
    if unknown:
        raise ValueError(f"{header.file} has settings that llama4lab does not know: {listed(unknown)}.")
    for key, allowed in FIXED.items():
        if key in own and own[key] not in allowed:
            raise ValueError(
                f"{header.file}: llama4.{key} is {own[key]!r:.80}; llama4lab computes only {allowed[-1]!r}."
            )
