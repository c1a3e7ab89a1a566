"""Signed integers of 4 bits, two in a byte, with a scale for each group of columns: Meta's int4."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Parts, Shape, grouped


@dataclass(frozen=True)
class SignedNibbles:
    """`weight`, bytes [out, in / 2] whose low half comes first, in two's complement; `weight_scale` [out, group].

    Attributes:
        group: How many columns have a scale together.
    """

    group: int

    @property
    def name(self) -> str:
        """For example "signed int4, groups of 128"."""
        return f"signed int4, groups of {self.group}"

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives value * scale."""
        both = parts["weight"]
        halves = torch.stack([both & 15, both >> 4], dim=-1).flatten(1)
        values = (halves ^ 8).float() - 8
        return grouped(values, parts["weight_scale"].float())
