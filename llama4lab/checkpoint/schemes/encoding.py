"""Packing numbers: the way back of `integers` and `scaled`, in the form that compressed-tensors stores."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from llama4lab.checkpoint.schemes.integers import PackedIntegers
from llama4lab.checkpoint.schemes.scaled import Scaled
from llama4lab.checkpoint.schemes.scheme import Scheme

Method = Literal["int8", "int4", "fp8"]
GROUP = 128
LARGEST_FP8 = 448.0


def encoded(values: Float[Tensor, "d_out d_in"], method: str) -> tuple[dict[str, Tensor], Scheme]:
    """Rounds a matrix to 4 or 8 bits: to the nearest of evenly spaced numbers, or to the nearest float8.

    Integers have a scale for each 128 columns of a row (fewer where 128 does not divide them), float8 one for each row.
    Scales are bfloat16 and were rounded before the values were divided by them.

    Args:
        values: The matrix.
        method: "int8", "int4" or "fp8".

    Returns:
        The tensors to store, by what they are, and what makes numbers of them again.

    Raises:
        ValueError: if there is no such method.
    """
    if method not in get_args(Method):
        raise ValueError(f"quantize={method!r} is not a method; choose from {', '.join(get_args(Method))}.")
    rows, columns = values.shape
    wide = values.float().contiguous()
    if method == "fp8":
        scale = _scale(wide, LARGEST_FP8)
        parts = {"weight": (wide / scale.float()).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)}
        return parts | {"weight_scale": scale}, Scaled(torch.float8_e4m3fn, "row")
    bits, group = int(method[3:]), math.gcd(GROUP, columns)
    half = 2 ** (bits - 1)
    grouped = wide.reshape(rows, -1, group)
    scale = _scale(grouped, half - 0.5)
    integers = (grouped / scale.float()).round().clamp(-half, half - 1).reshape(rows, columns) + half
    parts = {"weight_packed": packed(integers.to(torch.uint8), bits), "weight_scale": scale.squeeze(-1)}
    return parts | {"weight_shape": torch.tensor([rows, columns])}, PackedIntegers(bits, group)


def packed(values: UInt8[Tensor, "row value"], bits: int) -> Int[Tensor, "row word"]:
    """Puts integers into 32-bit words, the first into the lowest bits; the last word is filled with zeros."""
    each = 32 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % each))
    if bits == 4:
        padded = padded[:, ::2] | padded[:, 1::2] << 4
    return padded.contiguous().view(torch.int32)


def _scale(values: Float[Tensor, "... group"], largest: float) -> Float[Tensor, "... 1"]:
    """What the largest value of each last axis is divided by to become `largest`; 1 where all are zero."""
    scale = (values.abs().amax(-1, keepdim=True) / largest).bfloat16()
    return torch.where(scale == 0, torch.ones_like(scale), scale)
