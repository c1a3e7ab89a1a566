"""Where the tokens of the pair of prompts and of all units stand in a packed row."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llama4lab.model.packed_layout import Part
from llama4lab.model.token_layout import TokenLayout, plain_layout


@dataclass(frozen=True, eq=False)
class Block:
    """Units that have the same columns in a layer: `units[i]` continues row `rows[i]` at column `first`."""

    units: Int[np.ndarray, " unit"]
    rows: Int[np.ndarray, " unit"]
    first: int
    end: int
    asked_first: int

    @property
    def length(self) -> int:
        """How many tokens each unit has."""
        return self.end - self.first

    @property
    def asking(self) -> int:
        """How many of them attend."""
        return self.end - self.asked_first

    def split(self, tokens: int, units: int) -> Iterator["Block"]:
        """Pieces of at most so many tokens and units, but at least one unit."""
        step = max(min(tokens // self.length, units), 1)
        for i in range(0, len(self.units), step):
            places = slice(i, i + step)
            yield Block(self.units[places], self.rows[places], self.first, self.end, self.asked_first)

    def part(self, base: TokenLayout, token: int, asked: int) -> Part:
        """What attention has to know of it.

        Args:
            base: The layout of the rows that are continued.
            token: Where its tokens begin.
            asked: Where its attending tokens begin among those that attend.
        """
        count, ask = len(self.units), self.asking
        if base.start is not None:
            layout = plain_layout(count, ask, self.end - ask, self.asked_first, base.positions.device)
        else:
            rows = torch.from_numpy(self.rows)
            one = base.selected(rows)
            keys, documents = one.key_positions[:, : self.end], one.documents[:, : self.end]
            layout = TokenLayout(keys[:, self.asked_first :], keys, documents, None)
        return Part(
            tokens=slice(token, token + count * self.length),
            asked=slice(asked, asked + count * ask),
            rows=count,
            layout=layout,
            trunk_rows=torch.from_numpy(self.rows),
            past=self.first,
        )


def blocks_of(
    units: Int[np.ndarray, " unit"],
    rows: Int[np.ndarray, " unit"],
    first: Int[np.ndarray, " unit"],
    end: Int[np.ndarray, " unit"],
    asked_first: Int[np.ndarray, " unit"],
) -> list[Block]:
    """Groups units that have the same columns."""
    if not len(units):
        return []
    order = np.lexsort((units, asked_first, end, first))
    keys = np.stack([first, end, asked_first])[:, order]
    cuts = np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(0)) + 1
    return [
        Block(units[group], rows[group], int(first[group[0]]), int(end[group[0]]), int(asked_first[group[0]]))
        for group in np.split(order, cuts)
    ]


@dataclass(frozen=True, eq=False)
class Packing:
    """Places of units in a packed row, behind `offset` tokens of the pair.

    Attributes:
        blocks: The blocks in order.
        offset: How many tokens stand before the first unit.
        start: For every unit of the sweep where its tokens begin; -1 if it has none here.
        first: For every unit its first column.
        end: For every unit one past its last column.
        asked_start: As `start`, among the tokens that attend.
        asked_first: As `first`, of those.
    """

    blocks: list[Block]
    offset: int
    start: Int[np.ndarray, " unit"]
    first: Int[np.ndarray, " unit"]
    end: Int[np.ndarray, " unit"]
    asked_start: Int[np.ndarray, " unit"]
    asked_first: Int[np.ndarray, " unit"]

    @property
    def size(self) -> int:
        """How many tokens there are, those of the pair included."""
        return self.offset + sum(len(block.units) * block.length for block in self.blocks)

    def columns(self) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " token"], Int[np.ndarray, " token"]]:
        """The unit, row and column of every token of a unit, in order."""
        unit = [np.repeat(block.units, block.length) for block in self.blocks]
        row = [np.repeat(block.rows, block.length) for block in self.blocks]
        column = [np.tile(np.arange(block.first, block.end), len(block.units)) for block in self.blocks]
        empty = np.zeros(0, dtype=np.int64)
        return tuple(np.concatenate(each) if each else empty for each in (unit, row, column))  # pyright: ignore


def packing(blocks: list[Block], num_units: int, offset: int) -> Packing:
    """Lays blocks out one after the other."""
    start, first, end, asked_start, asked_first = (np.full(num_units, -1) for _ in range(5))
    token = asked = offset
    for block in blocks:
        count = np.arange(len(block.units))
        start[block.units], asked_start[block.units] = token + count * block.length, asked + count * block.asking
        first[block.units], end[block.units], asked_first[block.units] = block.first, block.end, block.asked_first
        token, asked = token + len(count) * block.length, asked + len(count) * block.asking
    return Packing(blocks, offset, start, first, end, asked_start, asked_first)


def carried(old: Packing, new: Packing, base_length: int) -> Int[Tensor, " token"]:
    """For every token of a packing where its residual is: in the old packing, or, if nothing has changed it yet, in the
    base run, which comes first in every packing.

    Args:
        old: The packing of the layer before.
        new: The packing wanted.
        base_length: Columns of the base run.
    """
    unit, row, column = new.columns()
    was = (old.start[unit] >= 0) & (column >= old.first[unit]) & (column < old.end[unit])
    own = old.start[unit] + column - old.first[unit]
    index = np.where(was, own, row * base_length + column)
    return torch.from_numpy(np.concatenate([np.arange(new.offset), index]))
