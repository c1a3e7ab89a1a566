"""The types of GGUF's tensors: plain numbers, and blocks of packed ones with their scales."""

import math
from dataclasses import dataclass
from functools import lru_cache

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from jaxtyping import Float, UInt8
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Parts, Shape

try:
    from transformers.integrations.gguf import dequant
except ImportError:  # not in every version that llama4lab works with
    dequant = None

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.I8: torch.int8,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I64: torch.int64,
}
# Where the float16 scales of a block lie, as byte offsets; negative ones count from its end.
HALVES = {
    **{name: (0,) for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "Q1_0")},
    **{name: (0,) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")},
    **{name: (0, 2) for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")},
    **{name: (-2,) for name in ("Q3_K", "Q6_K", "TQ1_0", "TQ2_0")},
    "Q2_K": (-4, -2),
}
# Numbers that are made at a time, on the CPU and on a GPU.
PIECE, LARGE_PIECE = 2**19, 2**24


@dataclass(frozen=True)
class GgmlType:
    """A type of tensors.

    Attributes:
        number: By which files name it.
        name: By which people do.
        dtype: Of the stored values; uint8 for blocks.
        block: How many numbers a block makes; 1 for plain ones.
        size: Bytes of a block.
    """

    number: int
    name: str
    dtype: torch.dtype
    block: int
    size: int

    @property
    def is_packed(self) -> bool:
        """Whether values are blocks."""
        return self.block > 1

    def nbytes(self, shape: Shape) -> int:
        """How many bytes a tensor takes.

        Raises:
            ValueError: if its rows are no whole number of blocks.
        """
        if shape[-1] % self.block:
            raise ValueError(f"has rows of {shape[-1]:,} numbers; blocks of {self.name} make {self.block}")
        return math.prod(shape) // self.block * self.size

    def stored_shape(self, shape: Shape) -> Shape:
        """Gives the shape of the stored values."""
        return (*shape[:-1], shape[-1] // self.block * self.size) if self.is_packed else shape


@lru_cache(maxsize=64)
def ggml_type(number: int) -> GgmlType:
    """Gives the type of a number.

    Raises:
        ValueError: if there is none, or none that can be decoded.
    """
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"is of type {number}, which gguf does not know") from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind in PLAIN:
        return GgmlType(number, kind.name, PLAIN[kind], 1, size)
    try:
        gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except NotImplementedError:
        raise ValueError(f"is of type {kind.name}, which gguf cannot decode") from None
    return GgmlType(number, kind.name, torch.uint8, block, size)


@dataclass(frozen=True)
class GgmlBlocks:
    """Blocks of packed numbers, with the scales inside: `weight`.

    Attributes:
        kind: Which type of blocks.
    """

    kind: GgmlType

    @property
    def name(self) -> str:
        """For example "GGUF Q4_K, blocks of 256"."""
        return f"GGUF {self.kind.name}, blocks of {self.kind.block}"

    def stored_shape(self, shape: Shape) -> Shape:
        """Gives the shape of the bytes of a matrix. One that is no whole number of blocks wide has none such."""
        return (*shape[:-1], -(-shape[-1] // self.kind.block) * self.kind.size)

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives the numbers of the blocks, made by transformers' code or, for types that it does not know, by gguf's.

        Both make the same bits. The first works on any device and with all threads, the second on the CPU with one.
        """
        stored = parts["weight"]
        if dequant is not None and self.kind.number in dequant.GGML_BLOCK:
            return self._piece_by_piece(stored.reshape(-1, self.kind.size)).view(shape)
        rows = stored.cpu().contiguous().numpy()
        with np.errstate(all="ignore"):
            made = gguf.quants.dequantize(rows, GGMLQuantizationType(self.kind.number))
        return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32)).view(shape).to(stored.device)

    def _piece_by_piece(self, blocks: UInt8[Tensor, "block byte"]) -> Float[Tensor, " value"]:
        """In pieces that a cache holds: what is made on the way takes several times the memory of the numbers."""
        made = torch.empty(len(blocks) * self.kind.block, device=blocks.device)
        count = (PIECE if blocks.device.type == "cpu" else LARGE_PIECE) // self.kind.block
        for own, piece in zip(made.split(count * self.kind.block), blocks.split(count), strict=True):
            own.copy_(dequant.dequantize(piece.flatten(), self.kind.number, torch.float32))  # pyright: ignore
        return made

    def is_finite(self, stored: UInt8[Tensor, "*rows byte"]) -> bool:
        """Whether no scale is NaN or infinite, as far as scales are float16."""
        blocks = stored.reshape(-1, self.kind.size)
        for offset in HALVES.get(self.kind.name, ()):
            start = offset % self.kind.size
            if not blocks[:, start : start + 2].contiguous().view(torch.float16).isfinite().all():
                return False
        return True
