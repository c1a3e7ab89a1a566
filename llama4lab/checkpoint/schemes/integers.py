"""Integers of 4 or 8 bits with a scale for each group of columns: compressed-tensors' `pack-quantized`, and MLX."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Parts, Shape, grouped


@dataclass(frozen=True)
class PackedIntegers:
    """Integers in 32-bit words with an offset of half their range: `weight_packed`, `weight_scale`, `weight_shape`.

    With `weight_zero_point` (packed down the rows) the zero of each group is another; with `weight_g_idx` columns have
    the groups that it names.
    """

    bits: int
    group: int

    @property
    def name(self) -> str:
        """For example "int4, groups of 128"."""
        return f"int{self.bits}, groups of {self.group}"

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives (value - zero point) * scale."""
        values = unpacked(parts["weight_packed"], self.bits)[:, : shape[1]].float() - 2 ** (self.bits - 1)
        scale, zero = parts["weight_scale"].float(), parts.get("weight_zero_point")
        if zero is not None:
            zero = unpacked(zero.T.contiguous(), self.bits).T[: shape[0]].float() - 2 ** (self.bits - 1)
        if "weight_g_idx" in parts:
            of_column = parts["weight_g_idx"].long()
            values = values if zero is None else values - zero[:, of_column]
            return values * scale[:, of_column]
        if zero is not None:
            values = (values.reshape(shape[0], scale.shape[1], -1) - zero[:, :, None]).reshape(shape)
        return grouped(values, scale)


@dataclass(frozen=True)
class AffineIntegers:
    """Unsigned integers in 32-bit words, times a scale, plus a bias for each group: `weight`, `scales`, `biases`."""

    bits: int
    group: int

    @property
    def name(self) -> str:
        """For example "affine int4, groups of 64"."""
        return f"affine int{self.bits}, groups of {self.group}"

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives value * scale + bias."""
        scale, bias = parts["scales"].float(), parts["biases"].float()
        values = unpacked(parts["weight"], self.bits).float().reshape(shape[0], scale.shape[1], -1)
        return (values * scale[:, :, None] + bias[:, :, None]).reshape(shape)


def unpacked(words: Int[Tensor, "row word"] | Shaped[Tensor, "row word"], bits: int) -> UInt8[Tensor, "row value"]:
    """Gives the integers in 32-bit words; the first is in the lowest bits."""
    in_bytes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return in_bytes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    return (in_bytes[:, :, None] >> shifts & 2**bits - 1).flatten(1)
