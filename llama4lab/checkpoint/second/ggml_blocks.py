"""The numbers in GGUF's blocks, by the layout of each block's bytes.

The commonest types are decoded here; the others by the gguf package, whose bytes and rows are still looked up here.
"""

from collections.abc import Callable

import gguf
import numpy as np
from jaxtyping import Float, Int, UInt8

from llama4lab.checkpoint.second.formulas import Columns, Formula, Rows, Strip
from llama4lab.checkpoint.second.raw_tensor import RawTensor

Block = UInt8[np.ndarray, "row column"]
Place = Int[np.ndarray, "1 column"]


class _Blocks:
    """The bytes of the block that each number of a strip is in.

    Args:
        bits: Rows of blocks.
        row: Rows of the strip.
        start: For each column, where its block begins.
    """

    def __init__(self, bits: np.ndarray, row: Rows, start: Place):
        self.bits, self.row, self.start = bits, row, start

    def byte(self, offset: Place | int) -> Int[np.ndarray, "row column"]:
        """A byte of each block."""
        return self.bits[self.row, self.start + offset].astype(int)

    def half(self, offset: int) -> Float[np.ndarray, "row column"]:
        """A float16 of each block."""
        both = self.byte(offset) | self.byte(offset + 1) << 8
        return both.astype(np.uint16).view(np.float16).astype(np.float32)


def _q4_0(block: _Blocks, place: Place) -> Strip:
    value = block.byte(2 + place % 16) >> place // 16 * 4 & 15
    return (value - 8).astype(np.float32) * block.half(0)


def _q4_1(block: _Blocks, place: Place) -> Strip:
    value = block.byte(4 + place % 16) >> place // 16 * 4 & 15
    return value.astype(np.float32) * block.half(0) + block.half(2)


def _q5_0(block: _Blocks, place: Place) -> Strip:
    value = block.byte(6 + place % 16) >> place // 16 * 4 & 15
    fifth = block.byte(2 + place // 8) >> place % 8 & 1
    return (value + 16 * fifth - 16).astype(np.float32) * block.half(0)


def _q8_0(block: _Blocks, place: Place) -> Strip:
    value = block.byte(2 + place)
    return (value - 256 * (value > 127)).astype(np.float32) * block.half(0)


def _k_scales(block: _Blocks, group: Place) -> tuple[Strip, Strip]:
    """Scale and minimum of each of 8 groups: 6 bits each in 12 bytes, the upper bits of the last four apart."""
    late, low = group >= 4, group % 4
    first, second, third = block.byte(4 + low), block.byte(8 + low), block.byte(12 + low)
    scale = np.where(late, third & 15 | first >> 6 << 4, first & 63)
    least = np.where(late, third >> 4 | second >> 6 << 4, second & 63)
    return block.half(0) * scale.astype(np.float32), block.half(2) * least.astype(np.float32)


def _q4_k(block: _Blocks, place: Place) -> Strip:
    group, own = place // 32, place % 32
    scale, least = _k_scales(block, group)
    value = block.byte(16 + group // 2 * 32 + own) >> group % 2 * 4 & 15
    return scale * value.astype(np.float32) - least


def _q5_k(block: _Blocks, place: Place) -> Strip:
    group, own = place // 32, place % 32
    scale, least = _k_scales(block, group)
    value = block.byte(48 + group // 2 * 32 + own) >> group % 2 * 4 & 15
    fifth = block.byte(16 + own) >> group & 1
    return scale * (value + 16 * fifth).astype(np.float32) - least


def _q6_k(block: _Blocks, place: Place) -> Strip:
    half, rest = place // 128, place % 128
    quarter, own = rest // 32, rest % 32
    low = block.byte(64 * half + 32 * (quarter % 2) + own) >> quarter // 2 * 4 & 15
    high = block.byte(128 + 32 * half + own) >> 2 * quarter & 3
    scale = block.byte(192 + place // 16)
    scale = (scale - 256 * (scale > 127)).astype(np.float32)
    return block.half(208) * scale * (low + 16 * high - 32).astype(np.float32)


KNOWN: dict[str, Callable[[_Blocks, Place], Strip]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


def ggml_blocks(weight: RawTensor, columns: int, kind: str) -> Formula:
    """Gives the formula of a matrix of blocks.

    Args:
        weight: Its bytes, a row of blocks for each row.
        columns: How many numbers a row has.
        kind: The type of the blocks, for example "Q4_K".
    """
    number = gguf.GGMLQuantizationType[kind]
    width, size = gguf.GGML_QUANT_SIZES[number]
    bits = weight.bits.reshape(-1, columns // width * size)

    def at(row: Rows, column: Columns) -> Strip:
        return KNOWN[kind](_Blocks(bits, row, column // width * size), column % width)

    def by_library(row: Rows, column: Columns) -> Strip:
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(bits[row[:, 0]], number)[:, column[0]].astype(np.float32)

    return Formula(f"GGUF {kind}", at if kind in KNOWN else by_library)
