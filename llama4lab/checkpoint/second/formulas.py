"""For each way to store a matrix: the number in a row and a column.

Rows come as a column of indices and columns as a row of them, so that a formula gives a strip of the matrix at once.
Products and sums are rounded to float32 in the order in which the formats' own libraries form them; so the numbers are
theirs to the bit.
"""

import json
from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llama4lab.checkpoint.second.raw_tensor import RawTensor
from llama4lab.checkpoint.second.small_floats import E2M1

Rows = Int[np.ndarray, "row 1"]
Columns = Int[np.ndarray, "1 column"]
Strip = Float[np.ndarray, "row column"]
Parts = Mapping[str, RawTensor]


class Formula(NamedTuple):
    """What a way to store a matrix is called, and its numbers."""

    scheme: str
    at: Callable[[Rows, Columns], Strip]


def plain(parts: Parts, columns: int) -> Formula:
    """Numbers as they are."""
    weight = parts["weight"]
    return Formula("plain", lambda row, column: weight[row, column])


def packed_integers(parts: Parts, columns: int) -> Formula:
    """compressed-tensors: words of 32 bits, the first value lowest, each more by half the range than it means."""
    words, scale = parts["weight_packed"].bits, parts["weight_scale"]
    bits = 8 if words.shape[1] * 4 >= columns else 4
    each, width = 32 // bits, columns // scale.shape[1]

    def at(row: Rows, column: Columns) -> Strip:
        value = words[row, column // each] >> (column % each * bits).astype(np.uint32) & 2**bits - 1
        group = parts["weight_g_idx"].bits[column].astype(int) if "weight_g_idx" in parts else column // width
        zero = 2 ** (bits - 1)
        if "weight_zero_point" in parts:  # down the rows there are as many in a word as there are columns in one
            word = parts["weight_zero_point"].bits[row // each, group]
            zero = (word >> (row % each * bits).astype(np.uint32) & 2**bits - 1).astype(int)
        return (value.astype(int) - zero).astype(np.float32) * scale[row, group]

    return Formula(f"int{bits}, groups of {width}", at)


def affine_integers(parts: Parts, columns: int) -> Formula:
    """MLX: words of 32 bits, the first value lowest, times a scale, plus a bias."""
    words, scale, bias = parts["weight"].bits, parts["scales"], parts["biases"]
    each = columns // words.shape[1]
    bits, width = 32 // each, columns // scale.shape[1]

    def at(row: Rows, column: Columns) -> Strip:
        value = words[row, column // each] >> (column % each * bits).astype(np.uint32) & 2**bits - 1
        return value.astype(np.float32) * scale[row, column // width] + bias[row, column // width]

    return Formula(f"affine int{bits}, groups of {width}", at)


def scaled(parts: Parts, columns: int) -> Formula:
    """8 bits times a scale: of the tensor, of the row, or of a block."""
    weight, scale = parts["weight"], parts["weight_scale"]
    rows, count = weight.shape[0], scale.bits.size
    if count == 1:
        return Formula(f"{weight.dtype} by tensor", lambda row, column: weight[row, column] * scale.flat()[:1])
    if count == rows:
        return Formula(f"{weight.dtype} by row", lambda row, column: weight[row, column] * scale.flat()[row])
    sides = [128 if ceil(side / 128) == n else side // n for side, n in zip(weight.shape, scale.shape, strict=True)]
    return Formula(
        f"{weight.dtype} by block of {sides[0]} x {sides[1]}",
        lambda row, column: weight[row, column] * scale[row // sides[0], column // sides[1]],
    )


def nvfp4(parts: Parts, columns: int) -> Formula:
    """Floats of 4 bits, the first of two in the low half of a byte; compressed-tensors divides by the global scale."""
    pairs, scale = parts["weight_packed" if "weight_packed" in parts else "weight"].bits, parts["weight_scale"]
    divisor, factor = parts.get("weight_global_scale"), parts.get("weight_scale_2")

    def at(row: Rows, column: Columns) -> Strip:
        value = E2M1[pairs[row, column // 2] >> (column % 2 * 4).astype(np.uint8) & 15]
        own = scale[row, column // 16]
        if divisor is not None:
            return value * (own / divisor.flat()[:1])
        assert factor is not None
        return value * (own * factor.flat()[:1])

    return Formula("nvfp4, groups of 16", at)


def table_of_16(parts: Parts, columns: int) -> Formula:
    """bitsandbytes: all numbers in a row, the first of two in the high half of a byte; blocks run across the rows."""
    state = next(part for role, part in parts.items() if "quant_state" in role)
    known = json.loads(state.bits.tobytes())
    pairs, table = parts["weight"].bits.reshape(-1), parts["weight.quant_map"]
    block, largest = known["blocksize"], parts["weight.absmax"]

    def at(row: Rows, column: Columns) -> Strip:
        number = row * columns + column
        code = np.where(number % 2 == 0, pairs[number // 2] >> 4, pairs[number // 2] & 15)
        own = number // block
        if "weight.nested_absmax" not in parts:
            return table[code] * largest[own]
        nested = parts["weight.nested_absmax"][own // known["nested_blocksize"]]
        size = parts["weight.nested_quant_map"][largest.bits[own]] * nested + np.float32(known["nested_offset"])
        return table[code] * size

    return Formula(f"{known['quant_type']}, blocks of {block}", at)
