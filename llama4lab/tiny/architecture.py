"""The shape of the tiny checkpoint and the start values of its training."""

import math
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig

from llama4lab.tiny.vocabulary import token_id

CHUNK = 64
LONG = 256


def tiny_config(tokenizer: Tokenizer) -> Llama4Config:
    """Eight text layers (NoPE at 3 and 7, experts at 1, 3, 5, 7) and four vision layers on tiles of 48 pixels."""
    token = partial(token_id, tokenizer)
    text = Llama4TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=128,
        intermediate_size_mlp=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=CHUNK,
        floor_scale=CHUNK,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=token("<|finetune_right_pad|>"),
        bos_token_id=token("<|begin_of_text|>"),
        eos_token_id=[token("<|end_of_text|>"), token("<|eom|>"), token("<|eot|>")],
    )
    vision = Llama4VisionConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,  # pixel shuffle hands the adapter hidden_size / ratio ** 2 channels
        projector_input_dim=192,
        projector_output_dim=192,
        vision_output_dim=192,
        image_size=48,
        patch_size=6,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    return Llama4Config(
        text_config=text,
        vision_config=vision,
        boi_token_index=token("<|image_start|>"),
        eoi_token_index=token("<|image_end|>"),
        image_token_index=token("<|patch|>"),
    )


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Start values in place: width-scaled normals, small residual outputs, unit norms, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[0]
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            if "class_embedding" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, 0.25, generator=generator)
        elif "positional_embedding" in name:
            parameter.normal_(0.0, 0.1, generator=generator)
        elif "lm_head" in name or "router" in name:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            fan_in = parameter.shape[1]  # experts are [expert, in, out], linear layers [out, in]
            residual = "down_proj" in name or (kind.endswith(("o_proj", "fc2")) and "adapter" not in name)
            scale = 0.25 if residual else 1.0
            parameter.normal_(0.0, scale / math.sqrt(fan_in), generator=generator)
