"""Attention by torch's flex kernel, which compiles the rule of who sees whom into the kernel and skips empty blocks."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llama4lab.model.attention_kernels import visible_keys
from llama4lab.model.token_layout import TokenLayout


@cache
def compiled_flex():
    """The compiled kernel; compiled once a process, on its first use."""
    return torch.compile(flex_attention, dynamic=True)


def flex(
    q: Float[Tensor, "batch head seq d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    layout: TokenLayout,
    chunk: int | None,
) -> Float[Tensor, "batch head seq d_head"]:
    """Flex attention under the layer's mask.

    Raises:
        RuntimeError: where torch cannot compile for this device, or gradients are asked for on a CPU.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise RuntimeError(
            "attn='flex' gives no gradients on a CPU, and this pass records them.\n"
            "Run it inside torch.no_grad(), or use attn='sdpa'."
        )
    key = k.shape[2]
    visible = visible_keys(layout, chunk, key)
    mask = create_block_mask(
        lambda row, head, query, at: visible[row if visible.shape[0] > 1 else 0, query, at],
        visible.shape[0],
        None,
        q.shape[2],
        key,
        device=q.device,
    )
    try:
        return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    except Exception as problem:
        raise RuntimeError(
            f"attn='flex' needs torch.compile on {q.device}, which failed with {type(problem).__name__}.\n"
            "Use attn='sdpa', which needs no compiler, or install one (on a CPU: a C++ compiler)."
        ) from problem
