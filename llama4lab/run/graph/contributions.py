"""What each sender writes into the residual stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4lab.model.attention import SelfAttention
from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.text import TextModel


@contextmanager
def contributions(text: TextModel, written: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While the block lasts, calls a function with what the senders of each stage write.

    The bias of an output projection is of no head and the same in every run; it is left out.

    Args:
        text: The text stack.
        written: Called with a stage (see `Node`) and a tensor `[batch, seq, sender, d_model]`.
    """

    def embedded(_module: nn.Module, _args: Any, output: Tensor) -> None:
        written(-1, output.unsqueeze(-2))

    handles = [text.embed_merged.register_forward_hook(embedded)]
    try:
        for number, layer in enumerate(text.layers):
            handles.append(layer.self_attn.z.register_forward_hook(_heads(layer.self_attn, 2 * number, written)))
            block = layer.feed_forward
            if not isinstance(block, MixtureOfExperts):
                handles.append(block.register_forward_hook(_dense(2 * number + 1, written)))
                continue
            routed: list[Tensor] = []
            handles.append(block.experts.register_forward_hook(_routed(block.router.out_features, routed)))
            handles.append(block.shared_expert.register_forward_hook(_shared(2 * number + 1, routed, written)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_expert(
    out: Float[Tensor, "batch seq slot d_model"], indices: Int[Tensor, "batch seq slot"], num_experts: int
) -> Float[Tensor, "batch seq expert d_model"]:
    """What each expert adds to each token: 0 where the token is not sent to it."""
    parts = torch.zeros(*out.shape[:2], num_experts, out.shape[-1], dtype=out.dtype, device=out.device)
    return parts.scatter_add(2, indices.unsqueeze(-1).expand_as(out), out)


def _heads(attention: SelfAttention, stage: int, written: Callable[[int, Tensor], None]):
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        with align_module_device(attention.o_proj):  # its weight may be offloaded
            weight = attention.o_proj.weight.unflatten(-1, (-1, attention.d_head)).to(output.dtype)
            written(stage, torch.einsum("bshd,mhd->bshm", output, weight))

    return hook


def _dense(stage: int, written: Callable[[int, Tensor], None]):
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        written(stage, output.unsqueeze(-2))

    return hook


def _routed(num_experts: int, routed: list[Tensor]):
    def hook(_module: nn.Module, args: tuple, output: Tensor) -> None:
        # Where every slot is a token of its own (see `branched`), the output has its own shape again.
        routed[:] = [by_expert(output, args[1].reshape(output.shape[:3]), num_experts)]

    return hook


def _shared(stage: int, routed: list[Tensor], written: Callable[[int, Tensor], None]):
    # The shared expert runs behind the routed ones; both parts of the block are joined here.
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        written(stage, torch.cat([routed.pop(), output.unsqueeze(-2)], dim=-2))

    return hook
