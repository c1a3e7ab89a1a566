"""The rows of the base and the source run in front of every packed pass."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.packed_layout import Part
from llama4lab.model.token_layout import TokenLayout


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one prompt.

    Attributes:
        x: What enters the first layer.
        layout: Where the tokens stand.
    """

    x: Float[Tensor, "row seq d_model"]
    layout: TokenLayout

    @property
    def size(self) -> int:
        """The number of tokens, padding counted."""
        return self.x.shape[0] * self.x.shape[1]

    @property
    def positions(self) -> Int[Tensor, " token"]:
        """The position of every token, row by row."""
        return self.layout.positions.expand(self.x.shape[:2]).flatten()

    def part(self, first_token: int, *, is_trunk: bool) -> Part:
        """The rows as a part of a packed pass."""
        places = slice(first_token, first_token + self.size)
        return Part(places, places, self.x.shape[0], self.layout, is_trunk=is_trunk)


@dataclass(frozen=True, eq=False)
class PairRows:
    """The base run's rows, which are patched, and the source run's, which values come from."""

    base: Rows
    source: Rows | None

    @property
    def size(self) -> int:
        """The number of tokens of both."""
        return self.base.size + (0 if self.source is None else self.source.size)

    @property
    def x(self) -> Float[Tensor, "1 token d_model"]:
        """What enters the first layer, as one row."""
        rows = [self.base, *([] if self.source is None else [self.source])]
        return torch.cat([each.x.flatten(0, 1) for each in rows]).unsqueeze(0)

    @property
    def positions(self) -> Int[Tensor, " token"]:
        """The position of every token."""
        rows = [self.base, *([] if self.source is None else [self.source])]
        return torch.cat([each.positions for each in rows])

    def parts(self) -> list[Part]:
        """The source first: what is patched into later parts of the same layer must be known by then."""
        own = [self.base.part(0, is_trunk=True)]
        return own if self.source is None else [*own, self.source.part(self.base.size, is_trunk=False)]
