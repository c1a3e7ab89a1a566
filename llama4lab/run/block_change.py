"""What a patch changes in the feed-forward block that reads it: computed by running that block again, not by a slope.

A router does not move under small changes and jumps under large ones, and the gate scales the input of an expert, so
that its effect bends strongly. Both happen inside one block, which is cheap to run again on the base run's own input.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.text import TextLayer
from llama4lab.run.listening import listening

ROUTER = (".router.logits", ".router.indices", ".router.gates")


def is_route(name: str) -> bool:
    """Whether a hook point belongs to a router."""
    return name.endswith(ROUTER)


def block_of(name: str, num_layers: int) -> int | None:
    """The layer whose feed-forward block reads a tensor next, if the tensor is the residual stream or a term of it."""
    if name == "embed_merged":
        return 0
    head, _, rest = name.partition("layers.")
    layer, _, component = rest.partition(".")
    if head or component not in ("resid_pre", "resid_mid", "resid_post", "self_attn.out", "self_attn.head_out"):
        return None
    block = int(layer) + (component == "resid_post")
    return block if block < num_layers else None


@torch.no_grad()
def routed_change(
    model: HookedPreTrainedModel,
    name: str,
    resid_mid: Float[Tensor, "batch seq d_model"],
    base: Shaped[Tensor, "batch seq choice"],
    source: Shaped[Tensor, "batch seq choice"],
) -> Float[Tensor, "batch seq slot d_model"]:
    """How the output of the routed experts changes, slot by slot, when the router is patched at every token.

    Args:
        model: The model.
        name: A hook point of a router.
        resid_mid: The residual stream that the block reads.
        base: The tensor at the hook point in the base run.
        source: What is put there.
    """
    layer = _layer(model, int(name.split(".")[1]))
    kept: list[Tensor] = []
    normed = layer.post_attention_layernorm(resid_mid)
    for value in (base, source):
        listeners = {name: lambda _, value=value: value, name.partition("router.")[0] + "experts.out": kept.append}
        with listening(model, listeners):
            layer.feed_forward(normed)
    return kept[1] - kept[0]


@torch.no_grad()
def block_jump(
    model: HookedPreTrainedModel,
    block: int,
    resid_mid: Float[Tensor, "batch seq d_model"],
    delta: Float[Tensor, "batch seq d_model"],
    slopes: tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]],
) -> Float[Tensor, "batch seq"]:
    """The effect of adding to the stream before a block, as far as it goes through the block and no slope tells it.

    That is the exact change of what the block writes, less its linearisation, times the derivative of the metric. At a
    token whose route the addition changes, this is the jump.

    Args:
        model: The model.
        block: The layer.
        resid_mid: The residual stream that its feed-forward block reads.
        delta: What is added to it.
        slopes: Derivatives of the metric with respect to `resid_mid` and to `resid_post` of the layer.
    """
    layer = _layer(model, block)
    before, after = slopes

    def written(stream: Tensor) -> Tensor:
        return layer.feed_forward(layer.post_attention_layernorm(stream))

    exact = written((resid_mid + delta).to(resid_mid.dtype)) - written(resid_mid)
    # The slope before the block is that behind it, by the skip connection, and what goes through the block.
    return dot(exact, after) - dot(delta, wide(before) - wide(after))


def _layer(model: HookedPreTrainedModel, layer: int) -> TextLayer:
    return model.text.layers[layer]


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dot(a: Float[Tensor, "*rest d"], b: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest"]:
    """The inner product over the last axis, in float32 at least."""
    return (wide(a) * wide(b)).sum(-1)
