"""What slopes cannot tell of an edge into a router: that some tokens go to other experts."""

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.text import TextLayer
from llama4lab.run.block_change import dot, wide


@torch.no_grad()
def route_jumps(
    layer: TextLayer,
    stream: Float[Tensor, "row seq d_model"],
    differences: Float[Tensor, "row seq sender d_model"],
    slope: Float[Tensor, "row seq d_model"],
    first_order: Float[Tensor, "row seq sender"],
) -> Float[Tensor, "row seq sender"]:
    """The exact effect on the routed experts where a sender changes a token's route, less the first order; else 0.

    Only the router reads the change; the experts read the stream as it was. So at most the tokens whose route changes
    visit an expert again.

    Args:
        layer: The layer.
        stream: What its router and experts read in the base run, before the norm.
        differences: What is added to it for each sender.
        slope: The derivative of the metric with respect to what the routed experts write.
        first_order: What the slope tells of each.
    """
    block, norm = layer.feed_forward, layer.post_attention_layernorm
    assert isinstance(block, MixtureOfExperts)
    normed = norm(stream)
    before, base_gates = block.router(normed)
    changed = norm((stream.unsqueeze(-2) + differences).to(stream.dtype)).flatten(1, 2)
    after, gates = (tensor.unflatten(1, differences.shape[1:3]) for tensor in block.router(changed))
    moved = (after.sort(-1).values != before.sort(-1).values.unsqueeze(-2)).any(-1)
    jumps = torch.zeros_like(first_order)
    row, seq, sender = moved.nonzero(as_tuple=True)
    if not len(row):
        return jumps
    base = _routed(block, normed, before, base_gates)
    new = _routed(block, normed[row, seq][None], after[moved][None], gates[moved][None])[0]
    jumps[row, seq, sender] = dot(new - base[row, seq], slope[row, seq]) - first_order[moved]
    return jumps


def _routed(block: MixtureOfExperts, x: Tensor, indices: Tensor, gates: Tensor) -> Float[Tensor, "row seq d_model"]:
    return wide(block.experts(x, indices, gates)).sum(-2)
