"""The names that GGUF gives the tensors of a Llama 4, and those that the model has for them."""

import re

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "v.class_embd": "vision_model.class_embedding",
    "v.class_embd.weight": "vision_model.class_embedding",
    "v.position_embd.weight": "vision_model.positional_embedding_vlm",
    "v.patch_embd.weight": "vision_model.patch_embedding.linear.weight",
    "v.pre_ln.weight": "vision_model.layernorm_pre.weight",
    "v.pre_ln.bias": "vision_model.layernorm_pre.bias",
    "v.post_ln.weight": "vision_model.layernorm_post.weight",
    "v.post_ln.bias": "vision_model.layernorm_post.bias",
    "mm.model.mlp.1.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "mm.model.mlp.2.weight": "vision_model.vision_adapter.mlp.fc2.weight",
    # Converters have used two names each for this one and for the second norm of a vision layer.
    "mm.model.fc.weight": "multi_modal_projector.linear_1.weight",
    "mm.1.weight": "multi_modal_projector.linear_1.weight",
}
# Of text layers; experts of a projection are one tensor [expert, out, in].
TEXT_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate_inp": "feed_forward.router",
    **{f"ffn_{part}_exps": f"feed_forward.experts.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")},
}
VISION_LAYER = {
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v")},
    "attn_out": "self_attn.o_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
LAYER = re.compile(r"(?P<vision>v\.)?blk\.(?P<number>0|[1-9]\d*)\.(?P<part>[a-z0-9_]+)\.(?P<end>weight|bias)")

# What is no tensor of the model: the factors of scaled RoPE, of which the settings are read.
ROPE_FACTORS = "rope_freqs.weight"


def model_name(name: str) -> str | None:
    """Gives the name in the model of a tensor of a GGUF file; None if a Llama 4 has no such tensor."""
    if name in TOP:
        return TOP[name]
    found = LAYER.fullmatch(name)
    if found is None:
        return None
    parts, layers = (VISION_LAYER, "vision_model.model.layers") if found["vision"] else (TEXT_LAYER, "model.layers")
    if found["part"] not in parts:
        return None
    return f"{layers}.{found['number']}.{parts[found['part']]}.{found['end']}"
