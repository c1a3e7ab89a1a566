"""Branches: every receiver of a text layer reads a residual stream of its own.

The model has one input for all queries of a layer and one for router and experts. Here the modules that read it (the
projections, router, experts, MLPs, final norm) are handed `norm(stream + change)`, with another change for each head,
KV head or expert. The modules themselves run as they are, so offloaded and quantized weights work, gradients too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.text import TextLayer, TextModel

PROJECTIONS = ("q", "k", "v")


@dataclass(frozen=True)
class Reading:
    """Receivers that are about to read the residual stream.

    Attributes:
        stage: As in `Node`.
        part: As in `Node`; "expert" stands for the slots of all tokens.
        stream: What they would all read, before the norm.
        indices: The experts that the slots are sent to, for the part "expert".
    """

    stage: int
    part: str
    stream: Float[Tensor, "batch seq d_model"]
    indices: Int[Tensor, "batch seq slot"] | None = None


@dataclass(frozen=True)
class Change:
    """What is added to the residual stream, in float32 at least.

    Attributes:
        which: The heads or KV heads that it is for; elsewhere [0]. For experts it is not used: there is one for each
            slot.
        delta: One for each of these.
    """

    which: list[int]
    delta: Float[Tensor, "batch seq branch d_model"]


Changer = Callable[[Reading], Change | None]


@contextmanager
def branched(text: TextModel, changer: Changer) -> Iterator[None]:
    """While the block lasts, receivers read what the changer makes of the residual stream.

    With several experts a token, hook points inside the experts see each slot as a token of its own.

    Args:
        text: The text stack.
        changer: Called by every reader of every layer; gives its change, or None for none.
    """
    handles: list[Any] = []
    try:
        for number, layer in enumerate(text.layers):
            handles += _attention(layer, 2 * number, changer)
            handles += _feed_forward(layer, 2 * number + 1, changer)
        handles += [text.norm.register_forward_pre_hook(_final(2 * len(text.layers), changer))]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(stream: Tensor, delta: Tensor, norm: nn.Module) -> Float[Tensor, "batch seq branch d_model"]:
    """What the branches read: the norm of the sum, which is taken before rounding to the model's dtype."""
    return norm((stream.unsqueeze(-2) + delta).to(stream.dtype))


def _attention(layer: TextLayer, stage: int, changer: Changer) -> list[Any]:
    streams: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Tensor) -> None:
        streams[:] = [output]

    handles = [layer.resid_pre.register_forward_hook(note)]
    for part in PROJECTIONS:
        projection = getattr(layer.self_attn, f"{part}_proj")
        before, behind = _projection(part, layer, stage, changer, streams)
        handles += [projection.register_forward_pre_hook(before), projection.register_forward_hook(behind)]
    return handles


def _projection(part: str, layer: TextLayer, stage: int, changer: Changer, streams: list[Tensor]):
    """The hooks of a projection: all inputs go through it at once, then each head takes its own."""
    pending: list[Change] = []

    def before(_module: nn.Module, args: tuple) -> tuple | None:
        change = changer(Reading(stage, part, streams[0]))
        pending[:] = [] if change is None else [change]
        if change is None:
            return None
        branches = _read(streams[0], change.delta, layer.input_layernorm)
        return (torch.cat([args[0].unsqueeze(-2), branches], dim=-2),)

    def behind(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        if not pending:
            return None
        heads = output.unflatten(-1, (-1, layer.self_attn.d_head))
        which = torch.tensor(pending.pop().which, device=output.device)
        own = heads[:, :, torch.arange(1, len(which) + 1, device=output.device), which]
        return heads[:, :, 0].index_copy(2, which, own).flatten(-2)

    return before, behind


def _feed_forward(layer: TextLayer, stage: int, changer: Changer) -> list[Any]:
    streams: list[Tensor] = []
    norm, block = layer.post_attention_layernorm, layer.feed_forward

    def note(_module: nn.Module, _args: Any, output: Tensor) -> None:
        streams[:] = [output]

    def reader(part: str):
        def before(_module: nn.Module, _args: tuple) -> tuple | None:
            change = changer(Reading(stage, part, streams[0]))
            return None if change is None else (_read(streams[0], change.delta, norm).squeeze(-2),)

        return before

    handles = [layer.resid_mid.register_forward_hook(note)]
    if not isinstance(block, MixtureOfExperts):
        return [*handles, block.register_forward_pre_hook(reader("mlp"))]
    slots: list[int] = []

    def before(_module: nn.Module, args: tuple) -> tuple | None:
        _, indices, gates = args
        change = changer(Reading(stage, "expert", streams[0], indices))
        slots[:] = []
        if change is None:
            return None
        inputs = _read(streams[0], change.delta, norm)
        if indices.shape[-1] == 1:
            return inputs.squeeze(-2), indices, gates
        slots[:] = indices.shape[1:]
        return tuple(t.flatten(1, 2) for t in (inputs, indices.unsqueeze(-1), gates.unsqueeze(-1)))

    def behind(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        return output.squeeze(-2).unflatten(1, slots) if slots else None

    return [
        *handles,
        block.router.register_forward_pre_hook(reader("router")),
        block.experts.register_forward_pre_hook(before),
        block.experts.register_forward_hook(behind),
        block.shared_expert.register_forward_pre_hook(reader("shared_expert")),
    ]


def _final(stage: int, changer: Changer) -> Callable[[nn.Module, tuple], tuple | None]:
    def before(_module: nn.Module, args: tuple) -> tuple | None:
        change = changer(Reading(stage, "logits", args[0]))
        if change is None:
            return None
        return ((args[0].unsqueeze(-2) + change.delta).to(args[0].dtype).squeeze(-2),)

    return before
