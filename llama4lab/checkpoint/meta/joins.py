"""Tensors that lie in pieces, one for each rank, and how they are joined."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Scheme
from llama4lab.checkpoint.tensor_files import Spec, read_slice


class Piece(NamedTuple):
    """Some rows of a stored tensor.

    Attributes:
        file: Where they are.
        spec: Of the rows alone.
    """

    file: Path
    spec: Spec

    def rows(self, start: int, stop: int) -> "Piece":
        """Gives some of the rows."""
        each = self.spec.nbytes // self.spec.shape[0]
        shape, first = (stop - start, *self.spec.shape[1:]), self.spec.start + start * each
        return Piece(self.file, self.spec._replace(shape=shape, start=first, nbytes=(stop - start) * each))

    def viewed(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> "Piece":
        """Gives the same bytes in another shape, or as another dtype of the same width."""
        return Piece(self.file, self.spec._replace(shape=shape, dtype=dtype or self.spec.dtype))


@dataclass(frozen=True)
class Join:
    """A tensor made of the pieces of all ranks.

    Attributes:
        pieces: In the order of the ranks.
        axis: Along which they follow each other; None if every rank has the whole.
        turned: Whether the two axes change places after that.
        scheme: What makes numbers of it, if that is not plain.
    """

    pieces: tuple[Piece, ...]
    axis: int | None
    turned: bool = False
    scheme: Scheme | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        shape = list(self.pieces[0].spec.shape)
        if self.axis is not None:
            shape[self.axis] = sum(piece.spec.shape[self.axis] for piece in self.pieces)
        return tuple(reversed(shape)) if self.turned else tuple(shape)

    @property
    def spec(self) -> Spec:
        """What is known of the tensor; its place is that of its first piece."""
        first = self.pieces[0].spec
        nbytes = first.nbytes if self.axis is None else sum(piece.spec.nbytes for piece in self.pieces)
        return Spec(first.dtype, self.shape, first.start, nbytes, self.scheme)

    def row(self, index: int) -> "Join":
        """Gives a slice along the first axis of a tensor that is not turned."""
        if self.axis != 0:
            pieces = (piece.rows(index, index + 1).viewed(piece.spec.shape[1:]) for piece in self.pieces)
            return Join(tuple(pieces), self.axis and self.axis - 1)
        each = self.pieces[0].spec.shape[0]
        piece = self.pieces[index // each]
        return Join((piece.rows(index % each, index % each + 1).viewed(piece.spec.shape[1:]),), None)

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """Reads the tensor into memory of its own.

        Raises:
            OSError: if a file has become shorter, or cannot be read any more.
            ValueError: if every rank should have the same, and two differ.
        """
        if self.axis is None or len(self.pieces) == 1:
            joined = read_slice(self.pieces[0].spec, self.pieces[0].file, name)
            for piece in self.pieces[1:]:
                if not _same_bytes(joined, read_slice(piece.spec, piece.file, name)):
                    raise ValueError(
                        f"{self.pieces[0].file} and {piece.file.name} have different values of {name}, of which every "
                        "rank has the whole.\nThe files are damaged, or belong to different checkpoints."
                    )
        else:
            shape = self.shape[::-1] if self.turned else self.shape
            joined = torch.empty(shape, dtype=self.pieces[0].spec.dtype)
            slots = joined.split([piece.spec.shape[self.axis] for piece in self.pieces], self.axis)
            for slot, piece in zip(slots, self.pieces, strict=True):
                slot.copy_(read_slice(piece.spec, piece.file, name))
        if self.turned and self.axis is None:
            # A router: small, and products with a turned view of it would differ in their last bits.
            return joined.T.contiguous()
        return joined.T if self.turned else joined


def _same_bytes(one: Shaped[Tensor, "..."], other: Shaped[Tensor, "..."]) -> bool:
    """Not the same numbers: a NaN is not equal to itself."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
