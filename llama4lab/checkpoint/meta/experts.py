"""The experts of a layer, cut out of the tensors in which each rank has a share of all of them.

A rank has columns of gate and up, and rows of down: [expert * in, out / ranks] and [expert * in / ranks, out]. So what
belongs to one expert lies in one piece in each rank, and reading it touches nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llama4lab.checkpoint.meta.joins import Join, Piece
from llama4lab.checkpoint.meta.names import Bank
from llama4lab.checkpoint.schemes.scaled import Scaled
from llama4lab.checkpoint.schemes.scheme import Scheme
from llama4lab.checkpoint.schemes.signed_nibbles import SignedNibbles

# In which dtypes experts are stored that have scales; two integers in a byte pass for a float, as parameters must.
DTYPES = {"fp8": (torch.float8_e4m3fn,), "int4": (torch.float8_e4m3fn, torch.int8, torch.uint8)}
GROUP = 128  # columns that have a scale together, in int4


@dataclass(frozen=True)
class Shares:
    """One projection of all experts of a layer, as the ranks have it.

    Attributes:
        bank: Which.
        name: Of the stored tensors.
        weights: One of each rank.
        scales: One of each rank; none for plain numbers.
        method: "fp8" or "int4"; None if the numbers are plain.
        experts: How many experts there are.
        d_model: How wide the residual stream is.
    """

    bank: Bank
    name: str
    weights: tuple[Piece, ...]
    scales: tuple[Piece, ...]
    method: str | None
    experts: int
    d_model: int

    def joins(self) -> Iterator[tuple[str, Join]]:
        """Gives the matrix [out, in] of each expert, and its scale, by their names.

        Raises:
            ValueError: if a tensor has another shape than so many experts of that width need.
        """
        self._check()
        axis, scheme, is_int4 = 0 if self.is_down else 1, self._scheme(), self.method == "int4"
        start = f"model.layers.{self.bank.layer}.feed_forward.experts"
        weights = [self._flat(piece) for piece in self.weights]
        rows = weights[0].spec.shape[0] // self.experts
        for expert in range(self.experts):
            base = f"{start}.{expert}.{self.bank.projection}_proj"
            own = [piece.rows(expert * rows, (expert + 1) * rows) for piece in weights]
            if is_int4:
                own = [piece.viewed(piece.spec.shape, torch.uint8) for piece in own]
            yield f"{base}.weight", Join(tuple(own), axis, turned=True, scheme=scheme)
            if self.scales:
                yield f"{base}.weight_scale", self._scale(expert, axis)

    @property
    def is_down(self) -> bool:
        """Whether the ranks share the input of the matrices, and not their output."""
        return self.bank.projection == "down"

    @property
    def _inner(self) -> int:
        """How much of the width of an expert a rank has."""
        shape = self._flat(self.weights[0]).spec.shape
        return shape[0] // self.experts * (2 if self.method == "int4" else 1) if self.is_down else shape[1]

    def _flat(self, piece: Piece) -> Piece:
        """The published files have two axes; the modules of Meta's code have one more, for the experts."""
        shape = piece.spec.shape
        return piece if len(shape) != 3 else piece.viewed((shape[0] * shape[1], shape[2]))

    def _scheme(self) -> Scheme | None:
        if self.method is None:
            return None
        if self.method == "int4":
            return SignedNibbles(GROUP)
        # Each rank has rounded its own columns of down, so that a row has a scale for each rank.
        dtype = self.weights[0].spec.dtype
        by_rank = self.is_down and len(self.weights) > 1
        return Scaled(dtype, "block", (1, self._inner)) if by_rank else Scaled(dtype, "row")

    def _scale(self, expert: int, axis: int) -> Join:
        own: list[Piece] = [piece.rows(expert, expert + 1) for piece in self.scales]
        if self.method == "int4":
            return Join(tuple(piece.viewed(piece.spec.shape[1:]) for piece in own), axis, turned=True)
        if self.is_down:
            return Join(tuple(own), 0, turned=True)
        return Join(tuple(piece.viewed(piece.spec.shape[1:]) for piece in own), 0)

    def _check(self) -> None:
        piece, halved = self.weights[0], 2 if self.method == "int4" else 1
        shape = self._flat(piece).spec.shape
        if len(shape) != 2 or shape[0] % self.experts or not all(shape):
            raise self._refusal(piece, f"for {self.experts} experts it is a matrix whose rows are a multiple of that")
        each = (shape[0] // self.experts, shape[1])
        if self.is_down and each[1] != self.d_model:
            raise self._refusal(piece, f"by the router of its layer it has {self.d_model} columns")
        if not self.is_down and each[0] * halved != self.d_model:
            raise self._refusal(piece, f"by the router of its layer it has {self.d_model / halved:g} rows an expert")
        if self.method is not None:
            self._check_scales(self.method, piece)

    def _check_scales(self, method: str, piece: Piece) -> None:
        if piece.spec.dtype not in DTYPES[method]:
            raise ValueError(
                f"{piece.file}: {self.name} is stored as {piece.spec.dtype}, yet {self.scales[0].file.name} has scales "
                "for it."
            )
        d_in, d_out = (self._inner, self.d_model) if self.is_down else (self.d_model, self._inner)
        if method == "int4" and d_in % GROUP:
            raise self._refusal(piece, f"in int4 it has a multiple of {GROUP} inputs, which have a scale together")
        wanted = (self.experts, d_in // GROUP, d_out) if method == "int4" else (self.experts, d_out)
        if self.scales[0].spec.shape != wanted:
            raise self._refusal(self.scales[0], f"the scales of {method} have {list(wanted)} here")

    def _refusal(self, piece: Piece, expected: str) -> ValueError:
        return ValueError(f"{piece.file}: {self.name} has shape {list(piece.spec.shape)}; {expected}.")
