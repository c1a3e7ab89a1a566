"""The values of one run of a pair, brought to the places of the other run."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llama4lab.run.block_change import wide
from llama4lab.run.pairing import NOWHERE, Pair, Side


def check_counterparts(pair: Pair, shapes: Mapping[str, str]) -> None:
    """Sees to it that the values at the given hook points (name -> shape in words) can be compared place by place.

    Raises:
        ValueError: if the prompts are aligned and a hook point has keys, or tiles that the other prompt does not have.
    """
    if pair.alike:
        return
    for name, shape in shapes.items():
        if shape.startswith("batch") and "key" in shape.split():
            raise ValueError(
                f"{name!r} has keys, which stand elsewhere in the other prompt.\nTake self_attn.z, .k or .v instead."
            )
        tiles = [prompt.pixel_values.shape[0] if prompt.pixel_values is not None else 0 for prompt in _both(pair)]
        if shape.startswith("tile") and tiles[0] != tiles[1]:
            raise ValueError(
                f"{name!r} has a place for each tile, but the prompts have {tiles[0]} and {tiles[1]} tiles.\n"
                "Take hook points of the text layers instead."
            )


def counterpart(
    pair: Pair, into: Side, shape: str, base: Shaped[Tensor, "..."], source: Shaped[Tensor, "..."]
) -> Shaped[Tensor, "..."]:
    """What stands in the source run where the base run has its tokens; the base's own where there is no counterpart.

    Args:
        pair: The two prompts.
        into: Which of them is the base.
        shape: The shape of the hook point in words.
        base: The tensor of the base run.
        source: That of the other run.
    """
    source = source.to(base.device)
    if pair.alike or shape.startswith("tile"):
        return source
    places = pair.sources(into).to(base.device)
    axis = shape.split().index("seq")
    rows = torch.arange(len(places), device=base.device)[:, None]
    moved = source.movedim(axis, 1)[rows, places.clamp(min=0)]
    known = (places != NOWHERE).reshape(*places.shape, *[1] * (moved.ndim - 2))
    return torch.where(known, moved, base.movedim(axis, 1)).movedim(1, axis)


def difference(source: Shaped[Tensor, "*shape"], base: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The source less the base, in float32 at least; 0 where both are equal, masked scores (-inf) too."""
    return torch.where(source == base, 0.0, wide(source) - wide(base))


def _both(pair: Pair):
    return pair.clean, pair.corrupted
